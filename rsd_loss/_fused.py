"""The loss and its gradient through the smaller of two products, in plain torch: moments, small product, apply.

With Z the centred columns over their norm n plus eps sqrt(B), r = 1 / (n + eps sqrt(B)) and P = Zt' Zs,

    loss_j = e_j^2 + kappa off_j,    e_j = P_jj - 1,    off_j = sum_{i != j} P_ij^2

Both vectors, and M = dL/dZs, follow from Zt Zt' Zs, which can be multiplied in either order:

    wide, B < D:   K = Zt Zt' (B, B),  R = K Zs - P_jj o Zt,  off = colsum(R o Zs),          M = 2 kappa R + 2 e o Zt
    tall, D <= B:  P = Zt' Zs (D, D),                         off = colsum(P o P) - P_jj^2,  M = 2 Zt A
                                                              with A = kappa P off the diagonal and e on it

and through the standardisation, with u the upstream gradient of the losses,

    dL/dXs = u o (r o M - pull o Zs),    pull = colsum(M o Zs) / n = 2 (kappa off + e P_jj) / n

Centred columns sum to zero, so nothing flows through the mean. For the teacher the roles swap, and u stands inside the
product. Statistics and vectors are float32 or better, products in the dtype of the input or of autocast.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rsd_loss._common import autocasts, once_differentiable, product_dtype, statistics_dtype
from rsd_loss._distributed import Shard, merge_over_processes, sum_over_features, sum_over_rows

# On a CPU a tall input of more rows than half of this is worked on in blocks of at most so many rows, whose temporaries
# stay in cache: in one block it takes 1.1 to 1.4 times as long from 4,096 rows on, and two to four times the memory.
_BLOCK_ROWS = 1024


def feature_losses(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as reference.feature_losses."""
    # The value alone takes 2 B D^2 operations or 4 B^2 D; with a gradient, below, it is 4 B D^2 or 4 B^2 D.
    tall = student.shape[1] <= 2 * student.shape[0] if shard is None else shard.by_rows
    gradient = torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad)
    function = _FeatureLosses.apply if gradient else _tall if tall else _wide
    losses, d, off = function(student, teacher, kappa, eps, shard)
    return losses, d, off


class _FeatureLosses(torch.autograd.Function):
    """Saves the student's gradient for an upstream of ones if wide, else A and the vectors it is applied with."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tall = student.shape[1] <= student.shape[0] if shard is None else shard.by_rows
        ctx.settings = kappa, eps, shard
        forward, wanted = (_tall, True) if ctx.tall else (_wide, ctx.needs_input_grad[0])
        losses, d, off, *saved = forward(student, teacher, kappa, eps, shard, gradient=wanted)
        inputs = [student, teacher if ctx.tall or ctx.needs_input_grad[1] else student]
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # spares two launches that fill zeros; the compiler drops them unasked
            inputs = [x.clone() if x.is_inference() else x for x in inputs]  # which could not be saved
        ctx.mark_non_differentiable(d, off)
        ctx.save_for_backward(*inputs, *saved)
        return losses, d, off

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if u is None:
            return None, None, None, None, None
        student, teacher, *saved = ctx.saved_tensors  # once: activation checkpointing hands each out a single time
        grads: list[Tensor | None] = [None, None]
        # The autocast of the forward is in the saved dtypes; that around backward(), if any, must change nothing.
        device = u.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            if ctx.needs_input_grad[0]:
                grad = _tall_gradient(ctx, u, student, teacher, *saved) if ctx.tall else saved[0] * u
                grads[0] = grad.to(student.dtype)
            if ctx.needs_input_grad[1]:
                grads[1] = _teacher_gradient(ctx, u, student, teacher, *saved).to(teacher.dtype)
        return *once_differentiable(grads, u, student, teacher), None, None, None


def _wide(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None, gradient: bool = False
) -> tuple[Tensor, ...]:
    """The losses, P_jj and off; then, if wanted, the student's gradient for an upstream of ones."""
    dtype = product_dtype(student, teacher)
    z_s, z_t, _, norm, scale = _standardise(student, teacher, eps, shard)
    left = z_t.to(dtype)
    k = sum_over_features(torch.mm(left, left.T), shard).to(dtype)
    d = (z_t * z_s).sum(dim=0)
    r = torch.addcmul(torch.mm(k, z_s.to(dtype)).to(d.dtype), z_t, d, value=-1)
    e, off = d - 1, (r * z_s).sum(dim=0)
    penalty = kappa * off
    losses = torch.addcmul(penalty, e, e)
    if not gradient:
        return losses, d, off
    m = r.mul_(2 * kappa).addcmul_(z_t, e, value=2)
    # In half precision two large terms of a row far out cancel only if the second is taken from the first as rounded.
    pull = torch.addcmul(penalty, e, d) if dtype == m.dtype else (m * z_s).sum(dim=0) / 2
    return losses, d, off, m.mul_(scale[0]).addcmul_(z_s, pull / norm[0], value=-2)


def _tall(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None, gradient: bool = False
) -> tuple[Tensor, ...]:
    """The losses, P_jj and off; then, if wanted, A and what it is applied with."""
    dtype, rows = product_dtype(student, teacher), student.shape[0] if shard is None else shard.rows
    # By the rows of all processes, of which each must do the same. Centred columns need not suit the range of float16.
    if blocks := student.device.type == "cpu" and rows > _BLOCK_ROWS // 2 and dtype != torch.float16:
        moments = _moments_op if torch.compiler.is_compiling() else _moments
        shift, sums, squares, p = moments(student, teacher, dtype)
        mean = sums / student.shape[0]
        squares = torch.addcmul(squares, sums, mean, value=-1)
        p.addr_(sums[1], mean[0], alpha=-1)
        if shard is not None:
            apart, squares, p = merge_over_processes(shard, student.shape[0], shift.double() + mean, squares, p)
            mean = mean - apart
        norm, scale = _norm_and_scale(squares, rows, eps)
        p.mul_(scale[1].unsqueeze(1)).mul_(scale[0])
        about = torch.stack([shift, mean])
    else:
        z_s, z_t, means, norm, scale = _standardise(student, teacher, eps, shard)
        p = sum_over_rows(torch.mm(z_t.to(dtype).T, z_s.to(dtype)).to(norm.dtype), shard)
        about = torch.stack(means)
    d = p.diagonal().clone()
    e, off = d - 1, torch.addcmul(p.square().sum(dim=0), d, d, value=-1)
    penalty = kappa * off
    losses = torch.addcmul(penalty, e, e)
    if not gradient:
        return losses, d, off
    a = kappa * p
    a.diagonal().copy_(e)
    if blocks:  # what follows is of centred columns then
        a.mul_(scale[1].unsqueeze(1))
    return losses, d, off, a.to(dtype), about, norm, scale, torch.addcmul(penalty, e, d) / norm[0]


def _tall_gradient(ctx: Any, u: Tensor, student: Tensor, teacher: Tensor, *saved: Tensor) -> Tensor:
    a, about, norm, scale, pull = saved
    if about.ndim == 3 and not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(u):
        return u * _tall_gradient(ctx, torch.ones_like(pull), student, teacher, *saved)  # for is_grads_batched=True
    shard, half, u = ctx.settings[2], a.dtype != u.dtype, 2 * u
    if about.ndim == 3:  # in blocks
        args = student, teacher, about, a, u * scale[0], scale[0] / norm[0] if half else pull, half
        return _apply_op(*args) if torch.compiler.is_compiling() else _apply(*args, shard)
    z_s, z_t = ((x.to(u.dtype) - x[0]).sub_(about[i]).mul_(scale[i]) for i, x in enumerate((student, teacher)))
    m = torch.mm(z_t.to(a.dtype), a) * u
    return _through_standardisation(m, z_s, norm[0], scale[0], shard, None if half else u * pull)


def _teacher_gradient(ctx: Any, u: Tensor, student: Tensor, teacher: Tensor, *saved: Tensor) -> Tensor:
    """The rare case: the roles swap, and u stands inside the product."""
    kappa, eps, shard = ctx.settings
    z_s, z_t, _, norm, scale = _standardise(student, teacher, eps, shard)
    if ctx.tall:
        a, about, *_ = saved
        m = torch.mm(z_s, (a / scale[1].unsqueeze(1) if about.ndim == 3 else a).mul(2 * u).T)
    else:
        inner = sum_over_features(torch.mm(z_s * u, z_s.T), shard)
        m = 2 * kappa * torch.mm(inner, z_t) + z_s * (2 * u * ((1 - kappa) * (z_t * z_s).sum(dim=0) - 1))
    return _through_standardisation(m, z_t, norm[1], scale[1], shard)


def _standardise(student: Tensor, teacher: Tensor, eps: float, shard: Shard | None) -> tuple[Any, ...]:
    """Both Z (B, D); a list of both means less the first row; both norms and both scales r (2, D)."""
    (rows, features), full = student.shape, statistics_dtype(student, teacher)
    squares, means, z = student.new_empty(2, features, dtype=full), [], []
    for side, x in enumerate((student, teacher)):
        x = x.to(full)
        # An offset of 1e4 deviations would leave a rounded mean few digits, and a constant column some.
        c = x - x[0]
        means.append(c.mean(dim=0))
        c -= means[side]
        torch.sum(c * c, dim=0, out=squares[side])
        z.append(c)
    if shard is not None and shard.by_rows:
        own = torch.stack([student[0].double() + means[0], teacher[0].double() + means[1]])
        apart, squares, _ = merge_over_processes(shard, rows, own, squares)
        means, z, rows = [means[i] - apart[i] for i in (0, 1)], [z[i] + apart[i] for i in (0, 1)], shard.rows
    norm, scale = _norm_and_scale(squares, rows, eps)
    return z[0].mul_(scale[0]), z[1].mul_(scale[1]), means, norm, scale


def _norm_and_scale(squares: Tensor, rows: int, eps: float) -> tuple[Tensor, Tensor]:
    """The norms n and r = 1 / (n + eps sqrt(B)). Of a dead column, which is 0, n may be anything else."""
    norm = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
    return norm, (norm + eps * rows**0.5).reciprocal()


def _through_standardisation(
    m: Tensor, z: Tensor, norm: Tensor, scale: Tensor, shard: Shard | None, pull: Tensor | None = None
) -> Tensor:
    """The gradient dL/dX from M = dL/dZ; pull is colsum(M o Z) / n where it is not known."""
    if pull is None:
        pull = sum_over_rows((m * z).sum(dim=0), shard) / norm
    return (m * scale).addcmul_(z, pull, value=-1)


def _blocks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    size = min(_BLOCK_ROWS, tensors[0].shape[0] // 2 + 1)
    return list(zip(*(torch.split(x, size) for x in tensors), strict=True))


def _moments(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A shift near the means (2, D), then of C = X - shift the sums and the sums of squares (2, D), and Ct' Cs (D, D).

    One shift for all blocks spares a pass over each. As the mean of rows from all over the batch, it leaves little of
    the mean to cancel; and it is exactly the value of a constant column.
    """
    (rows, features), full = student.shape, statistics_dtype(student, teacher)
    some = [x[:: 1 + rows // 64].to(full) for x in (student, teacher)]
    shift = torch.stack([x[0] + (x - x[0]).mean(dim=0) for x in some])
    sums, squares, p = (student.new_zeros(n, features, dtype=full) for n in (2, 2, features))
    for block in _blocks(student, teacher):
        centred: list[Tensor] = []
        for side, x in enumerate(block):
            c = x.to(full) - shift[side]
            sums[side] += c.sum(dim=0)
            squares[side] += (c * c).sum(dim=0)
            centred.append(c.to(dtype))
        if dtype == full:
            p.addmm_(centred[1].T, centred[0])
        else:
            p += torch.mm(centred[1].T, centred[0])
    return shift, sums, squares, p


def _apply(
    x: Tensor,
    y: Tensor,
    about: Tensor,
    a: Tensor,
    scale: Tensor,
    pull: Tensor,
    measured: bool,
    shard: Shard | None = None,
) -> Tensor:
    """The gradient scale o (Cy a - pull o Cx), C = X - shift - mean; if measured, pull is times colsum(Cy a o Cx).

    Half precision measures, and from the product as it was rounded: else two large terms of a row far out would not
    cancel. about is (2, 2, D): the shifts of x and y, then what they leave of the means.
    """
    shift, mean = about
    full, grad, dot = scale.dtype, torch.empty_like(x), torch.zeros_like(scale)
    from_mean = torch.mv(a.T.to(full), mean[1])  # what Cy a has too much for lack of the mean
    of_c = scale * pull
    constant = torch.addcmul(of_c * mean[0], from_mean, scale, value=-1)
    blocks = _blocks(grad, x, y)

    def finish(g: Tensor, x: Tensor, m: Tensor) -> None:
        m = m.to(full)
        m = torch.addcmul(constant, m, scale, out=m).addcmul_(x.to(full) - shift[0], of_c, value=-1)
        g.copy_(m)  # which does nothing where they are one

    for g, x_rows, y_rows in blocks:
        out = g if g.dtype == a.dtype else None
        m = torch.mm((y_rows.to(full) - shift[1]).to(a.dtype), a, out=out)
        if measured:
            g.copy_(m - from_mean)
            dot += (x_rows.to(full) - shift[0]).sub_(mean[0]).mul_(g).sum(dim=0)
        else:
            finish(g, x_rows, m)
    if measured:
        of_c = of_c * sum_over_rows(dot, shard)
        constant = of_c * mean[0]
        for g, x_rows, _ in blocks:
            finish(g, x_rows, g)
    return grad


# A compiler would unroll the blocks and give each its own memory. As operators they run as they stand, in 0.7 of the
# time of the plain formula compiled at 25,088 x 384.
_moments_op = torch.library.custom_op("rsd_loss::moments", _moments, mutates_args=())
_APPLY = "(Tensor x, Tensor y, Tensor about, Tensor a, Tensor scale, Tensor pull, bool measured) -> Tensor"
_apply_op = torch.library.custom_op("rsd_loss::apply", _apply, mutates_args=(), schema=_APPLY)
_apply_op.register_fake(lambda x, *_: torch.empty_like(x))
_moments_op.register_fake(
    lambda x, y, _: tuple(x.new_empty(n, x.shape[1], dtype=statistics_dtype(x, y)) for n in (2, 2, 2, x.shape[1]))
)
