"""The three steps as Triton kernels: moments -> small product -> apply; the two products are torch.mm.

Notation: c is a centred column, n its length, z = scale * c / (n + eps sqrt(B)) the stored standardised column. Unit
columns take up the 1/B of P = Zt' Zs / B, so that no product of half-precision operands leaves the range of float16;
scale = sqrt(min(1, B / D)) does the same for the (B, B) Gram matrix, whose trace it bounds by B. With ``grow`` =
1 / scale^2 = max(1, D / B), and M the product of three stored matrices,

    M = Zt Zt' Zs = (Zt Zt') Zs  [wide]  = Zt (Zt' Zs)  [tall]
    d = grow colsum(Zt o Zs)      q = grow^2 colsum(M o Zs) = grow^2 colsum(P o P)      off = q - d^2
    dL/dXs = 2 u / scale o [ (kappa grow M + (e - kappa d) o Zt) / (n + eps sqrt(B)) - (kappa off + e d) o Zs / n ]

where e = d - 1 and u is the gradient of the caller's scalar in the D losses. One launch each: [moments,] standardise,
two products, columns (d, off and the losses) and gradient; the caller's sum is the seventh at most.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rsd_loss._common import autocasts, once_differentiable, product_dtype
from rsd_loss._distributed import Shard, merge_over_processes, sum_over_features, sum_over_rows

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:  # unavailable() says so, and the kernels below stay plain functions that nothing calls
    triton = None

# The tile of every kernel. 32 columns are a 128-byte line of float32 and two 32-byte sectors of float16.
_BLOCK_R, _BLOCK_C = 32, 32
# Batches of more than _ROWS rows have their moments taken in parts, at most _PARTS of them (a power of two).
_ROWS, _PARTS = 512, 64


def unavailable(*embeddings: Tensor) -> str | None:
    """Why these embeddings cannot go through the kernels, or None if they can; looks at metadata only."""
    if not _INSTALLED:
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


def feature_losses(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as reference.feature_losses, in float32.

    Keeps until backward, in the dtype of the products (that of autocast, else of the embeddings), both standardised
    embeddings and P, or M if D exceeds B.
    """
    batch, features = student.shape
    student_grad = torch.is_grad_enabled() and student.requires_grad
    teacher_grad = torch.is_grad_enabled() and teacher.requires_grad
    # A (D, D) product costs B D^2 and a (B, B) or (B, B) x (B, D) one B^2 D; the wide side needs two for the value.
    tall = features * (1 + student_grad + teacher_grad) <= batch * (2 + 2 * teacher_grad)
    if shard is not None:
        tall = shard.by_rows
    args = (student, teacher, float(kappa), float(eps), tall, shard)
    # Triton launches on the current device, which need not be the tensors'; compiled code sees to that itself.
    on_device = student.is_cuda and not torch.compiler.is_compiling()
    with torch.cuda.device(student.device) if on_device else nullcontext():
        if student_grad or teacher_grad:
            return _FeatureLosses.apply(*args)  # type: ignore[no-any-return]
        return _forward(*args)[:3]


class _FeatureLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, kappa: float, eps: float, tall: bool, shard: Shard | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, d, off, z, stats, product = _forward(student, teacher, kappa, eps, tall, shard)
        if not torch.compiler.is_compiling():  # spares two launches that fill zeros; the compiler drops them unasked
            ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(d, off)
        # An embedding without a gradient may come from torch.inference_mode, and could not be saved.
        inputs = [x for x, wanted in zip((student, teacher), ctx.needs_input_grad[:2], strict=True) if wanted]
        ctx.save_for_backward(d, off, z, stats, product, *inputs)
        ctx.kappa, ctx.tall, ctx.shard, ctx.dtypes = kappa, tall, shard, (student.dtype, teacher.dtype)
        return losses, d, off

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return None, None, None, None, None, None
        d, off, z, stats, product, *inputs = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        # The products keep the dtype that forward gave them, whatever autocast is around backward().
        device = z.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            if ctx.needs_input_grad[0]:
                m = torch.mm(z[1], product) if ctx.tall else product
                _, batch, features = z.shape
                grads[0] = torch.empty((batch, features), dtype=ctx.dtypes[0], device=z.device)
                # The compiler traces this with strides that the upstream need not have when it runs.
                u = upstream.contiguous() if torch.compiler.is_compiling() else upstream
                stride = 1 if torch.compiler.is_compiling() else u.stride(0)
                sizes = (batch, features, *_whole(z, ctx.shard))
                grid = (-(-batch // _BLOCK_R) * -(-features // _BLOCK_C),)
                args = (u, stride, m, d, off, z, stats, grads[0], *sizes, ctx.kappa)
                _gradient[grid](*args, block_r=_BLOCK_R, block_c=_BLOCK_C)
            if ctx.needs_input_grad[1]:
                grads[1] = _teacher_gradient(ctx, upstream, d, z, stats, product).to(ctx.dtypes[1])
        return *once_differentiable(grads, upstream, *inputs), None, None, None, None


def _whole(z: Tensor, shard: Shard | None) -> tuple[int, int]:
    """Rows and features of the whole batch, which every process scales by."""
    return (z.shape[1], z.shape[2]) if shard is None else (shard.rows, shard.features)


def _forward(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, tall: bool, shard: Shard | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses, d and off; then what the gradients need: both z, their column factors, and P (tall) or M (wide)."""
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
        apart, squares, _ = merge_over_processes(shard, batch, own, squares)
        moments.copy_(torch.stack((means - apart, squares), dim=1).unsqueeze(1))
    whole = _whole(z, shard)
    max_parts = _PARTS if separate else 0
    _standardise[grid](*inputs, moments, z, stats, batch, features, *whole, chunk, eps, max_parts=max_parts, **blocks)
    if tall:
        product = sum_over_rows(torch.mm(z[1].T, z[0]), shard).to(z.dtype)
    else:
        product = torch.mm(sum_over_features(torch.mm(z[1], z[1].T), shard).to(z.dtype), z[0])
    losses = torch.empty(features, dtype=torch.float32, device=device)
    d, off = torch.empty_like(losses), torch.empty_like(losses)
    _columns[grid[:1]](product, z, losses, d, off, batch, features, *whole, kappa, tall=tall, **blocks)
    return losses, d, off, z, stats, product


def _teacher_gradient(ctx: Any, upstream: Tensor, d: Tensor, z: Tensor, stats: Tensor, product: Tensor) -> Tensor:
    """The rare case, in torch: the roles swap (P -> P'), and the upstream gradient stands inside the product."""
    (z_s, z_t), kappa, tall, shard = z, ctx.kappa, ctx.tall, ctx.shard
    batch, features = _whole(z, shard)
    grow = max(1.0, features / batch)
    # Inside a half-precision product u must be O(1); its size, a GradScaler's 65536 say, comes back in float32.
    size = sum_over_features(upstream.abs().amax().clamp_min(torch.finfo(torch.float32).tiny), shard)
    u = upstream / size
    inner = (product * u).T if tall else sum_over_features(torch.mm((z_s * u).to(z.dtype), z_s.T), shard)
    m = torch.mm(z_s, inner.to(z.dtype)) if tall else torch.mm(inner, z_t)
    along = 2 * kappa * grow * m.float() + (2 * u * ((1 - kappa) * d - 1)) * z_s
    through_norm = grow * sum_over_rows((along * z_t).sum(dim=0), shard)
    grad: Tensor = size * (stats[1, 0] * along - (stats[1, 1] * through_norm) * z_t)
    return grad


def _jit(function: Callable[..., None]) -> Any:
    return function if triton is None else triton.jit(function)


@_jit
def _merge(count, mean, m2):  # type: ignore[no-untyped-def]
    """Chan's formula along axis 0: the mean of all, and the sum of squares about it."""
    whole = tl.sum(count * mean, axis=0) / tl.sum(count, axis=0)
    apart = mean - whole[None, :]
    return whole, tl.sum(m2 + count * apart * apart, axis=0)


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
    """Mean and sum of squares of one chunk of rows of one block of columns of one input, to (2, parts, 2, D)."""
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
    all_rows, all_features, chunk, eps, max_parts: tl.constexpr, block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """Writes z (2, B, D) and stats (2, 2, D) = 1 / (scale (n + eps sqrt(B))) and 1 / (scale n) or 0, student first."""
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
            norm = tl.sqrt(m2)
            scale = tl.sqrt(tl.minimum(1.0, all_rows / all_features))
            inverse = 1.0 / (norm + eps * tl.sqrt(all_rows * 1.0))
            if tl.program_id(1) == 0:
                tl.store(stats_ptr + cols, inverse / scale, mask=col_mask)
                along = 1.0 / (scale * tl.where(norm > 0, norm, float("inf")))
                tl.store(stats_ptr + features + cols, along, mask=col_mask)
            for start in range(lo, hi, block_r):
                rows = start + tl.arange(0, block_r)
                x = _deviations(x_ptr, x_row, x_col, rows, cols, rows < hi, col_mask)
                z = (x - mean[None, :]) * (scale * inverse)[None, :]
                at = z_ptr + rows[:, None].to(tl.int64) * features + cols[None, :]
                tl.store(at, z.to(z_ptr.dtype.element_ty), mask=(rows < hi)[:, None] & col_mask[None, :])


@_jit
def _columns(  # type: ignore[no-untyped-def]
    product_ptr, z_ptr, losses_ptr, d_ptr, off_ptr, batch, features, all_rows, all_features, kappa,
    tall: tl.constexpr, block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """The column sums d and off, over P (tall) or over M and both z (wide), and the losses."""
    cols = tl.program_id(0) * block_c + tl.arange(0, block_c)
    col_mask = cols < features
    d_sum = tl.zeros([block_r, block_c], dtype=tl.float32)
    q_sum = tl.zeros([block_r, block_c], dtype=tl.float32)
    height = batch
    if tall:
        height = features
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
    grow = tl.maximum(1.0, all_features / all_rows)
    d = grow * tl.sum(d_sum, axis=0)
    q = grow * grow * tl.sum(q_sum, axis=0)
    tl.store(losses_ptr + cols, (d - 1) * (d - 1) + kappa * (q - d * d), mask=col_mask)
    tl.store(d_ptr + cols, d, mask=col_mask)
    tl.store(off_ptr + cols, q - d * d, mask=col_mask)


@_jit
def _gradient(  # type: ignore[no-untyped-def]
    upstream_ptr, upstream_stride, m_ptr, d_ptr, off_ptr, z_ptr, stats_ptr, grad_ptr, batch, features,
    all_rows, all_features, kappa, block_r: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    """The student's gradient, one tile: all in float32 until the last store, so u = 65536 meets no half."""
    column_blocks = tl.cdiv(features, block_c)
    cols = tl.program_id(0) % column_blocks * block_c + tl.arange(0, block_c)
    rows = tl.program_id(0) // column_blocks * block_r + tl.arange(0, block_r)
    col_mask = cols < features
    u = tl.load(upstream_ptr + cols.to(tl.int64) * upstream_stride, mask=col_mask, other=0.0).to(tl.float32)
    d = tl.load(d_ptr + cols, mask=col_mask, other=0.0)
    off = tl.load(off_ptr + cols, mask=col_mask, other=0.0)
    across = tl.load(stats_ptr + cols, mask=col_mask, other=0.0)
    along = tl.load(stats_ptr + features + cols, mask=col_mask, other=0.0)
    w = (1.0 - kappa) * d - 1.0
    of_m = 2.0 * kappa * tl.maximum(1.0, all_features / all_rows)
    of_s = 2.0 * (kappa * off + (d - 1.0) * d) * along
    inside = (rows < batch)[:, None] & col_mask[None, :]
    at = rows[:, None].to(tl.int64) * features + cols[None, :]
    m = tl.load(m_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z_s = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z_t = tl.load(z_ptr + batch.to(tl.int64) * features + at, mask=inside, other=0.0).to(tl.float32)
    grad = u[None, :] * (across[None, :] * (of_m * m + (2.0 * w)[None, :] * z_t) - of_s[None, :] * z_s)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


_INSTALLED = triton is not None
_INTERPRETED = _INSTALLED and not isinstance(_gradient, triton.JITFunction)
