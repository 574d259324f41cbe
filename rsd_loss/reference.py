"""The paper's loss as its equations read: the teaching text, the oracle and the naive rival in one.

The fast implementations compute the same numbers without the (D, D) matrix; see docs/fast-path.md.
"""

import torch
from torch import Tensor


def standardise(x: Tensor, eps: float) -> Tensor:
    """Zero mean and unit biased standard deviation per feature; eps is outside the root, unlike BatchNorm's."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + eps)


def cross_correlation(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """P = Zt' Zs / B, rows teacher, columns student."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    # Each side takes half of 1/B, so that no entry of a float16 product can overflow or vanish.
    scale = student.shape[0] ** -0.5
    z_s = (standardise(student, eps) * scale).to(dtype)
    z_t = (standardise(teacher, eps) * scale).to(dtype)
    return torch.mm(z_t.T, z_s)


def feature_losses(student: Tensor, teacher: Tensor, kappa: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Per student feature j: the loss (P_jj - 1)^2 + kappa * sum_{i != j} P_ij^2, then P_jj and sum_i P_ij^2."""
    p = cross_correlation(student, teacher, eps)
    p = p.to(torch.promote_types(p.dtype, torch.float32))
    d = p.diagonal()
    q = p.square().sum(dim=0)
    return (d - 1).square() + kappa * (q - d.square()), d.detach(), q.detach()
