"""What to log, and to look at, every so many steps: is the student's embedding becoming the teacher's?"""

from typing import NamedTuple

import torch
from torch import Tensor

from rsd_loss._common import check_embeddings, check_number, statistics_dtype
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
            unrelated features give about 0 at any width. It is nan for fewer than four rows.
    """

    mean_diagonal: Tensor
    off_diagonal_rms: Tensor
    effective_rank: Tensor
    linear_cka: Tensor


@torch.no_grad()
def summary(student: Tensor, teacher: Tensor, *, eps: float = 1e-5) -> Summary:
    """Four numbers about a batch. No square matrix larger than the smaller of (B, B) and (D, D) is formed.

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
    check_number("eps", eps)
    check_embeddings(student, teacher, same_width=True)
    (rows, features), dtype = student.shape, statistics_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    z_s, z_t = (standardise(x, eps) / rows**0.5 for x in (student, teacher))
    with torch.autocast(student.device.type, enabled=False):
        d = (z_s * z_t).sum(dim=0)
        gram = _gram(z_s)
        # What is not finite goes on as nan, and must not stop a training run in the search for eigenvalues.
        singular = torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0)).clamp_min(0).sqrt() + 0 * gram.sum()
        tiny = torch.finfo(dtype).tiny
        p = singular / singular.sum().clamp_min(tiny)
        centred = [x - x[0] - (x - x[0]).mean(dim=0) for x in (student, teacher)]
        centred = [x / x.abs().amax().clamp_min(tiny) for x in centred]  # fourth powers would leave the range
        own = [_unbiased_hsic(x, x).clamp_min(tiny).sqrt() for x in centred]
        alignment = _unbiased_hsic(*centred) / (own[0] * own[1])
        off_diagonal = _cross_squares(z_s, z_t) - d.square().sum()
    return Summary(
        d.mean(),
        (off_diagonal.clamp_min(0) / max(1, features * (features - 1))).sqrt(),
        torch.special.entr(p).sum().exp(),
        alignment,
    )


def _gram(x: Tensor) -> Tensor:
    """The smaller of X X' and X' X, which have the same eigenvalues but for zeros."""
    return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x


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
