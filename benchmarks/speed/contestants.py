"""The contestants: ways to compute the loss, each a function of (student, teacher)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsd_loss import rsd_loss

NAMES = ("naive", "reference", "lightly", "fused", "triton")
OURS = ("fused", "triton")
DISTRIBUTED = ("gather+reference", "gather+fused", "distributed")  # of the batch of all processes
KAPPA = 0.01

Loss = Callable[[Tensor, Tensor], Tensor]


class MissingError(Exception):
    """A contestant cannot run here; the message says why."""


def naive(student: Tensor, teacher: Tensor, kappa: float = KAPPA, eps: float = 1e-5) -> Tensor:
    """The loss as it is commonly written: explicit matrix minus identity, a boolean mask for the off-diagonal."""
    student = (student - student.mean(dim=0)) / (student.std(dim=0, correction=0) + eps)
    teacher = (teacher - teacher.mean(dim=0)) / (teacher.std(dim=0, correction=0) + eps)
    correlation = teacher.T @ student / student.shape[0]
    identity = torch.eye(student.shape[1], dtype=correlation.dtype, device=correlation.device)
    penalty = (correlation - identity) ** 2
    penalty[~identity.bool()] *= kappa
    return penalty.sum()


class _Gather(torch.autograd.Function):
    """The rows of all processes; the gradient of a process's own rows is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
        out = x.new_empty(dist.get_world_size() * x.shape[0], x.shape[1])
        gather(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # As torch.distributed.nn.functional.all_gather does over gloo, whose own reduce_scatter is slower.
        parts = torch.empty_like(grad)
        dist.all_to_all_single(parts, grad.contiguous())
        return parts.unflatten(0, (dist.get_world_size(), -1)).sum(dim=0)


def build(name: str, device: torch.device, compiled: bool) -> Loss:
    """The contestant called `name`; raises MissingError where it cannot run."""
    loss: Loss
    if name == "naive":
        loss = naive
    elif name == "lightly":
        # A peer in cost, not in numbers: it normalises by batch_norm, so its eps is inside the root.
        try:
            from lightly.loss import BarlowTwinsLoss
        except ImportError as error:
            raise MissingError("lightly is not installed") from error
        loss = BarlowTwinsLoss(lambda_param=KAPPA)
    elif name == "distributed":

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            return rsd_loss(student, teacher, kappa=KAPPA, gather_distributed=True)
    elif name.startswith("gather+"):
        repeated = build(name.removeprefix("gather+"), device, compiled)

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            return repeated(_Gather.apply(student), _Gather.apply(teacher))
    else:

        def loss(student: Tensor, teacher: Tensor) -> Tensor:
            return rsd_loss(student, teacher, kappa=KAPPA, implementation=name)  # type: ignore[arg-type]

        if name == "triton":
            try:
                loss(*torch.ones(2, 2, 1, device=device))
            except RuntimeError as error:
                raise MissingError(str(error).partition(" (")[0]) from error

    # The size of naive's masked selection depends on values, which breaks its graph in two.
    return torch.compile(loss, dynamic=False, fullgraph=name != "naive") if compiled else loss
