"""The batch of all processes in a group, each of which holds some of its rows.

The batch is split one of two ways, so that no process repeats or holds another's work:

    by rows, D <= B:      each process keeps its rows; the moments and P (D, D) are summed over processes.
    by features, B < D:   processes exchange blocks. Each then holds all rows of its share of the features, and
                          standardises them alone; K (B, B) is summed over processes.

By rows each process sends about 2 D^2 numbers; by features, 3 B D / W + 2 B^2 with W processes. Gathering all rows
would receive 2 B D. Every process gets the same loss. As with torch.distributed's differentiable collectives, gradients
are those of the sum of all processes' losses, so DistributedDataParallel's average is the gradient of the one loss.
"""

import os
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rsd_loss._common import no_autocast, product_dtype

Losses = tuple[Tensor, Tensor, Tensor]
Backend = Callable[..., Losses]


class Shard(NamedTuple):
    """Which part of the global batch this process holds (None: all of it)."""

    group: "dist.ProcessGroup"
    rows: int  # of the global batch
    by_rows: bool  # this process holds all features of some rows, else all rows of some features


def sum_over_rows(x: Tensor, shard: Shard | None) -> Tensor:
    """All-reduces a sum over row shards, in float32 or wider; otherwise a no-op."""
    return _Sum.apply(x, shard.group) if shard is not None and shard.by_rows else x


def sum_over_features(x: Tensor, shard: Shard | None) -> Tensor:
    """All-reduces a sum over feature shards, in float32 or wider; otherwise a no-op."""
    return _Sum.apply(x, shard.group) if shard is not None and not shard.by_rows else x


def merge_over_processes(
    shard: Shard, own_rows: int, means: Tensor, squares: Tensor, product: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the moments of row shards (Chan, Golub and LeVeque).

    Means are (2, D) in float64, as processes share no row to take differences to; squares (2, D) and the product Ct' Cs
    (D, D) are about the process's own means. Returns by how much those differ from the batch's means, then the batch's
    squares and product (no rows if none was given).
    """
    mean_offset = (means - _Sum.apply(own_rows * means, shard.group) / shard.rows).to(squares.dtype)
    squares = squares + own_rows * mean_offset.square()
    products = [] if product is None else [torch.addr(product, mean_offset[1], mean_offset[0], alpha=own_rows)]
    total = _Sum.apply(torch.cat([squares, *products]), shard.group)
    return mean_offset, total[:2], total[2:]


def over_processes(
    backend: Backend, student: Tensor, teacher: Tensor, kappa: float, eps: float, rows: list[int], shard: Shard
) -> Losses:
    """Runs a fast backend on the global batch; same result in every process. ``rows`` are those of each process."""
    group, features = shard.group, student.shape[1]
    if features <= shard.rows:
        out = backend(student, teacher, kappa, eps, shard)
        if out[0].requires_grad:  # every process computed the same losses: their gradient is the sum over processes
            out[0].register_hook(lambda grad: _Sum.apply(grad, group))  # type: ignore[no-untyped-call]
        return out
    rank, world = dist.get_rank(group), len(rows)
    shares = [features // world + (r < features % world) for r in range(world)]
    args = (_Exchange.apply(x, rows, shares, group) for x in (student, teacher))
    own = backend(*args, kappa, eps, shard._replace(by_rows=False))
    padding = (sum(shares[:rank]), sum(shares[rank + 1 :]))
    losses, d, off = _Sum.apply(F.pad(torch.stack(own), padding), group)
    return losses.clone(), d.detach(), off.detach()  # a clone, as views cannot be changed in place


def group_or_none(process_group: "dist.ProcessGroup | None") -> "dist.ProcessGroup | None":
    """The group to gather over, or None if there is none or it is this process alone."""
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError("process_group is given, but torch.distributed is not initialised: initialise it first")
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            warnings.warn(
                "gather_distributed=True has no effect: WORLD_SIZE says that there are other processes, but "
                "torch.distributed is not initialised. Call init_process_group before the first loss",
                stacklevel=2,
            )
        return None
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        if process_group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                f"process_group does not contain this process (rank {dist.get_rank()}): "
                "call the loss in the group's members only, or pass each process the group that it is in"
            )
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}: "
            "take it from torch.distributed.new_group, or from a device mesh with mesh.get_group()"
        )
    group = dist.group.WORLD if process_group is None else process_group
    try:
        dist.get_process_group_ranks(group)
    except KeyError as error:
        raise ValueError("process_group was destroyed since it was made: pass one of the present") from error
    return group if dist.get_world_size(group) > 1 else None


@contextmanager
def failing_together(student: object, group: "dist.ProcessGroup") -> Iterator[None]:
    """If the checks inside raise in one process, `agree` raises in the others, which wait for it there."""
    try:
        yield
    except Exception:
        gather_ints([0], student, group)  # no valid input has 0 rows
        raise


def agree(student: Tensor, teacher: Tensor, must_match: dict[str, Any], group: "dist.ProcessGroup") -> list[int]:
    """Checks that all processes agree, so that none sends what another does not expect; returns the rows of each."""
    must_match = must_match | {"torch.is_grad_enabled()": torch.is_grad_enabled()}
    for name, x in (("student", student), ("teacher", teacher)):
        must_match |= {f"{name}'s width": x.shape[1], f"{name}'s dtype": x.dtype}
        must_match |= {f"{name}.requires_grad": x.requires_grad}
    must_match["the dtype of the products, which torch.autocast may change,"] = product_dtype(student, teacher)
    mine = [zlib.crc32(repr(value).encode()) for value in must_match.values()]
    rows, *theirs = gather_ints([student.shape[0], *mine], student, group)
    if 0 in rows:
        rank = dist.get_global_rank(group, rows.index(0))
        raise ValueError(f"rank {rank} was given bad input: its own error says what")
    for (name, value), code, codes in zip(must_match.items(), mine, theirs, strict=False):
        for index, other in enumerate(codes):
            if other != code:
                raise ValueError(
                    f"{name} must be the same in all processes of the group: it is {value} in rank "
                    f"{dist.get_rank()} and not in rank {dist.get_global_rank(group, index)}"
                )
    return rows


def gather_ints(numbers: list[int], student: object, group: "dist.ProcessGroup") -> list[list[int]]:
    """All-gathers up to 16 integers: for each, a list with one entry per process."""
    device = None
    if isinstance(student, Tensor) and student.device.type not in ("cpu", "meta"):
        device = student.device
    if "cpu" in dist.get_backend_config(group):  # need not wait for work queued on a GPU
        device = torch.device("cpu")
    sent = torch.tensor(numbers + [0] * (16 - len(numbers)), device=device or torch.accelerator.current_accelerator())
    received = _collective("all_gather_into_tensor", sent, dist.get_world_size(group), group=group)
    return received.view(-1, 16).T.tolist()


def _collective(name: str, *args: Any, group: "dist.ProcessGroup") -> Tensor:
    """The result of a functional collective, once it is there.

    Those of torch.distributed change a tensor in place. Activation checkpointing may keep the result of any operation,
    and then would keep it changed.
    """
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(getattr(functional, name)(*args, group.group_name))


class _Sum(torch.autograd.Function):
    """All-reduce, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "dist.ProcessGroup") -> Tensor:
        ctx.group = group
        return _collective("all_reduce", x.to(torch.promote_types(x.dtype, torch.float32)), "sum", group=group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    """From this process's rows of all features (B_r, D) to its share of the features of all rows (B, D_r), or back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: list[int], shares: list[int], group: "dist.ProcessGroup", back: bool = False
    ) -> Tensor:
        ctx.args = (rows, shares, group, not back)
        rank = dist.get_rank(group)
        by_rows, by_features = [n * shares[rank] for n in rows], [rows[rank] * n for n in shares]
        with no_autocast(x.device.type):  # under it, torch.cat would widen dtypes
            if back:
                received = _collective("all_to_all_single", x.contiguous().view(-1), by_features, by_rows, group=group)
                return torch.cat([part.view(rows[rank], -1) for part in torch.split(received, by_features)], dim=1)
            sent = torch.cat([piece.flatten() for piece in torch.split(x, shares, dim=1)])
            return _collective("all_to_all_single", sent, by_rows, by_features, group=group).view(-1, shares[rank])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Embeddings and gradients travel in their own dtype, so nothing is rounded on the way.
        return _Exchange.apply(grad, *ctx.args), None, None, None, None
