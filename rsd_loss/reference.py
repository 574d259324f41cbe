"""The paper's loss as its equations read: the reference implementation, test oracle and benchmark baseline.

The fast implementations compute the same numbers without the (D, D) matrix; see docs/how-it-works.md.
"""

import torch
from torch import Tensor

from rsd_loss._common import statistics_dtype
from rsd_loss._distributed import Losses, Shard, sum_over_rows


def standardise(x: Tensor, eps: float, shard: Shard | None = None) -> Tensor:
    """Zero mean and unit biased standard deviation per feature; eps is outside the root, unlike BatchNorm's."""
    x = x.to(statistics_dtype(x))
    rows = x.shape[0] if shard is None else shard.rows
    first = x[:1].detach()
    x = x - first  # loses no digits to a large offset, and makes a constant feature exactly 0
    if shard is None:
        centred = x - x.mean(dim=0)
    else:  # processes have no common first row
        mean = sum_over_rows((x + first.double()).sum(dim=0), shard) / rows - first
        centred = x - mean.to(x.dtype)
    variance = sum_over_rows(centred.square().sum(dim=0), shard) / rows
    # The root has no derivative at 0: let it be 0 there. An overflow must show, and not pass for a dead feature.
    dead = variance == 0
    std = variance.masked_fill(dead, 1).sqrt().masked_fill(dead, 0).masked_fill(variance.isinf(), torch.nan)
    return centred / (std + eps)


def cross_correlation(student: Tensor, teacher: Tensor, eps: float, shard: Shard | None = None) -> Tensor:
    """P = Zt' Zs / B, rows teacher, columns student."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    # Each side takes a root of 1/B, so that no entry of a float16 product overflows or vanishes.
    scale = (student.shape[0] if shard is None else shard.rows) ** -0.5
    z_s = (standardise(student, eps, shard) * scale).to(dtype)
    z_t = (standardise(teacher, eps, shard) * scale).to(dtype)
    p = torch.mm(z_t.T, z_s)
    return sum_over_rows(p, shard).to(p.dtype)


def feature_losses(student: Tensor, teacher: Tensor, kappa: float, eps: float, shard: Shard | None = None) -> Losses:
    """Per student feature j the loss (P_jj - 1)^2 + kappa sum_{i != j} P_ij^2, then P_jj and sum_{i != j} P_ij^2.

    All are (D,), in at least float32, and only the first carries a gradient.
    """
    p = cross_correlation(student, teacher, eps, shard)
    p = p.to(statistics_dtype(p))
    d = p.diagonal()
    off = p.square().sum(dim=0) - d.square()
    return (d - 1).square() + kappa * off, d.detach(), off.detach()
