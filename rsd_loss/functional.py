"""The loss and the matrix it is made of, as functions: argument checks, then dispatch."""

import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from rsd_loss import _distributed, _fused, reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Reduction = Literal["sum", "mean", "none"]
Implementation = Literal["auto", "fused", "triton", "reference"]

# (student, teacher, kappa, eps, shard) to (D,) losses, P_jj and sum_i P_ij^2; only the losses carry a gradient.
FeatureLosses = Callable[[Tensor, Tensor, float, float, _distributed.Shard | None], tuple[Tensor, Tensor, Tensor]]

_REDUCTIONS = ("sum", "mean", "none")
_IMPLEMENTATIONS = ("auto", "fused", "triton", "reference")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RSDTerms(NamedTuple):
    """The two parts of the loss, detached, for logging.

    They are reduced as the loss is (over features: averaged for ``reduction="mean"``, summed otherwise), so that
    the reduced loss equals ``invariance + kappa * decorrelation``.

    Attributes:
        invariance: Scalar, sum_i (P_ii - 1)^2; 0 when every student feature matches its teacher feature.
        decorrelation: Scalar, sum_{i != j} P_ij^2, not yet weighted by kappa.
    """

    invariance: Tensor
    decorrelation: Tensor


@overload
def rsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kappa: float = ...,
    eps: float = ...,
    reduction: Reduction = ...,
    gather_distributed: bool = ...,
    process_group: "ProcessGroup | None" = ...,
    implementation: Implementation = ...,
    return_terms: Literal[False] = ...,
) -> Tensor: ...
@overload
def rsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kappa: float = ...,
    eps: float = ...,
    reduction: Reduction = ...,
    gather_distributed: bool = ...,
    process_group: "ProcessGroup | None" = ...,
    implementation: Implementation = ...,
    return_terms: Literal[True],
) -> tuple[Tensor, RSDTerms]: ...
@overload
def rsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kappa: float = ...,
    eps: float = ...,
    reduction: Reduction = ...,
    gather_distributed: bool = ...,
    process_group: "ProcessGroup | None" = ...,
    implementation: Implementation = ...,
    return_terms: bool,
) -> Tensor | tuple[Tensor, RSDTerms]: ...


def rsd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kappa: float = 0.01,
    eps: float = 1e-5,
    reduction: Reduction = "sum",
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
    implementation: Implementation = "auto",
    return_terms: bool = False,
) -> Tensor | tuple[Tensor, RSDTerms]:
    r"""Redundancy Suppression Distillation loss between two batches of embeddings.

    With Z the embeddings standardised per feature over the batch, and the cross-correlation P = Zt' Zs / B,

    $$ L = \sum_i (P_{ii} - 1)^2 + \kappa \sum_{i \ne j} P_{ij}^2 $$

    The diagonal ties each student feature to its teacher feature (invariance maximisation); the off-diagonal keeps
    it from repeating the others (feature decorrelation). Source: Zhang, Liu, Ran and Ma, "Cross-Architecture
    Distillation Made Simple with Redundancy Suppression", ICCV 2025, arXiv 2507.21844.

    Args:
        student: (B, D) student embeddings, usually from ``DecouplingProjector``; B >= 2; float16, bfloat16,
            float32 or float64.
        teacher: (B, D) teacher embeddings of the same samples in the same order. A teacher that requires grad gets
            its gradient; use ``torch.no_grad()`` around a frozen one.
        kappa: Weight of the decorrelation term; the paper's value is 0.01.
        eps: Added to the standard deviation (outside the root), in the units of the embeddings.
        reduction: ``"sum"`` is the paper's loss; ``"mean"`` divides it by D, so that its weight does not depend on
            the width; ``"none"`` gives the (D,) losses of the student's features.
        gather_distributed: Take the batch to be that of all processes in ``process_group``, whose numbers of rows may
            differ. Every process gets the same loss, and gradients whose average over the processes, which
            DistributedDataParallel and FSDP take, is the gradient of that loss. All processes must make the call. No
            effect in a single process.
        process_group: The processes to gather over; the default group if None.
        implementation: ``"auto"`` picks the fastest; ``"fused"``, ``"triton"`` and ``"reference"`` give the same
            numbers by different means.
        return_terms: Also return the two terms.

    Returns:
        The loss: a scalar, or (D,) for ``reduction="none"``; float64 for float64 embeddings, else float32 (a half
        precision sum over features could overflow). With ``return_terms=True``, ``(loss, RSDTerms)``.

    Raises:
        TypeError: An embedding is not a floating-point tensor, or kappa or eps not a number.
        ValueError: Shapes, devices, ranges or names do not fit, in this process or, gathering, between processes; the
            message says which and what to do.
        RuntimeError: The implementation named cannot run here; the message says why.
    """
    if gather_distributed:
        losses, d, q = _gathered_losses(student, teacher, kappa, eps, reduction, implementation, process_group)
    else:
        check_settings(kappa, eps, reduction, implementation, gather_distributed, process_group)
        losses, d, q = _own_losses(student, teacher, kappa, eps, implementation)
    loss = _reduce(losses, reduction)
    if not return_terms:
        return loss
    over_features: Reduction = "mean" if reduction == "mean" else "sum"
    return loss, RSDTerms(_reduce((d - 1).square(), over_features), _reduce(q - d.square(), over_features))


def cross_correlation(
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-5,
    gather_distributed: bool = False,
    process_group: "ProcessGroup | None" = None,
) -> Tensor:
    """Cross-correlation matrix of two batches of embeddings, P = Zt' Zs / B.

    Use it to look at the matrix or to build a loss of one's own; ``rsd_loss`` does not need to form it.

    Args:
        student: (B, D_student) embeddings; B >= 2; float16, bfloat16, float32 or float64.
        teacher: (B, D_teacher) embeddings of the same samples in the same order; the widths may differ.
        eps: Added to the standard deviation (outside the root), in the units of the embeddings.
        gather_distributed: Take the batch to be that of all processes in ``process_group``, as in ``rsd_loss``.
        process_group: The processes to gather over; the default group if None.

    Returns:
        (D_teacher, D_student) matrix with entries in [-1, 1]; of the dtype a product of the two would have.

    Raises:
        TypeError: An embedding is not a floating-point tensor, or eps not a number.
        ValueError: Shapes, devices or ranges do not fit; the message says which and what to do.
    """
    if gather_distributed:
        p: Tensor = _gathered_correlation(student, teacher, eps, process_group)
        return p
    _check_gather(gather_distributed, process_group)
    return _own_correlation(student, teacher, eps)


def _own_losses(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, implementation: Implementation
) -> tuple[Tensor, Tensor, Tensor]:
    check_embeddings(student, teacher, same_width=True)
    return _backend(implementation, student, teacher)(student, teacher, kappa, eps, None)


def _own_correlation(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    _check_non_negative("eps", eps)
    check_embeddings(student, teacher)
    return reference.cross_correlation(student, teacher, eps)


# Whether there are other processes may change between calls, whether the embeddings fit is for all of them to agree on
# before any sends, and how they are shared out follows from what the others hold: decisions on the host, which the
# compiler leaves to Python. The decorator does what torch.compiler.disable does, and does not load the compiler when
# this module is imported.
@_disable_dynamo
def _gathered_losses(
    student: Tensor,
    teacher: Tensor,
    kappa: float,
    eps: float,
    reduction: Reduction,
    implementation: Implementation,
    process_group: "ProcessGroup | None",
) -> tuple[Tensor, Tensor, Tensor]:
    group = _distributed.group_or_none(process_group)
    if group is None:
        check_settings(kappa, eps, reduction, implementation, True, process_group)
        return _own_losses(student, teacher, kappa, eps, implementation)
    try:
        check_settings(kappa, eps, reduction, implementation, True, process_group)
        check_embeddings(student, teacher, same_width=True, min_rows=1)
        feature_losses = _backend(implementation, student, teacher)
    except (TypeError, ValueError, RuntimeError) as error:
        _distributed.fail(error, student, group)
    facts = {
        "kappa": float(kappa),
        "eps": float(eps),
        "implementation": implementation,
        "the dtype of the products, which torch.autocast may change,": _fused.product_dtype(student, teacher),
    }
    rows = _distributed.agree(student, teacher, facts, group)
    if feature_losses is reference.feature_losses:  # sums as its equations do, whatever the shape
        shard = _distributed.Shard(group, sum(rows), student.shape[1], by_rows=True)
        return reference.feature_losses(student, teacher, kappa, eps, shard)
    return _distributed.feature_losses(feature_losses, student, teacher, kappa, eps, rows, group)


@_disable_dynamo
def _gathered_correlation(student: Tensor, teacher: Tensor, eps: float, process_group: "ProcessGroup | None") -> Tensor:
    group = _distributed.group_or_none(process_group)
    if group is None:
        return _own_correlation(student, teacher, eps)
    try:
        _check_non_negative("eps", eps)
        check_embeddings(student, teacher, min_rows=1)
    except (TypeError, ValueError) as error:
        _distributed.fail(error, student, group)
    rows = _distributed.agree(student, teacher, {"eps": float(eps)}, group)
    shard = _distributed.Shard(group, sum(rows), student.shape[1], by_rows=True)
    return reference.cross_correlation(student, teacher, eps, shard)


def check_settings(
    kappa: float,
    eps: float,
    reduction: str,
    implementation: str,
    gather_distributed: bool,
    process_group: "ProcessGroup | None",
) -> None:
    """Raises unless the arguments that RSDLoss shares with rsd_loss are valid."""
    _check_gather(gather_distributed, process_group)
    _check_non_negative("kappa", kappa)
    _check_non_negative("eps", eps)
    for name, value, known in (
        ("reduction", reduction, _REDUCTIONS),
        ("implementation", implementation, _IMPLEMENTATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _backend(implementation: Implementation, student: Tensor, teacher: Tensor) -> FeatureLosses:
    if implementation == "reference":
        return reference.feature_losses
    if implementation == "triton":
        from rsd_loss import _triton  # on use only: importing Triton takes long, and it need not be there

        if reason := _triton.unavailable(student, teacher):
            raise RuntimeError(f'implementation="triton" cannot run here: {reason}')
        return _triton.feature_losses
    # "auto" will pick the kernels on CUDA once they have won their benchmark on a real GPU.
    return _fused.feature_losses


def _check_non_negative(name: str, value: float) -> None:
    # A tensor is refused too: comparing it would read its value, a hidden device synchronisation.
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}: pass a Python float")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a finite number that is not negative, got {value}")


def _check_gather(gather_distributed: bool, process_group: "ProcessGroup | None") -> None:
    if process_group is not None and not gather_distributed:
        raise ValueError("process_group is given but gather_distributed is False: pass gather_distributed=True with it")


def check_embeddings(student: Tensor, teacher: Tensor, same_width: bool = False, min_rows: int = 2) -> None:
    """Raises unless both are (B, D) floating-point tensors that fit; looks at metadata only, never at values."""
    for name, x in (("student", student), ("teacher", teacher)):
        check_tensor(name, x)
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}: "
                "pass real-valued embeddings, not labels or indices"
            )
        if x.ndim != 2:
            pooled = "pool maps and tokens with rsd_loss.features.pool, or make samples of positions with dense_pairs"
            way_out = pooled if x.ndim > 2 else "keep the batch dimension"
            raise ValueError(f"{name} must be (batch, features), got shape {tuple(x.shape)}: {way_out}")
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one feature, got shape {tuple(x.shape)}")
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student has {student.shape[0]} rows and teacher {teacher.shape[0]}: "
            "row i of both must be the embedding of the same sample"
        )
    if student.shape[0] < min_rows:
        raise ValueError(
            f"student and teacher must have at least {min_rows} row{'s' * (min_rows > 1)} to correlate over, "
            f"got {student.shape[0]}: skip the batch{' in all processes' * (min_rows < 2)}, "
            "or set drop_last=True in the DataLoader"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student is on {student.device} and teacher on {teacher.device}: "
            "move the teacher's with .to(student.device)"
        )
    if same_width and student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"student has {student.shape[1]} features and teacher {teacher.shape[1]}: "
            f"project the student with DecouplingProjector({student.shape[1]}, {teacher.shape[1]}), "
            f"or give the projector that it comes from out_features={teacher.shape[1]}"
        )


def check_tensor(name: str, x: object) -> None:
    """Raises unless x is a tensor."""
    if not isinstance(x, Tensor):
        way_out = "convert it with torch.as_tensor"
        if x is None or isinstance(x, (tuple, dict)):
            way_out = "pick the embedding out of the model's output"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}: {way_out}")


def _reduce(losses: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()
