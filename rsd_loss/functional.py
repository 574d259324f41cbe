"""The loss and its cross-correlation matrix: signatures, documentation, checks and the choice of a backend."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rsd_loss import _distributed, _fused, reference
from rsd_loss._common import check_embeddings, check_number, why_only_reference
from rsd_loss._distributed import Backend, Losses, Shard

Reduction = Literal["sum", "mean", "none"]
Implementation = Literal["auto", "fused", "triton", "reference"]
_NAMES = {"reduction": get_args(Reduction), "implementation": get_args(Implementation)}


class RSDTerms(NamedTuple):
    """The two parts of the loss, detached, for logging.

    Both are averaged over features for ``reduction="mean"`` and summed otherwise. For ``"sum"`` and ``"mean"``,
    ``invariance + kappa * decorrelation`` is the loss.

    Attributes:
        invariance: Scalar, sum_i (P_ii - 1)^2; 0 when every student feature matches its teacher feature.
        decorrelation: Scalar, sum_{i != j} P_ij^2, not yet weighted by kappa.
    """

    invariance: Tensor
    decorrelation: Tensor


@overload
def rsd_loss(
    student: Tensor, teacher: Tensor, *, kappa: float = ..., eps: float = ..., reduction: Reduction = ...,
    gather_distributed: bool = ..., process_group: "torch.distributed.ProcessGroup | None" = ...,
    implementation: Implementation = ..., return_terms: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def rsd_loss(
    student: Tensor, teacher: Tensor, *, kappa: float = ..., eps: float = ..., reduction: Reduction = ...,
    gather_distributed: bool = ..., process_group: "torch.distributed.ProcessGroup | None" = ...,
    implementation: Implementation = ..., return_terms: Literal[True],
) -> tuple[Tensor, RSDTerms]: ...  # fmt: skip


def rsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kappa: float = 0.01,
    eps: float = 1e-5,
    reduction: Reduction = "sum",
    gather_distributed: bool = False,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    implementation: Implementation = "auto",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, RSDTerms]:
    r"""Redundancy Suppression Distillation loss between two batches of embeddings.

    With Z the embeddings standardised per feature over the batch, and the cross-correlation P = Zt' Zs / B,

    $$ L = \sum_i (P_{ii} - 1)^2 + \kappa \sum_{i \ne j} P_{ij}^2 $$

    The diagonal ties each student feature to its teacher feature (invariance maximisation); the off-diagonal keeps
    each student feature from following other features of the teacher (feature decorrelation). Source: Zhang, Liu, Ran
    and Ma, "Cross-Architecture Distillation Made Simple with Redundancy Suppression", ICCV 2025, arXiv 2507.21844.

    Args:
        student: (B, D) student embeddings, usually from ``DecouplingProjector``; B >= 2 (with
            ``gather_distributed=True``, in all processes together); float16, bfloat16, float32 or float64.
        teacher: (B, D) teacher embeddings of the same samples in the same order. A teacher that requires grad gets
            its gradient; use ``torch.no_grad()`` around a frozen one.
        kappa: Weight of the decorrelation term. The paper's 0.01 is for teachers with a redundancy R of up to about 10
            (``rsd_loss.diagnostics.redundancy``); kappa R of 0.3 costs accuracy. 0 did no harm with any teacher.
        eps: Added to the standard deviation (outside the root), in the units of the embeddings.
        reduction: ``"sum"`` is the paper's loss; ``"mean"`` divides it by D, so that its size hardly depends on
            the width; ``"none"`` gives the (D,) losses of the student's features.
        gather_distributed: Compute the loss of the global batch: the rows of all processes in ``process_group``,
            which may hold different numbers of them. Every process gets the same loss. Averaged over processes, as
            DistributedDataParallel and FSDP do, the gradients are those of this loss. All processes must make the
            call. No effect in a single process.
        process_group: The processes to gather over; the default group if None.
        implementation: ``"auto"`` picks ``"fused"``, or ``"reference"`` for ``torch.func`` transforms, forward-mode
            AD and DTensors; all give the same loss, up to rounding.
        return_terms: Also return the two terms.

    Returns:
        The loss: a scalar, or (D,) for ``reduction="none"``; float64 for float64 embeddings, else float32 (a half
        precision sum over features could overflow). With ``return_terms=True``, ``(loss, RSDTerms)``.

    Raises:
        TypeError: An embedding is not a floating-point tensor, or kappa or eps not a number.
        ValueError: Shapes, devices, ranges or names do not fit, in this process or (with
            ``gather_distributed=True``) between processes; the message says which and what to do.
        RuntimeError: The implementation named cannot run here; the message says why.
    """
    check_gather(gather_distributed, process_group)
    args = (student, teacher, kappa, eps, reduction, implementation)
    losses, d, off = _gathered(_losses, process_group, *args) if gather_distributed else _losses(*args)
    over_features = torch.mean if reduction == "mean" else torch.sum
    loss = losses if reduction == "none" else over_features(losses)
    return (loss, RSDTerms(over_features((d - 1).square()), over_features(off))) if return_terms else loss


def cross_correlation(
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-5,
    gather_distributed: bool = False,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Cross-correlation matrix of two batches of embeddings, P = Zt' Zs / B.

    Use it to inspect the matrix or to build your own loss. ``rsd_loss`` forms it only where D <= B, or D <= 2 B for the
    value alone.

    Args:
        student: (B, D_student) embeddings; B >= 2; float16, bfloat16, float32 or float64.
        teacher: (B, D_teacher) embeddings of the same samples in the same order; the widths may differ.
        eps: Added to the standard deviation (outside the root), in the units of the embeddings.
        gather_distributed: Take the batch to be that of all processes in ``process_group``, as in ``rsd_loss``.
        process_group: The processes to gather over; the default group if None.

    Returns:
        (D_teacher, D_student) matrix with entries in [-1, 1], in the dtype of a matrix product of student and teacher.

    Raises:
        TypeError: An embedding is not a floating-point tensor, or eps not a number.
        ValueError: Shapes, devices or ranges do not fit; the message says which and what to do.
    """
    if gather_distributed:
        return _gathered(_correlation, process_group, student, teacher, eps)
    check_gather(gather_distributed, process_group)
    return _correlation(student, teacher, eps)


# What other processes hold decides how the batch is split: a decision on the host, which the compiler leaves to Python.
# This is torch.compiler.disable, without loading the compiler on import.
@_disable_dynamo
def _gathered(function: Callable[..., Any], process_group: "torch.distributed.ProcessGroup | None", *args: Any) -> Any:
    return function(*args, _distributed.group_or_none(process_group))


def _losses(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, reduction: str, implementation: str, group: Any = None
) -> Losses:
    with nullcontext() if group is None else _distributed.failing_together(student, group):
        kappa, eps = check_settings(kappa, eps, reduction, implementation)
        _check_inputs(student, teacher, group, same_width=True)
        backend = _backend(implementation, student, teacher)
    if group is None:
        return backend(student, teacher, kappa, eps)
    settings = {"implementation": implementation, "reduction": reduction, "kappa": kappa, "eps": eps}
    rows = _distributed.agree(student, teacher, {"the function called": "rsd_loss"} | settings, group)
    shard = Shard(group, sum(rows), by_rows=True)
    if backend is reference.feature_losses:  # its own operations and their gradients sum over processes, at any shape
        return backend(student, teacher, kappa, eps, shard)
    return _distributed.over_processes(backend, student, teacher, kappa, eps, rows, shard)


def _correlation(student: Tensor, teacher: Tensor, eps: float, group: Any = None) -> Tensor:
    with nullcontext() if group is None else _distributed.failing_together(student, group):
        eps = check_number("eps", eps)
        _check_inputs(student, teacher, group)
    if group is None:
        return reference.cross_correlation(student, teacher, eps)
    rows = _distributed.agree(student, teacher, {"the function called": "cross_correlation", "eps": eps}, group)
    return reference.cross_correlation(student, teacher, eps, Shard(group, sum(rows), by_rows=True))


def check_settings(kappa: float, eps: float, reduction: str, implementation: str) -> tuple[float, float]:
    """Validates what RSDLoss shares with rsd_loss; returns kappa and eps as Python floats."""
    kappa, eps = check_number("kappa", kappa), check_number("eps", eps)
    for name, value in (("reduction", reduction), ("implementation", implementation)):
        if value not in _NAMES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, _NAMES[name]))}, got {value!r}")
    return kappa, eps


def check_gather(gather_distributed: bool, process_group: object) -> None:
    """Raises if a process group would be ignored."""
    if process_group is not None and not gather_distributed:
        raise ValueError("process_group is given but gather_distributed is False: pass gather_distributed=True with it")


def _check_inputs(student: Tensor, teacher: Tensor, group: object, same_width: bool = False) -> None:
    check_embeddings(student, teacher, same_width=same_width, min_rows=2 if group is None else 1)
    if group is None:
        return
    if reason := why_only_reference(student, teacher):
        raise RuntimeError(f"gather_distributed=True cannot run here: {reason}. Leave it out for this process's loss")
    if student.device.type == "meta":
        raise ValueError("student and teacher are on meta, and what has no values cannot be gathered")


def _backend(implementation: str, student: Tensor, teacher: Tensor) -> Backend:
    """The function that computes the losses, P_jj and sum_{i != j} P_ij^2, all (D,)."""
    reason = why_only_reference(student, teacher)
    if implementation == "reference" or (implementation == "auto" and reason):
        return reference.feature_losses
    if implementation == "triton":
        from rsd_loss import _triton  # on use only: Triton takes long to import and need not be installed

        reason = reason or _triton.why_unavailable(student, teacher)
    if reason:
        way_out = "" if implementation == "triton" else ': pass implementation="reference" or "auto"'
        raise RuntimeError(f'implementation="{implementation}" cannot run here: {reason}{way_out}')
    # "auto" will pick the kernels on CUDA once they have won their benchmark on a real GPU.
    return _triton.feature_losses if implementation == "triton" else _fused.feature_losses
