"""The three steps as Triton kernels: moments -> small product -> apply; the products are torch.mm.

With n the norm of a centred column c and z = c / (n + eps sqrt(B)) the column as stored, in the dtype of the products,

    M = Zt Zt' Zs = (Zt Zt') Zs  [wide]  = Zt (Zt' Zs)  [tall]
    d = colsum(Zt o Zs)     q = colsum(M o Zs) = colsum(P o P)     off = q - d^2     e = d - 1
    dL/dXs = 2 u o [ (kappa M + (e - kappa d) o Zt) / (n + eps sqrt(B)) - (kappa off + e d) o Zs / n ]

and u the upstream gradient of the D losses. One launch each: [moments,] standardise, two products, columns (d, off and
the losses) and gradient; the caller's sum is the seventh at most.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rsd_loss import _fused
from rsd_loss._common import no_autocast, product_dtype, refuse_second_derivative
from rsd_loss._distributed import Losses, Shard, merge_over_processes, sum_over_features, sum_over_rows

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # why_unavailable says so, and the kernels below stay plain functions that nothing calls
    triton = None

# The tile of every kernel. 32 columns are a 128-byte line of float32 and two 32-byte sectors of float16.
_BLOCK_R, _BLOCK_C = 32, 32
# Batches of more than _ROWS rows have their moments taken in parts, at most _PARTS of them (a power of two).
_ROWS, _PARTS = 512, 64


def why_unavailable(*embeddings: Tensor) -> str | None:
    """Why these embeddings cannot go through the kernels, or None if they can; looks at metadata only."""
    if triton is None:
        return "triton is not installed (it comes with PyTorch's CUDA builds for Linux)"
    for x in embeddings:
        if x.dtype == torch.float64:
            return 'its kernels keep float32 statistics, and an embedding is float64: use implementation="fused"'
        if not (x.is_cuda or _INTERPRETED):
            return (
                f"it needs CUDA tensors and got one on {x.device} "
                "(TRITON_INTERPRET=1, set before Python starts, interprets the kernels on any device, slowly)"
            )
    return None


def feature_losses(student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None) -> Losses:
    """Same contract as reference.feature_losses, in float32.

    Keeps until backward, in the dtype of the products (that of autocast, else of the embeddings), both standardised
    embeddings and P, or M if D exceeds B.
    """
    batch, features = student.shape
    if torch.is_grad_enabled() and teacher.requires_grad:  # the rare case, which has no kernels
        return _fused.feature_losses(student, teacher, kappa, eps, shard)
    gradient = torch.is_grad_enabled() and student.requires_grad
    # A (D, D) product costs B D^2 and a (B, B) or (B, B) x (B, D) one B^2 D; the wide side needs two for the value.
    tall = features * (1 + gradient) <= 2 * batch if shard is None else shard.by_rows
    args = (student, teacher, float(kappa), float(eps), tall, shard)
    # Triton launches on the current device, which need not be the tensors'; compiled code sees to that itself.
    on_device = student.is_cuda and not torch.compiler.is_compiling()
    with torch.cuda.device(student.device) if on_device else nullcontext():
        return _FeatureLosses.apply(*args) if gradient else _forward(*args)[:3]


class _FeatureLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, kappa: float, eps: float, tall: bool, shard: Shard | None
    ) -> Losses:
        losses, d, off, z, stats, product = _forward(student, teacher, kappa, eps, tall, shard)
        if not torch.compiler.is_compiling():  # spares two launches that fill zeros; the compiler drops them unasked
            ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(d, off)
        ctx.save_for_backward(d, off, z, stats, product, student)
        ctx.kappa, ctx.tall = kappa, tall
        return losses, d, off

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, None, None
        d, off, z, stats, product, student = ctx.saved_tensors
        compiling = torch.compiler.is_compiling()
        # The products keep the dtype that forward gave them, whatever autocast is around backward().
        with torch.set_grad_enabled(compiling), no_autocast(z.device.type):
            if compiling:
                upstream = refuse_second_derivative(upstream, student)
            m = torch.mm(z[1], product) if ctx.tall else product
            grad = torch.empty(m.shape, dtype=student.dtype, device=z.device)
            # The compiler traces this with strides that the upstream need not have when it runs.
            u = upstream.contiguous() if compiling else upstream
            stride = 1 if compiling else u.stride(0)
            grid = (-(-m.shape[0] // _BLOCK_R) * -(-m.shape[1] // _BLOCK_C),)
            args = (u, stride, m, d, off, z, stats, grad, *m.shape, ctx.kappa)
            _gradient[grid](*args, block_r=_BLOCK_R, block_c=_BLOCK_C)
        if torch.is_grad_enabled() and not compiling:
            grad = refuse_second_derivative(grad, upstream, student)
        return grad, None, None, None, None, None


def _forward(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, tall: bool, shard: Shard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses, d and off; then both z, stats = 1 / (n + eps sqrt(B)) and 1 / n, and P (tall) or M (wide)."""
    (batch, features), device = student.shape, student.device
    by_rows = shard is not None and shard.by_rows
    most = 1 if by_rows else min(_PARTS, -(-batch // _ROWS))
    chunk = -(-batch // (most * _BLOCK_R)) * _BLOCK_R
    parts = -(-batch // chunk)
    grid = (-(-features // _BLOCK_C), parts, 2)
    blocks = {"block_r": _BLOCK_R, "block_c": _BLOCK_C}
    inputs = (student, teacher, *student.stride(), *teacher.stride())
    z = torch.empty((2, batch, features), dtype=product_dtype(student, teacher), device=device)
    stats = torch.empty((2, 2, features), dtype=torch.float32, device=device)
    separate = parts > 1 or by_rows
    moments = torch.empty((2, parts, 2, features), dtype=torch.float32, device=device) if separate else stats
    if separate:
        _moments[grid](*inputs, moments, batch, features, chunk, **blocks)
    if shard is not None and by_rows:
        means, squares = moments[:, 0].unbind(dim=1)
        own = torch.stack((student[0].double(), teacher[0].double())) + means
        mean_offset, squares, _ = merge_over_processes(shard, batch, own, squares)
        moments.copy_(torch.stack((means - mean_offset, squares), dim=1).unsqueeze(1))
    all_rows, max_parts = batch if shard is None else shard.rows, _PARTS if separate else 0
    _standardise[grid](
        *inputs, moments, z, stats, batch, features, chunk, eps * all_rows**0.5, max_parts=max_parts, **blocks
    )
    if tall:
        product = sum_over_rows(torch.mm(z[1].T, z[0]), shard).to(z.dtype)
    else:
        product = torch.mm(sum_over_features(torch.mm(z[1], z[1].T), shard).to(z.dtype), z[0])
    losses = torch.empty(features, dtype=torch.float32, device=device)
    d, off = torch.empty_like(losses), torch.empty_like(losses)
    _columns[grid[:1]](product, z, losses, d, off, batch, features, kappa, tall=tall, **blocks)
    return losses, d, off, z, stats, product


def _jit(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _merge(count, mean, m2):  # type: ignore[no-untyped-def]
    """Chan's formula along axis 0: the mean of all, and the sum of squares about it."""
    mean_of_all = tl.sum(count * mean, axis=0) / tl.sum(count, axis=0)
    mean_offset = mean - mean_of_all[None, :]
    return mean_of_all, tl.sum(m2 + count * mean_offset * mean_offset, axis=0)


@_jit
def _deviations(x_ptr, row_stride, col_stride, rows, cols, row_mask, col_mask):  # type: ignore[no-untyped-def]
    """A tile less the first row: a constant column becomes exactly 0, and a large offset costs no digits."""
    at = x_ptr + cols.to(tl.int64) * col_stride
    first = tl.load(at, mask=col_mask, other=0.0).to(tl.float32)
    inside = row_mask[:, None] & col_mask[None, :]
    x = tl.load(at[None, :] + rows[:, None].to(tl.int64) * row_stride, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, x - first[None, :], 0.0)


@_jit
def _moments_of(x_ptr, row_stride, col_stride, lo, hi, cols, col_mask, block_r: tl.constexpr, block_c: tl.constexpr):  # type: ignore[no-untyped-def]
    """Welford's recurrence on every lane of the tile, in one read; then the lanes of each column are merged."""
    count = tl.zeros([block_r], dtype=tl.float32)
    mean = tl.zeros([block_r, block_c], dtype=tl.float32)
    m2 = tl.zeros([block_r, block_c], dtype=tl.float32)
    for start in range(lo, hi, block_r):
        rows = start + tl.arange(0, block_r)
        x = _deviations(x_ptr, row_stride, col_stride, rows, cols, rows < hi, col_mask)
        count += (rows < hi).to(tl.float32)
        step = tl.where((rows < hi)[:, None], x - mean, 0.0)
        mean += step * (1.0 / tl.maximum(count, 1.0))[:, None]
        m2 += step * (x - mean)
    return _merge(count[:, None], mean, m2)


@_jit
def _moments(  # type: ignore[no-untyped-def]
    student_ptr, teacher_ptr, s_row, s_col, t_row, t_col, moments_ptr, batch, features, chunk,
    block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Writes moments (2, parts, 2, D): for each input and chunk of rows, the mean and the sum of squares about it.

    One program takes one chunk, one block of columns and one input, and reads its values once.
    """
    which = tl.program_id(2)
    cols = tl.program_id(0) * block_c + tl.arange(0, block_c)
    col_mask = cols < features
    lo = tl.program_id(1) * chunk
    hi = tl.minimum(lo + chunk, batch)
    if which == 0:
        mean, m2 = _moments_of(student_ptr, s_row, s_col, lo, hi, cols, col_mask, block_r, block_c)
    else:
        mean, m2 = _moments_of(teacher_ptr, t_row, t_col, lo, hi, cols, col_mask, block_r, block_c)
    at = moments_ptr + (which * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 2 * features + cols
    tl.store(at, mean, mask=col_mask)
    tl.store(at + features, m2, mask=col_mask)


@_jit
def _standardise(  # type: ignore[no-untyped-def]
    student_ptr, teacher_ptr, s_row, s_col, t_row, t_col, moments_ptr, z_ptr, stats_ptr, batch, features,
    chunk, eps_norm, max_parts: tl.constexpr, block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Writes z (2, B, D) and stats (2, 2, D) = 1 / (n + eps_norm) and 1 / n (0 for a dead column), student first.

    One program takes one chunk of rows, one block of columns and one input. It merges the moments of all chunks or,
    where there is one chunk only, computes them itself; eps_norm is eps sqrt(B), with B the rows of all processes.
    """
    side = tl.program_id(2)
    moments_ptr += side * tl.num_programs(1).to(tl.int64) * 2 * features
    z_ptr += side * batch.to(tl.int64) * features
    stats_ptr += side * 2 * features
    cols = tl.program_id(0) * block_c + tl.arange(0, block_c)
    col_mask = cols < features
    lo = tl.program_id(1) * chunk
    hi = tl.minimum(lo + chunk, batch)
    for teacher in tl.static_range(2):  # as their dtypes may differ, the compiler must know which it is
        if side == teacher:
            x_ptr = teacher_ptr if teacher else student_ptr
            x_row = t_row if teacher else s_row
            x_col = t_col if teacher else s_col
            if max_parts > 0:
                part = tl.arange(0, max_parts)
                count = tl.minimum(tl.maximum(batch - part * chunk, 0), chunk)
                inside = (count > 0)[:, None] & col_mask[None, :]
                first = moments_ptr + part[:, None].to(tl.int64) * 2 * features + cols[None, :]
                part_mean = tl.load(first, mask=inside, other=0.0)
                part_m2 = tl.load(first + features, mask=inside, other=0.0)
                mean, m2 = _merge(count[:, None].to(tl.float32), part_mean, part_m2)
            else:
                mean, m2 = _moments_of(x_ptr, x_row, x_col, lo, hi, cols, col_mask, block_r, block_c)
            norm = tl.where(m2 < float("inf"), tl.sqrt(m2), float("nan"))  # an overflow must show
            scale = 1.0 / (norm + eps_norm)
            if tl.program_id(1) == 0:
                tl.store(stats_ptr + cols, scale, mask=col_mask)
                tl.store(stats_ptr + features + cols, 1.0 / tl.where(norm == 0, float("inf"), norm), mask=col_mask)
            for start in range(lo, hi, block_r):
                rows = start + tl.arange(0, block_r)
                x = _deviations(x_ptr, x_row, x_col, rows, cols, rows < hi, col_mask)
                z = (x - mean[None, :]) * scale[None, :]
                at = z_ptr + rows[:, None].to(tl.int64) * features + cols[None, :]
                tl.store(at, z.to(z_ptr.dtype.element_ty), mask=(rows < hi)[:, None] & col_mask[None, :])


@_jit
def _columns(  # type: ignore[no-untyped-def]
    product_ptr, z_ptr, losses_ptr, d_ptr, off_ptr, batch, features, kappa,
    tall: tl.constexpr, block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Writes the losses, d and off (D,), from P alone where tall, and from M and both z where wide.

    One program takes one block of columns and walks down all its rows, so that no sum needs a second launch.
    """
    cols = tl.program_id(0) * block_c + tl.arange(0, block_c)
    col_mask = cols < features
    d_sum = tl.zeros([block_r, block_c], dtype=tl.float32)
    q_sum = tl.zeros([block_r, block_c], dtype=tl.float32)
    height = features if tall else batch
    for start in range(0, height, block_r):
        rows = start + tl.arange(0, block_r)
        inside = (rows < height)[:, None] & col_mask[None, :]
        at = rows[:, None].to(tl.int64) * features + cols[None, :]
        product = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if tall:
            d_sum += tl.where(rows[:, None] == cols[None, :], product, 0.0)
            q_sum += product * product
        else:
            z_s = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
            z_t = tl.load(z_ptr + batch.to(tl.int64) * features + at, mask=inside, other=0.0).to(tl.float32)
            d_sum += z_t * z_s
            q_sum += product * z_s
    d = tl.sum(d_sum, axis=0)
    off = tl.sum(q_sum, axis=0) - d * d
    tl.store(losses_ptr + cols, (d - 1) * (d - 1) + kappa * off, mask=col_mask)
    tl.store(d_ptr + cols, d, mask=col_mask)
    tl.store(off_ptr + cols, off, mask=col_mask)


@_jit
def _gradient(  # type: ignore[no-untyped-def]
    upstream_ptr, upstream_stride, m_ptr, d_ptr, off_ptr, z_ptr, stats_ptr, grad_ptr, batch, features,
    kappa, block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Writes the student's gradient, one program a tile.

    All is float32 until the last store, so an upstream gradient of 65,536 never meets half precision.
    """
    column_blocks = tl.cdiv(features, block_c)
    cols = tl.program_id(0) % column_blocks * block_c + tl.arange(0, block_c)
    rows = tl.program_id(0) // column_blocks * block_r + tl.arange(0, block_r)
    col_mask = cols < features
    u = tl.load(upstream_ptr + cols.to(tl.int64) * upstream_stride, mask=col_mask, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + cols, mask=col_mask, other=0.0)
    off = tl.load(off_ptr + cols, mask=col_mask, other=0.0)
    scale = tl.load(stats_ptr + cols, mask=col_mask, other=0.0)
    inverse_norm = tl.load(stats_ptr + features + cols, mask=col_mask, other=0.0)
    w = (1.0 - kappa) * d - 1.0
    g = (kappa * off + (d - 1.0) * d) * inverse_norm
    inside = (rows < batch)[:, None] & col_mask[None, :]
    at = rows[:, None].to(tl.int64) * features + cols[None, :]
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z_s = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z_t = tl.load(z_ptr + batch.to(tl.int64) * features + at, mask=inside, other=0.0).to(tl.float32)
    grad = 2.0 * u[None, :] * (scale[None, :] * (kappa * m + w[None, :] * z_t) - g[None, :] * z_s)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


_INTERPRETED = triton is not None and not isinstance(_gradient, triton.JITFunction)
