"""What to log, and to look at, every so many steps: is the student's embedding becoming the teacher's?"""

from typing import NamedTuple

import torch
from torch import Tensor

from rsd_loss._common import check_embedding, check_embeddings, check_number, no_autocast, statistics_dtype
from rsd_loss.reference import standardise


class Summary(NamedTuple):
    """Scalars on the embeddings' device, detached.

    Attributes:
        mean_diagonal: Mean of P_ii, in [-1, 1]: 1 when every student feature follows its teacher feature.
        off_diagonal_rms: Root mean square of P_ij, i != j, in [0, 1]. For unrelated features it is about 1 / sqrt(B),
            from sampling alone; 0 if there is a single feature.
        effective_rank: Of the standardised student, from 1 to min(B - 1, D): the exponential of the entropy of its
            singular values (Roy and Vetterli, 2007). It falls when features become redundant.
        linear_cka: Linear centred kernel alignment (Kornblith et al., 2019), at most 1. Unlike the diagonal it does
            not ask that features match one by one. It uses the unbiased estimator (Song et al., 2012), so
            unrelated features give about 0 at any width. It is nan where it cannot be estimated: for fewer than four
            rows, or if one row holds nearly all of an embedding's variance.
        redundancy: Of the teacher, as ``redundancy`` gives it; what kappa should be depends on it.
    """

    mean_diagonal: Tensor
    off_diagonal_rms: Tensor
    effective_rank: Tensor
    linear_cka: Tensor
    redundancy: Tensor


@torch.no_grad()
def summary(student: Tensor, teacher: Tensor, *, eps: float = 1e-5) -> Summary:
    """Five numbers about a batch. No square matrix larger than the smaller of (B, B) and (D, D) is formed.

    Meant for every hundredth step or so: the singular values make the CPU wait for the GPU.

    Args:
        student: (B, D) projected student embeddings, as the loss gets them; float16, bfloat16, float32 or float64.
        teacher: (B, D) teacher embeddings of the same samples in the same order.
        eps: Added to the standard deviation, as in ``rsd_loss.rsd_loss``.

    Returns:
        A ``Summary`` in float32, or float64 for float64 embeddings.

    Raises:
        TypeError: An embedding is not a floating-point tensor.
        ValueError: Shapes or devices do not fit; the message says which and what to do.
    """
    eps = check_number("eps", eps)
    check_embeddings(student, teacher, same_width=True)
    (rows, features), dtype = student.shape, statistics_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    with no_autocast(student.device.type):
        z_s, z_t = (standardise(x, eps) / rows**0.5 for x in (student, teacher))
        d = (z_s * z_t).sum(dim=0)
        off_diagonal = _cross_squares(z_s, z_t) - d.square().sum()
        return Summary(
            d.mean(),
            (off_diagonal.clamp_min(0) / max(1, features * (features - 1))).sqrt(),
            _effective_rank(z_s),
            _linear_cka(student, teacher),
            _redundancy(z_t),
        )


@torch.no_grad()
def redundancy(teacher: Tensor, *, eps: float = 1e-5) -> Tensor:
    """How often the teacher repeats itself: R = mean_j sum_{i != j} C_ij^2, with C its own correlation matrix.

    A student that copies the teacher exactly has a loss of kappa R per feature, and one that knows nothing has 1. So
    kappa R must stay well below 1. No square matrix larger than the smaller of (B, B) and (D, D) is formed.

    Args:
        teacher: (B, D) teacher embeddings of one training batch; float16, bfloat16, float32 or float64. A small batch
            adds about D / B, as it does to the loss.
        eps: Added to the standard deviation, as in ``rsd_loss.rsd_loss``.

    Returns:
        A scalar on the teacher's device, in float32, or float64 for float64 embeddings; from 0 to D - 1.

    Raises:
        TypeError: The teacher is not a floating-point tensor.
        ValueError: It is not (B, D) with at least two rows.

    Examples:
        >>> redundancy(torch.randn(4096, 16).repeat(1, 8)).round()
        tensor(7.)
    """
    eps = check_number("eps", eps)
    check_embedding("teacher", teacher, min_rows=2)
    with no_autocast(teacher.device.type):
        return _redundancy(standardise(teacher, eps) / teacher.shape[0] ** 0.5)


def _redundancy(z: Tensor) -> Tensor:
    return (_cross_squares(z, z) - z.square().sum(dim=0).square().sum()).clamp_min(0) / z.shape[1]


def _effective_rank(z: Tensor) -> Tensor:
    # Squared, a direction of a thousandth of the largest would drown in the rounding of float32.
    x = z if z.device.type == "mps" else z.double()  # mps has no float64
    gram = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x  # both have the same eigenvalues but for zeros
    # What is not finite goes on as nan, and must not stop a training run in the search for eigenvalues.
    eigenvalues = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0)) + 0 * gram.sum()
    # Rounding leaves up to about 12 eps of the largest where there should be zeros, and must not count as rank.
    noise = 32 * torch.finfo(gram.dtype).eps * eigenvalues.amax()
    singular = eigenvalues.masked_fill(eigenvalues < noise, 0).sqrt()
    p = singular / singular.sum().clamp_min(torch.finfo(gram.dtype).tiny)
    return torch.special.entr(p).sum().exp().to(z.dtype)


def _linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    finfo, centred, own = torch.finfo(student.dtype), [], []
    for x in (student, teacher):
        x = x - x[0]
        x = x - x.mean(dim=0)
        x = x / x.abs().amax().clamp_min(finfo.tiny)  # fourth powers would leave the range
        hsic = _unbiased_hsic(x, x)
        # An estimate of zero, of less or of no more than rounding has no root to divide by.
        own.append(hsic.masked_fill(hsic <= len(x) * finfo.eps * _cross_squares(x, x), torch.nan).sqrt())
        centred.append(x)
    return _unbiased_hsic(*centred) / (own[0] * own[1])


def _unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """<X X', Y Y'> of centred columns, less what a sample's product with itself gives, times a number that cancels."""
    rows, own_x, own_y = x.shape[0], x.square().sum(dim=1), y.square().sum(dim=1)
    if rows < 4:
        return x.new_full((), torch.nan)
    once, apart = (own_x * own_y).sum() * (rows / (rows - 2)), own_x.sum() * own_y.sum() / ((rows - 1) * (rows - 2))
    return _cross_squares(x, y) - once + apart


def _cross_squares(x: Tensor, y: Tensor) -> Tensor:
    """||Y' X||^2, which is also <X X', Y Y'>."""
    return ((x @ x.T) * (y @ y.T)).sum() if x.shape[0] < x.shape[1] else (y.T @ x).square().sum()
