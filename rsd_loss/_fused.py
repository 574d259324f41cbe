"""The loss and its gradient through the smaller of two products, in plain torch: moments, small product, apply.

With Z the centred columns over their norm n plus eps sqrt(B), r = 1 / (n + eps sqrt(B)) and P = Zt' Zs,

    loss_j = e_j^2 + kappa off_j,    e_j = P_jj - 1,    off_j = sum_{i != j} P_ij^2

Both vectors, and M = dL/dZs, follow from Zt Zt' Zs, which can be multiplied in either order:

    wide, B < D:   K = Zt Zt' (B, B),  R = K Zs - P_jj o Zt,  off = colsum(R o Zs),          M = 2 kappa R + 2 e o Zt
    tall, D <= B:  P = Zt' Zs (D, D),                         off = colsum(P o P) - P_jj^2,  M = 2 Zt A
                                                              with A = kappa P off the diagonal and e on it

and through the standardisation, with u the upstream gradient of the losses,

    dL/dXs = u o (r o M - g o Zs),    g = colsum(M o Zs) / n = 2 (kappa off + e P_jj) / n

g is the gradient that reaches the norms. Centred columns sum to zero, so nothing flows through the mean. For the
teacher the roles swap, and u stands inside the product. Statistics and vectors are float32 or wider, products in the
dtype of the input or of autocast. What runs in forward changes no tensor in place: activation checkpointing may keep
the result of any operation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsd_loss._common import (
    no_autocast,
    product_dtype,
    raise_no_second_derivative,
    refuse_second_derivative,
    statistics_dtype,
)
from rsd_loss._distributed import Losses, Shard, merge_over_processes, sum_over_features, sum_over_rows

# CPU block size in rows; keeps temporaries in cache. Without blocks, 4,096 rows and more take 1.1 to 1.4 times as long
# and two to four times the memory.
_BLOCK_ROWS = 1024


def feature_losses(student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None) -> Losses:
    """Same contract as reference.feature_losses."""
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        return _FeatureLosses.apply(student, teacher, kappa, eps, shard)
    # The value alone takes 2 B D^2 operations or 4 B^2 D; with a gradient, below, 4 B D^2 or 4 B^2 D.
    tall = student.shape[1] <= 2 * student.shape[0] if shard is None else shard.by_rows
    losses, d, off, *_ = (_tall if tall else _wide)(student, teacher, kappa, eps, shard, gradient=False)
    return losses, d, off


class _FeatureLosses(torch.autograd.Function):
    """Wide: saves dL/dXs for an upstream of ones. Tall: saves A, and the statistics to standardise by once more."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None) -> Losses:
        ctx.tall = student.shape[1] <= student.shape[0] if shard is None else shard.by_rows
        ctx.settings = kappa, eps, shard
        forward, gradient = (_tall, True) if ctx.tall else (_wide, ctx.needs_input_grad[0])
        losses, d, off, *saved = forward(student, teacher, kappa, eps, shard, gradient=gradient)
        inputs = [student, teacher if ctx.tall or ctx.needs_input_grad[1] else student]
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # spares two launches that fill zeros; a compiler drops them by itself
            inputs = [x.clone() if x.is_inference() else x for x in inputs]  # inference tensors cannot be saved
        ctx.mark_non_differentiable(d, off)
        ctx.save_for_backward(*inputs, *saved)
        return losses, d, off

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if u is None:
            return None, None, None, None, None
        student, teacher, *saved = ctx.saved_tensors  # once: activation checkpointing hands each out a single time
        compiling = torch.compiler.is_compiling()
        grads: list[Tensor | None] = [None, None]
        # Forward's autocast is in the saved dtypes; one around backward() must change nothing.
        with torch.set_grad_enabled(compiling), no_autocast(u.device.type):
            if compiling:
                u = refuse_second_derivative(u, student, teacher)
            if ctx.needs_input_grad[0]:
                grad = _tall_gradient(ctx, u, student, teacher, *saved) if ctx.tall else saved[0] * u
                grads[0] = grad.to(student.dtype)
            if ctx.needs_input_grad[1]:
                grads[1] = _teacher_gradient(ctx, u, student, teacher, *saved).to(teacher.dtype)
        if torch.is_grad_enabled() and not compiling:
            grads = [grad if grad is None else refuse_second_derivative(grad, u, student, teacher) for grad in grads]
        return *grads, None, None, None


def _wide(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None, gradient: bool
) -> tuple[Tensor, ...]:
    """The losses, P_jj and off; then, if wanted, the student's gradient for an upstream of ones."""
    dtype = product_dtype(student, teacher)
    z_s, z_t, (_, _, norm, scale) = _standardise(student, teacher, eps, shard)
    left = z_t.to(dtype)
    k = sum_over_features(torch.mm(left, left.T), shard).to(dtype)
    d = (z_t * z_s).sum(dim=0)
    r = torch.addcmul(torch.mm(k, z_s.to(dtype)).to(d.dtype), z_t, d, value=-1)
    e, off = d - 1, (r * z_s).sum(dim=0)
    penalty = kappa * off
    losses = torch.addcmul(penalty, e, e)
    if not gradient:
        return losses, d, off
    scaled_m = torch.addcmul(r * (2 * kappa * scale[0]), z_t, e * scale[0], value=2)
    del r  # no longer needed, and as large as an input
    return losses, d, off, torch.addcmul(scaled_m, z_s, torch.addcmul(penalty, e, d) / norm[0], value=-2)


def _tall(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None, gradient: bool
) -> tuple[Tensor, ...]:
    """The losses, P_jj and off; then, if wanted, A, g and the statistics."""
    dtype, rows = product_dtype(student, teacher), student.shape[0] if shard is None else shard.rows
    # Decided by all processes' rows, as all must do the same. Centred columns may exceed the range of float16.
    if student.device.type == "cpu" and rows > _BLOCK_ROWS // 2 and dtype != torch.float16:
        statistics, p = _correlate_in_blocks(student, teacher, eps, dtype, shard)
    else:
        z_s, z_t, statistics = _standardise(student, teacher, eps, shard)
        p = sum_over_rows(torch.mm(z_t.to(dtype).T, z_s.to(dtype)).to(z_s.dtype), shard)
    d = p.diagonal().clone()
    e, off = d - 1, torch.addcmul(p.square().sum(dim=0), d, d, value=-1)
    penalty = kappa * off
    losses = torch.addcmul(penalty, e, e)
    if not gradient:
        return losses, d, off
    a = torch.diagonal_scatter(kappa * p, e)
    return losses, d, off, a.to(dtype), torch.addcmul(penalty, e, d) / statistics[2][0], *statistics


def _tall_gradient(ctx: Any, u: Tensor, student: Tensor, teacher: Tensor, *saved: Tensor) -> Tensor:
    a, g, *statistics = saved
    if torch.compiler.is_compiling():
        if student.device.type == "cpu":
            return _apply_op(student, teacher, a, g, 2 * u, statistics)
    elif torch._C._functorch.is_legacy_batchedtensor(u) or torch._C._functorch.is_batchedtensor(u):
        return u * _tall_gradient(ctx, torch.ones_like(g), student, teacher, *saved)  # is_grads_batched=True
    return _apply_in_blocks(student, teacher, a, g, 2 * u, statistics, ctx.settings[2])


def _teacher_gradient(ctx: Any, u: Tensor, student: Tensor, teacher: Tensor, *saved: Tensor) -> Tensor:
    """The rare case: the roles swap, and u stands inside the product."""
    kappa, eps, shard = ctx.settings
    z_s, z_t, (_, _, norm, scale) = _standardise(student, teacher, eps, shard)
    if ctx.tall:
        m = torch.mm(z_s, (saved[0] * (2 * u)).T)
    else:
        inner = sum_over_features(torch.mm(z_s * u, z_s.T), shard)
        m = 2 * kappa * torch.mm(inner, z_t) + z_s * (2 * u * ((1 - kappa) * (z_t * z_s).sum(dim=0) - 1))
    return torch.addcmul(m * scale[1], z_t, sum_over_rows((m * z_t).sum(dim=0), shard) / norm[1], value=-1)


Stats = list[Tensor]  # (2, D) each, student first: a shift, what it leaves of the mean, the norm n and the scale r


def _standardise(student: Tensor, teacher: Tensor, eps: float, shard: Shard | None) -> tuple[Tensor, Tensor, Stats]:
    """Both Z (B, D) and the statistics; all rows at once."""
    rows, full = student.shape[0], statistics_dtype(student, teacher)
    # The first row as a shift: a large offset costs no digits, and a constant column becomes exactly 0.
    shift = torch.stack([student[0].to(full), teacher[0].to(full)])
    c = [student.to(full) - shift[0], teacher.to(full) - shift[1]]
    mean = torch.stack([x.mean(dim=0) for x in c])
    # mse_loss is (c - mean)^2 in one pass over memory.
    squares = torch.stack(
        [F.mse_loss(x, mean[side].expand_as(x), reduction="none").sum(dim=0) for side, x in enumerate(c)]
    )
    if shard is not None and shard.by_rows:
        mean_offset, squares, _ = merge_over_processes(shard, rows, shift.double() + mean, squares)
        mean, rows = mean - mean_offset, shard.rows
    norm, scale = _norm_and_scale(squares, rows, eps)
    offset = -mean * scale
    z_s, z_t = (torch.addcmul(offset[i], c.pop(0), scale[i]) for i in (0, 1))  # pop: each is as large as an input
    return z_s, z_t, [shift, mean, norm, scale]


def _norm_and_scale(squares: Tensor, rows: int, eps: float) -> tuple[Tensor, Tensor]:
    """The norms n and r = 1 / (n + eps sqrt(B)); a dead column is 0, so its norm only has to be positive."""
    squares = squares.clamp_min(torch.finfo(squares.dtype).tiny)
    norm = squares.sqrt()
    # Over n^2 + eps sqrt(B) n, as inf / inf is NaN: an overflow must show, and not pass for a dead column.
    # Not as torch.add(..., alpha=...): a compiler that keeps eps as a symbol would have to start over.
    return norm, norm / (squares + norm * (eps * rows**0.5))


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = tensors[0].shape[0]
    long = tensors[0].device.type == "cpu" and rows > _BLOCK_ROWS // 2
    size = min(_BLOCK_ROWS, rows // 2 + 1) if long else rows
    return list(zip(*(torch.split(x, size) for x in tensors), strict=True))


def _correlate_in_blocks(
    student: Tensor, teacher: Tensor, eps: float, dtype: torch.dtype, shard: Shard | None
) -> tuple[Stats, Tensor]:
    """The statistics and P (D, D), from one pass over C = X - shift."""
    moments = _moments_op if torch.compiler.is_compiling() else _moments
    shift, sums, squares, p = moments(student, teacher, dtype)
    rows = student.shape[0]
    mean = sums / rows
    squares = torch.addcmul(squares, sums, mean, value=-1)
    p = torch.addr(p, sums[1], mean[0], alpha=-1)
    if shard is not None:
        mean_offset, squares, p = merge_over_processes(shard, rows, shift.double() + mean, squares, p)
        mean, rows = mean - mean_offset, shard.rows
    norm, scale = _norm_and_scale(squares, rows, eps)
    return [shift, mean, norm, scale], p * scale[1].unsqueeze(1) * scale[0]


def _moments(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A shift near the means (2, D), then of C = X - shift the sums and the sums of squares (2, D), and Ct' Cs (D, D).

    One shift serves all blocks. It is the mean of rows from all over the batch, so it leaves little of the mean to
    cancel; and it is exactly the value of a constant column.
    """
    some = [x[:: 1 + len(x) // 64].to(statistics_dtype(student, teacher)) for x in (student, teacher)]
    shift = torch.stack([x[0] + (x - x[0]).mean(dim=0) for x in some])
    total: list[Any] = [0, 0, 0]
    for x, y in _blocks(student, teacher):
        total = [before + own for before, own in zip(total, _block_moments(x, y, shift, dtype), strict=True)]
    sums, squares, p = total
    return shift, sums, squares, p


def _block_moments(student: Tensor, teacher: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    c_s, c_t = student.to(shift.dtype) - shift[0], teacher.to(shift.dtype) - shift[1]
    sums = torch.stack([c_s.sum(dim=0), c_t.sum(dim=0)])
    squares = torch.stack([c_s.square().sum(dim=0), c_t.square().sum(dim=0)])
    return sums, squares, torch.mm(c_t.to(dtype).T, c_s.to(dtype)).to(shift.dtype)


def _apply_in_blocks(
    student: Tensor, teacher: Tensor, a: Tensor, g: Tensor, u: Tensor, statistics: Stats, shard: Shard | None = None
) -> Tensor:
    """The student's gradient u o (r o M - g o Zs) with M = Zt A, block by block."""
    shift, mean, norm, scale = statistics
    offset, half = mean * scale, a.dtype != u.dtype

    def standardise(x: Tensor, side: int) -> Tensor:
        return (x.to(u.dtype) - shift[side]).mul_(scale[side]).sub_(offset[side])

    grad, dot = torch.empty_like(student), torch.zeros_like(g)
    blocks = _blocks(grad, student, teacher)
    if half:  # g comes from the product as it was rounded, so that two large terms of a row far out cancel
        for out, x, y in blocks:
            out.copy_(torch.mm(standardise(y, 1).to(a.dtype), a))
            dot += standardise(x, 0).mul_(out).sum(dim=0)
        g = sum_over_rows(dot, shard) / norm[0]
    u_scale, u_g = u * scale[0], u * g
    in_place = grad.dtype == a.dtype and not torch.is_grad_enabled()
    for out, x, y in blocks:
        m = out.to(u.dtype) if half else torch.mm(standardise(y, 1), a, out=out if in_place else None)
        m.mul_(u_scale).addcmul_(standardise(x, 0), u_g, value=-1)
        if m is not out:
            out.copy_(m)
    return grad


# A compiler would unroll the blocks and give each its own memory. As operators they run as they stand, in 0.7 of the
# time of the plain formula compiled at 25,088 x 384.
_moments_op = torch.library.custom_op("rsd_loss::moments", _moments, mutates_args=())
_APPLY = "(Tensor student, Tensor teacher, Tensor a, Tensor g, Tensor u, Tensor[] statistics) -> Tensor"
_apply_op = torch.library.custom_op("rsd_loss::apply", _apply_in_blocks, mutates_args=(), schema=_APPLY)
_apply_op.register_fake(lambda student, *_: torch.empty_like(student))
_moments_op.register_fake(
    lambda x, y, _: tuple(x.new_empty(n, x.shape[1], dtype=statistics_dtype(x, y)) for n in (2, 2, 2, x.shape[1]))
)
_apply_op.register_autograd(raise_no_second_derivative)
