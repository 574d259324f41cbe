"""The loss and its gradient through the smaller of two products, in plain torch.

With Z the centred columns over their norm (plus eps * sqrt(B)), the cross-correlation is P = Zt' Zs, and two vectors
carry the whole loss: d_j = P_jj and q_j = sum_i P_ij^2. They and the gradient follow from Zt Zt' Zs, which can be
multiplied in either order:

    wide, B < D:   K = Zt Zt' (B, B),  N = K Zs,   d = colsum(Zt o Zs),  q = colsum(N o Zs)
    tall, D <= B:  P = Zt' Zs (D, D),              d = diag P,           q = colsum(P o P)

    loss_j = (d_j - 1)^2 + kappa (q_j - d_j^2)
    dL/dZs = 2 kappa N + 2 w o Zt = Zt (2 kappa P + 2 diag w),   w = (1 - kappa) d - 1

and through the standardisation, with n the norms and r = 1 / (n + eps sqrt(B)),

    dL/dX = r o dL/dZ - colsum(dL/dZ o Z) / n o Z

in which the student's column sum is 2 (kappa q + w d). Centred columns sum to zero, so nothing flows through the mean.

Statistics and vectors are float32 (float64 for float64 input). The products run in the input or the autocast dtype; a
column of Z has at most unit length, so that nothing overflows float16.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rsd_loss._distributed import Shard, merge_moments, sum_over_features, sum_over_rows

# How many rows of a tall input are worked on at a time on a CPU: few enough for the temporaries to stay in cache
# (page faults of large fresh tensors cost more than the arithmetic on them), enough for the matmul to run at its peak.
_BLOCK_ROWS = 1024


class _Columns(NamedTuple):
    """What it took to standardise one side, each (D,), in the dtype of the statistics."""

    mean: Tensor  # of the differences to the first row: an offset of 1e4 would leave a rounded mean few digits
    norm: Tensor  # n, of the centred columns
    scale: Tensor  # r = 1 / (n + eps sqrt(B))


def feature_losses(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as reference.feature_losses."""
    if torch.is_grad_enabled() and (student.requires_grad or teacher.requires_grad):
        out: tuple[Tensor, Tensor, Tensor] = _FeatureLosses.apply(student, teacher, kappa, eps, shard)
        return out
    # The value alone needs no N, only q: 2 B D^2 operations against 4 B^2 D.
    tall = student.shape[1] <= 2 * student.shape[0] if shard is None else shard.by_rows
    d, q, *_ = (_tall if tall else _wide)(student, teacher, eps, shard)
    return _losses(d, q, kappa), d, q


class _FeatureLosses(torch.autograd.Function):
    """Saves N for wide inputs and A = 2 kappa P + 2 diag w for tall ones, neither yet scaled by the upstream."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.tall = student.shape[1] <= student.shape[0] if shard is None else shard.by_rows
        ctx.kappa, ctx.shard = kappa, shard
        d, q, columns_s, columns_t, *products = (_tall if ctx.tall else _wide)(student, teacher, eps, shard)
        w = (1 - kappa) * d - 1
        # colsum(dL/dZs o Zs) / n. A dead feature has z = d = q = 0, and so any finite quotient will do.
        pull = 2 * (kappa * q + w * d) / columns_s.norm.clamp_min(torch.finfo(d.dtype).tiny)
        if ctx.tall:
            a = (2 * kappa) * products[0]
            a.diagonal().add_(2 * w)
            dtype = product_dtype(student, teacher)
            ctx.centred = _centres_only(student, teacher, dtype, shard)
            if ctx.centred:
                a.mul_(columns_t.scale.unsqueeze(1))
            products = [a.to(dtype)]
        else:
            products = [*products, w]  # and not append: torch 2.6's compiler takes the rest of a tuple for one
        ctx.save_for_backward(student, teacher, *columns_s, *columns_t, pull, *products)
        ctx.mark_non_differentiable(d, q)
        return _losses(d, q, kappa), d, q

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing hands each out a single time
        student, teacher = saved[:2]
        gradients = _tall_gradients if ctx.tall else _wide_gradients
        # The autocast of the forward is in the saved dtypes; that around backward(), if any, must change nothing.
        device = student.device.type
        with torch.no_grad(), torch.autocast(device, enabled=False) if autocasts(device) else nullcontext():
            grads = gradients(ctx, saved, upstream[0])
        if torch.is_grad_enabled():  # create_graph=True
            grads = [None if grad is None else _Once.apply(grad, upstream[0], student, teacher) for grad in grads]
        return *grads, None, None, None


class _Once(torch.autograd.Function):
    """Passes a gradient on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *_: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "the fast implementations of rsd_loss have no second derivative: "
            'pass implementation="reference" where double backward is needed'
        )


def _wide(
    student: Tensor, teacher: Tensor, eps: float, shard: Shard | None
) -> tuple[Tensor, Tensor, _Columns, _Columns, Tensor, Tensor, Tensor]:
    """d, q, the statistics of both sides, and N and both Z (B, D) in the dtype of the products."""
    z_s, z_t, columns_s, columns_t = _standardise_both(student, teacher, eps, shard)
    k = sum_over_features(torch.mm(z_t, z_t.T), shard)
    n = torch.mm(k.to(z_s.dtype), z_s)
    return _column_dot(z_t, z_s), _column_dot(n, z_s), columns_s, columns_t, n, z_s, z_t


def _wide_gradients(ctx: Any, saved: Sequence[Tensor], u: Tensor) -> list[Tensor | None]:
    student, teacher, *columns, pull, n, z_s, z_t, w = saved
    columns_s, columns_t = _Columns(*columns[:3]), _Columns(*columns[3:])
    grads: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[0]:
        if n.dtype == u.dtype:
            ur = u * columns_s.scale
            grad = n * (2 * ctx.kappa * ur)
            grad.addcmul_(z_t, 2 * w * ur).addcmul_(z_s, -pull * u)
        else:
            grad = n * (2 * ctx.kappa * u) + z_t * (2 * w * u)
            grad = _through_standardisation(grad, _apply(columns_s, student), columns_s, ctx.shard)
        grads[0] = grad.to(student.dtype)
    if ctx.needs_input_grad[1]:
        # Here u stands inside the product. It may be a gradient scaler's 65536, which is not for half precision.
        z_s, z_t = z_s.to(u.dtype), _apply(columns_t, teacher)
        inner = sum_over_features(torch.mm(z_s * u, z_s.T), ctx.shard)
        grad = 2 * ctx.kappa * torch.mm(inner, z_t) + z_s * (2 * w * u)
        grads[1] = _through_standardisation(grad, z_t, columns_t, ctx.shard).to(teacher.dtype)
    return grads


def _tall(
    student: Tensor, teacher: Tensor, eps: float, shard: Shard | None
) -> tuple[Tensor, Tensor, _Columns, _Columns, Tensor]:
    """d, q, the statistics of both sides, and P (D, D) in their dtype."""
    dtype = product_dtype(student, teacher)
    if _centres_only(student, teacher, dtype, shard):
        means, squares, p = _moments(student, teacher, dtype)
        if shard is not None:
            means, squares, p, _ = merge_moments(shard, student.shape[0], _first(student, teacher), means, squares, p)
        columns_s, columns_t = _columns(means, squares, student.shape[0] if shard is None else shard.rows, eps)
        # The scales of both sides at once, on what is no larger than an input.
        p.mul_(columns_t.scale.unsqueeze(1)).mul_(columns_s.scale)
    else:
        z_s, z_t, columns_s, columns_t = _standardise_both(student, teacher, eps, shard)
        p = sum_over_rows(torch.mm(z_t.T, z_s).to(columns_s.mean.dtype), shard)
    return p.diagonal().clone(), p.square().sum(dim=0), columns_s, columns_t, p


def _tall_gradients(ctx: Any, saved: Sequence[Tensor], u: Tensor) -> list[Tensor | None]:
    student, teacher, *columns, pull, a = saved
    columns_s, columns_t = _Columns(*columns[:3]), _Columns(*columns[3:])
    grads: list[Tensor | None] = [None, None]
    if ctx.needs_input_grad[0]:
        if ctx.centred:
            grad = _tall_student_gradient(student, teacher, columns_s, columns_t, pull, a, u)
        else:
            grad = torch.mm(_apply(columns_t, teacher).to(a.dtype), a) * u
            grad = _through_standardisation(grad, _apply(columns_s, student), columns_s, ctx.shard)
        grads[0] = grad.to(student.dtype)
    if ctx.needs_input_grad[1]:
        grad = torch.mm(_apply(columns_s, student), (a * u).T)
        if ctx.centred:
            grad /= columns_t.scale
        grad = _through_standardisation(grad, _apply(columns_t, teacher), columns_t, ctx.shard)
        grads[1] = grad.to(teacher.dtype)
    return grads


def _tall_student_gradient(
    student: Tensor, teacher: Tensor, columns_s: _Columns, columns_t: _Columns, pull: Tensor, a: Tensor, u: Tensor
) -> Tensor:
    """The product Zt A and its way through the standardisation: by blocks, in few passes, all scales in vectors."""
    ur = u * columns_s.scale
    mean_s, rest_s = _rounded_mean(student, columns_s)
    mean_t, rest_t = _rounded_mean(teacher, columns_t)
    rest = -ur * torch.mv(a.T.to(ur.dtype), rest_t)
    half = a.dtype != ur.dtype
    # What is left of two large terms in a row far out has no digits unless the second is taken from the rounded first.
    # Of a dead feature it is of columns that are zero.
    pull = -ur * ((columns_s.scale / columns_s.norm).nan_to_num(posinf=0) if half else pull)
    if half or _streams(student, teacher, a.dtype):
        gradient = _streamed_gradient_op if torch.compiler.is_compiling() else _streamed_gradient
        return gradient(student, teacher, mean_s, mean_t, a, ur, pull, rest, rest_s)
    grad = torch.addcmul(rest - pull * rest_s, torch.mm(teacher - mean_t, a), ur)
    return grad.addcmul_(student - mean_s, pull)


def _rounded_mean(x: Tensor, columns: _Columns) -> tuple[Tensor, Tensor]:
    """The mean itself, and what rounding it left over."""
    first = x[0].to(columns.mean.dtype)
    mean = first + columns.mean
    return mean, columns.mean - (mean - first)


def _through_standardisation(grad: Tensor, z: Tensor, columns: _Columns, shard: Shard | None) -> Tensor:
    """dL/dX from dL/dZ."""
    pull = sum_over_rows(_column_dot(grad, z), shard) / columns.norm.clamp_min(torch.finfo(grad.dtype).tiny)
    return grad * columns.scale - z * pull


def _losses(d: Tensor, q: Tensor, kappa: float) -> Tensor:
    return (d - 1).square() + kappa * (q - d.square())


def _moments(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the differences to the first row, sums of squares about them, both (2, D), and Ct' Cs (D, D)."""
    if _streams(student, teacher, dtype):
        streamed = _streamed_moments_op if torch.compiler.is_compiling() else _streamed_moments
        moments: tuple[Tensor, Tensor, Tensor] = streamed(student, teacher, dtype)
        return moments
    both, means, squares = _centre_both(student, teacher)
    return torch.stack(means), torch.stack(squares), torch.mm(both[1].T, both[0])


def _streamed_moments(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one pass, block by block, with products in dtype.

    Each block is centred on its own mean, and what the means differ by is added at the end (Chan, Golub and
    LeVeque). Every term is a sum of products of centred values, so that nothing cancels.
    """
    blocks, features, full = _blocks(student), student.shape[1], _statistics_dtype(student, teacher)
    first_s, first_t = student[0].to(full), teacher[0].to(full)
    means = student.new_empty(2, len(blocks), features, dtype=full)
    squares = torch.empty_like(means)
    p = student.new_zeros(features, features, dtype=full)
    # One work space for all blocks: what a block frees, the allocator may unmap and the next one fault in again.
    work = student.new_empty(2, _block_rows(student), features, dtype=full)
    square, half = torch.empty_like(work[0]), None if dtype == full else torch.empty_like(work, dtype=dtype)
    for i, rows in enumerate(blocks):
        size = rows.stop - rows.start
        both = work[:, :size]
        for side, (x, first, centred) in enumerate(zip((student, teacher), (first_s, first_t), both, strict=True)):
            _subtract(x[rows], first, centred)
            torch.mean(centred, dim=0, out=means[side, i])
            centred -= means[side, i]
            torch.sum(torch.mul(centred, centred, out=square[:size]), dim=0, out=squares[side, i])
        if half is None:
            p.addmm_(both[1].T, both[0])
        else:
            half[:, :size].copy_(both)
            p += torch.mm(half[1, :size].T, half[0, :size])
    sizes = means.new_tensor([rows.stop - rows.start for rows in blocks]).unsqueeze(1)
    mean = (sizes * means).sum(dim=1) / student.shape[0]
    between = sizes.sqrt() * (means - mean.unsqueeze(1))
    return mean, squares.sum(dim=1) + _column_dot(between, between), p.addmm_(between[1].T, between[0])


def _streamed_gradient(
    student: Tensor,
    teacher: Tensor,
    mean_s: Tensor,
    mean_t: Tensor,
    a: Tensor,
    ur: Tensor,
    pull: Tensor,
    rest: Tensor,
    rest_s: Tensor,
) -> Tensor:
    """The gradient ur o (Ct A) + pull o (Cs - rest_s) + rest; in half precision pull times colsum(Ct A o Cs)."""
    grad = torch.empty_like(student)
    work = ur.new_empty(_block_rows(student), student.shape[1])
    full = None if grad.dtype == ur.dtype else torch.empty_like(work)  # for the sums, where the gradient is rounded
    if a.dtype != ur.dtype:
        half, dot = torch.empty_like(work, dtype=a.dtype), torch.zeros_like(ur)
        for rows in _blocks(student):
            centred = work[: rows.stop - rows.start]
            left = half[: rows.stop - rows.start].copy_(_subtract(teacher[rows], mean_t, centred))
            grad[rows] = torch.mm(left, a)  # which a half-precision gradient can hold as it is
            dot += _subtract(student[rows], mean_s, centred).mul_(grad[rows]).sum(dim=0)
        pull = pull * dot
    rest = rest - pull * rest_s
    for rows in _blocks(student):
        centred = work[: rows.stop - rows.start]
        if a.dtype == ur.dtype:
            torch.mm(_subtract(teacher[rows], mean_t, centred), a, out=grad[rows])
        product = grad[rows] if full is None else full[: rows.stop - rows.start].copy_(grad[rows])
        torch.addcmul(rest, product, ur, out=product)
        product.addcmul_(_subtract(student[rows], mean_s, centred), pull)
        if full is not None:
            grad[rows] = product
    return grad


def _subtract(x: Tensor, vector: Tensor, out: Tensor) -> Tensor:
    """Their difference in the dtype of vector and out."""
    return torch.sub(x, vector, out=out) if x.dtype == out.dtype else out.copy_(x).sub_(vector)


# A compiler would unroll the blocks and give each its own memory; as operators they run as they stand.
_streamed_moments_op = torch.library.custom_op("rsd_loss::moments", _streamed_moments, mutates_args=())
_streamed_gradient_op = torch.library.custom_op("rsd_loss::gradient", _streamed_gradient, mutates_args=())


@_streamed_moments_op.register_fake
def _(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    features, full = student.shape[1], _statistics_dtype(student, teacher)
    shapes = ((2, features), (2, features), (features, features))
    means, squares, p = (student.new_empty(shape, dtype=full) for shape in shapes)
    return means, squares, p


@_streamed_gradient_op.register_fake
def _(student: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(student)


def _standardise_both(
    student: Tensor, teacher: Tensor, eps: float, shard: Shard | None
) -> tuple[Tensor, Tensor, _Columns, _Columns]:
    """Both Z (B, D) in the dtype of the products."""
    (z_s, z_t), means, squares = _centre_both(student, teacher)
    rows = student.shape[0]
    if shard is not None and shard.by_rows:
        stacked = (torch.stack(means), torch.stack(squares))
        merged_means, merged_squares, _, apart = merge_moments(shard, rows, _first(student, teacher), *stacked)
        z_s, z_t = z_s + apart[0], z_t + apart[1]
        columns_s, columns_t = _columns(merged_means, merged_squares, shard.rows, eps)
    else:
        columns_s, columns_t = _columns(means, squares, rows, eps)
    dtype = product_dtype(student, teacher)
    return z_s.mul_(columns_s.scale).to(dtype), z_t.mul_(columns_t.scale).to(dtype), columns_s, columns_t


def _centre_both(student: Tensor, teacher: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Both C, the means of the differences to the first row and the sums of squares, in the dtype of the statistics."""
    both, means, squares = [], [], []
    for x in (student, teacher):
        x = x.to(_statistics_dtype(student, teacher))
        centred = x - x[0]
        means.append(centred.mean(dim=0))
        centred -= means[-1]
        squares.append(_column_dot(centred, centred))
        both.append(centred)
    return both, means, squares


def _columns(
    means: Sequence[Tensor] | Tensor, squares: Sequence[Tensor] | Tensor, rows: int, eps: float
) -> tuple[_Columns, _Columns]:
    norms = [x.sqrt() for x in squares]
    columns = [_Columns(mean, n, (n + eps * rows**0.5).reciprocal()) for mean, n in zip(means, norms, strict=True)]
    return columns[0], columns[1]


def _first(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.stack((student[0].double(), teacher[0].double()))


def _apply(columns: _Columns, x: Tensor) -> Tensor:
    x = x.to(columns.mean.dtype)
    return (x - x[0]).sub_(columns.mean).mul_(columns.scale)


def _column_dot(a: Tensor, b: Tensor) -> Tensor:
    """colsum(a o b), in at least float32."""
    return (a.to(torch.promote_types(a.dtype, torch.float32)) * b).sum(dim=-2)


def _statistics_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def product_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    device = student.device.type
    # As for any matmul under autocast, float64 stays as it is.
    return torch.get_autocast_dtype(device) if autocasts(device) and dtype != torch.float64 else dtype


def autocasts(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast to ask about


def _centres_only(student: Tensor, teacher: Tensor, dtype: torch.dtype, shard: Shard | None) -> bool:
    """Whether a tall product takes centred columns, whose scales go into the (D, D) matrix.

    In half precision it takes columns of unit length, which cannot overflow; but for blocks, which have one pass for
    moments and product. Processes must not decide that each by its own number of rows.
    """
    return dtype == _statistics_dtype(student, teacher) or (shard is None and _streams(student, teacher, dtype))


def _streams(student: Tensor, teacher: Tensor, dtype: torch.dtype) -> bool:
    """Whether tall inputs go block by block, with products in dtype: on a CPU, where float32's range is enough."""
    # Compiled code centres in few passes as it is, and gains from blocks where there are many; so do half products,
    # which take long to add up over blocks.
    few, many = (4, 32) if dtype == torch.bfloat16 else (1, 4)
    blocks = many if torch.compiler.is_compiling() else few
    same = student.dtype == teacher.dtype == dtype or student.dtype == teacher.dtype == torch.float32
    known = dtype in (torch.bfloat16, torch.float32, torch.float64)
    return student.device.type == "cpu" and student.shape[0] >= blocks * _BLOCK_ROWS and same and known


def _blocks(student: Tensor) -> list[slice]:
    rows, size = student.shape[0], _block_rows(student)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _block_rows(student: Tensor) -> int:
    return min(_BLOCK_ROWS, student.shape[0] // 2)  # a half keeps the work small beside the gradient
