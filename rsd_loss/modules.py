"""The loss and the projector as modules."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from rsd_loss._common import autocasts, check_embedding, check_integer
from rsd_loss.functional import Implementation, Reduction, RSDTerms, check_gather, check_settings, rsd_loss


class RSDLoss(nn.Module):
    """Redundancy Suppression Distillation loss; see ``rsd_loss`` for the mathematics and every argument.

    It has no parameters: the projector stays separate, since its parameters belong to the student's optimizer,
    wrapper and checkpoints. Source: Zhang, Liu, Ran and Ma, ICCV 2025, arXiv 2507.21844.

    Args:
        kappa: Weight of the decorrelation term. The paper's 0.01 is not for every teacher: see ``rsd_loss``.
        eps: Added to the standard deviation, in the units of the embeddings.
        reduction: ``"sum"`` (the paper), ``"mean"`` or ``"none"``.
        gather_distributed: Take the global batch, of all processes in ``process_group``.
        process_group: The processes to gather over; the default group if None. A deep copy keeps the group. A group
            exists in its own process only, so pickling a module that holds one raises an error: set it to
            None first.
        implementation: ``"auto"``, ``"fused"``, ``"triton"`` or ``"reference"``.
        return_terms: Return ``(loss, RSDTerms)`` rather than the loss.

    Shape:
        Student (B, D) and teacher (B, D), in float16, bfloat16, float32 or float64; output a scalar, or (D,) for
        ``reduction="none"``, in float64 for float64 embeddings, else float32.

    Raises:
        TypeError: kappa or eps is not a number.
        ValueError: A number is out of range or a name unknown.

    Examples:
        >>> criterion = RSDLoss()
        >>> loss = criterion(torch.randn(32, 64, requires_grad=True), torch.randn(32, 64))
        >>> loss.backward()
    """

    _shown = ("kappa", "eps", "reduction", "gather_distributed", "implementation", "return_terms")

    def __init__(
        self,
        *,
        kappa: float = 0.01,
        eps: float = 1e-5,
        reduction: Reduction = "sum",
        gather_distributed: bool = False,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        implementation: Implementation = "auto",
        return_terms: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed, process_group)
        self.kappa, self.eps = check_settings(kappa, eps, reduction, implementation)
        self.reduction = reduction
        self.gather_distributed = gather_distributed
        self.process_group = process_group
        self.implementation = implementation
        self.return_terms = return_terms

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor | tuple[Tensor, RSDTerms]:
        """(B, D) student and (B, D) teacher embeddings to the loss; see ``rsd_loss``."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in (*self._shown, "process_group")}
        return rsd_loss(student, teacher, **settings)

    def extra_repr(self) -> str:
        """The settings, as repr shows them."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._shown)

    def __deepcopy__(self, memo: dict[int, Any]) -> "RSDLoss":
        """A group cannot be copied; the copy uses the same."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class DecouplingProjector(nn.Module):
    """Maps student embeddings to the teacher's width, so that the student's own features need not copy the teacher's.

    Linear -> BatchNorm1d -> GELU -> Linear; the Linear layers have no bias. The paper calls it architecture-agnostic
    decoupling. Train it with the student (give the optimizer its parameters too) and drop it afterwards. Source: Zhang,
    Liu, Ran and Ma, ICCV 2025, arXiv 2507.21844.

    Args:
        in_features: Width of the student's embedding.
        out_features: Width of the teacher's embedding.
        expansion: The hidden width is ``expansion * in_features``; the paper's value is 2.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        Input (B, in_features), output (B, out_features). Both have the parameters' dtype, float32 by default; under
        autocast the input may have another, and the output has autocast's. B >= 2 in training mode, as for any
        BatchNorm1d.

    Raises:
        TypeError: A width or the expansion is not an int; in forward, the embedding has another dtype.
        ValueError: A width or the expansion is less than 1; in forward, shape or device do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        expansion: int = 2,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features)
        self.out_features = out_features = check_integer("out_features", out_features)
        hidden = check_integer("expansion", expansion) * self.in_features
        self.expand = nn.Linear(self.in_features, hidden, bias=False, device=device, dtype=dtype)
        self.norm = nn.BatchNorm1d(hidden, device=device, dtype=dtype)
        self.activation = nn.GELU()
        self.project = nn.Linear(hidden, out_features, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights (std 0.02), and BatchNorm as new."""
        nn.init.trunc_normal_(self.expand.weight, std=0.02)
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        self.norm.reset_parameters()

    def forward(self, student: Tensor) -> Tensor:
        """(B, in_features) to (B, out_features)."""
        check_embedding("student", student)
        if student.shape[1] != self.in_features:
            raise ValueError(
                f"student must be (batch, {self.in_features}), got shape {tuple(student.shape)}: "
                "give in_features the embedding's width"
            )
        weight = self.expand.weight
        if student.device != weight.device:
            raise ValueError(
                f"student is on {student.device} and the projector on {weight.device}: move it with .to(student.device)"
            )
        if student.dtype != weight.dtype and not autocasts(student.device.type):
            raise TypeError(
                f"student is {student.dtype} and the projector {weight.dtype}: "
                "convert the projector with .to(student.dtype), or call it under autocast"
            )
        # Converted to SyncBatchNorm it is content with one row here, if other processes have more.
        if self.training and student.shape[0] < 2 and isinstance(self.norm, nn.BatchNorm1d):
            raise ValueError(
                f"student must have at least 2 rows in training mode, got {student.shape[0]}: "
                "skip the batch, or set drop_last=True in the DataLoader"
            )
        return self.project(self.activation(self.norm(self.expand(student))))
