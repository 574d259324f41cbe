"""The paper's loss as its equations read: the teaching text, the oracle and a rival of the benchmarks.

The fast implementations compute the same numbers without the (D, D) matrix; see docs/fast-path.md.
"""

import torch
from torch import Tensor

from rsd_loss._common import statistics_dtype
from rsd_loss._distributed import Shard, sum_over_rows


def standardise(x: Tensor, eps: float, shard: Shard | None = None) -> Tensor:
    """Zero mean and unit biased standard deviation per feature; eps is outside the root, unlike BatchNorm's."""
    x = x.to(statistics_dtype(x, x))
    first = x[:1].detach()
    x = x - first  # changes nothing but rounding: a large offset costs no digits, and a constant feature is exactly 0
    if shard is None:
        return (x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + eps)
    # Processes have no common first row.
    mean = sum_over_rows((x + first.double()).sum(dim=0), shard) / shard.rows - first
    centred = x - mean.to(x.dtype)
    variance = sum_over_rows(centred.square().sum(dim=0), shard) / shard.rows
    dead = variance == 0  # the root has no derivative there; let it be 0, as std does
    return centred / (variance.masked_fill(dead, 1).sqrt().masked_fill(dead, 0) + eps)


def cross_correlation(student: Tensor, teacher: Tensor, eps: float, shard: Shard | None = None) -> Tensor:
    """P = Zt' Zs / B, rows teacher, columns student."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    # Each side takes half of 1/B, so that no entry of a float16 product can overflow or vanish.
    scale = (student.shape[0] if shard is None else shard.rows) ** -0.5
    z_s = (standardise(student, eps, shard) * scale).to(dtype)
    z_t = (standardise(teacher, eps, shard) * scale).to(dtype)
    p = torch.mm(z_t.T, z_s)
    return sum_over_rows(p, shard).to(p.dtype)


def feature_losses(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Per student feature j the loss (P_jj - 1)^2 + kappa sum_{i != j} P_ij^2, then P_jj and sum_{i != j} P_ij^2.

    All are (D,), in at least float32, and only the first carries a gradient.
    """
    p = cross_correlation(student, teacher, eps, shard)
    p = p.to(statistics_dtype(p, p))
    d = p.diagonal()
    off = p.square().sum(dim=0) - d.square()
    return (d - 1).square() + kappa * off, d.detach(), off.detach()
