"""The batch of all processes in a group, each of which holds some of its rows.

The batch is split one of two ways, so that no process multiplies or holds what another does:

    by rows, D <= B:      every process keeps its rows; the moments and P (D, D) are sums over the processes.
    by features, B < D:   the processes exchange blocks, so that each holds all rows of an even share of the features
                          and standardises them alone; K (B, B) is the sum over the processes.

By rows each sends about 2 D^2 numbers, by features 3 B D / W + 2 B^2 with W processes, where gathering everybody's rows
receives 2 B D. Every process gets the same loss. Gradients are those of the sum of all processes' losses (as those of
torch.distributed's differentiable collectives), so that the average that DistributedDataParallel takes of them is the
gradient of the one loss.
"""

import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from rsd_loss._common import product_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """How a process's embeddings are part of the whole batch; None stands for a batch that is all there."""

    group: "ProcessGroup"
    rows: int  # of the whole batch
    features: int  # of the whole batch
    by_rows: bool  # what a process holds: all features of some rows, else all rows of some features


def sum_over_rows(x: Tensor, shard: Shard | None) -> Tensor:
    """Completes a sum over the rows that this process holds; in float32 at least where that sends anything."""
    return _Sum.apply(x, shard.group) if shard is not None and shard.by_rows else x


def sum_over_features(x: Tensor, shard: Shard | None) -> Tensor:
    """Completes a sum over the features that this process holds; in float32 at least where that sends anything."""
    return _Sum.apply(x, shard.group) if shard is not None and not shard.by_rows else x


def merge_over_processes(
    shard: Shard, own_rows: int, means: Tensor, squares: Tensor, product: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Completes moments over the rows that this process holds (Chan, Golub and LeVeque).

    Means are (2, D) in float64, as processes share no row to take differences to; squares (2, D) and the product Ct' Cs
    (D, D) are about them. Returns by how much the means differ from those of the batch, and the batch's squares and
    product (no rows if none was given).
    """
    apart = (means - _Sum.apply(own_rows * means, shard.group) / shard.rows).to(squares.dtype)
    squares = squares + own_rows * apart.square()
    products = [] if product is None else [torch.addr(product, apart[1], apart[0], alpha=own_rows)]
    total = _Sum.apply(torch.cat([squares, *products]), shard.group)
    return apart, total[:2], total[2:]


# Whether there are other processes may change between calls, whether the embeddings fit is for all of them to agree on
# before any sends, and how they are shared out follows from what the others hold: decisions on the host, which the
# compiler leaves to Python. The decorator does what torch.compiler.disable does, and does not load the compiler when
# this module is imported.
@_disable_dynamo
def gathered(
    choose: Callable[[int], Callable[..., Any]],
    student: Tensor,
    teacher: Tensor,
    numbers: dict[str, float],
    facts: dict[str, str],
    process_group: "ProcessGroup | None",
) -> Any:
    """What a backend computes, of the batch of all processes and the same in each.

    ``choose`` checks the arguments, embeddings for a least number of rows, and returns the backend that they are for.
    ``numbers``, which it takes after the embeddings, and ``facts`` must be the same in all processes.
    """
    group = _group_or_none(process_group)
    if group is None:
        return choose(2)(student, teacher, *map(float, numbers.values()))
    backend, rows = _agree(choose, student, teacher, {**facts, **numbers}, group)
    features, whole, settings = student.shape[1], sum(rows), [float(x) for x in numbers.values()]
    by_rows = Shard(group, whole, features, by_rows=True)
    if facts["implementation"] == "reference":  # sums as its equations do, whatever the shape, and so do its gradients
        return backend(student, teacher, *settings, by_rows)
    if features <= whole:
        out = backend(student, teacher, *settings, by_rows)
        if out[0].requires_grad:  # what every process has computed alike: its gradient is the sum of theirs
            out[0].register_hook(lambda grad: _Sum.apply(grad, group))
        return out
    shares = [features // len(rows) + (rank < features % len(rows)) for rank in range(len(rows))]
    args = (_Exchange.apply(x, rows, shares, group) for x in (student, teacher))
    shared = backend(*args, *settings, by_rows._replace(by_rows=False))
    rank = dist.get_rank(group)
    before = sum(shares[:rank])
    padding = (before, features - before - shares[rank])
    losses, d, off = _Sum.apply(F.pad(torch.stack(shared), padding), group)
    return losses.clone(), d.detach(), off.detach()  # and not a view, which could not be changed in place


def _group_or_none(process_group: "ProcessGroup | None") -> "ProcessGroup | None":
    """The group to gather over, or None if there is none or it is this process alone."""
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            raise ValueError("process_group is given, but torch.distributed is not initialised: initialise it first")
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            warnings.warn(
                "gather_distributed=True has no effect: WORLD_SIZE says that there are other processes, but "
                "torch.distributed is not initialised. Call init_process_group before the first loss",
                stacklevel=6,
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


def _agree(
    choose: Callable[[int], Any], student: Tensor, teacher: Tensor, facts: dict[str, Any], group: "ProcessGroup"
) -> tuple[Any, list[int]]:
    """What is chosen, and the rows of every process; raises in all if one fails, or they differ where they must not.

    One small exchange that the processes wait for: none may start to send what another does not expect.
    """
    try:
        chosen = choose(1)
        if student.device.type == "meta":
            raise ValueError("student and teacher are on meta, and what has no values cannot be gathered")
    except (TypeError, ValueError, RuntimeError):
        _tell([0], student, group)  # no valid input is without rows
        raise
    facts |= {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "student's width": student.shape[1],
        "teacher's width": teacher.shape[1],
        "student's dtype": student.dtype,
        "teacher's dtype": teacher.dtype,
        "student.requires_grad": student.requires_grad,
        "teacher.requires_grad": teacher.requires_grad,
        "the dtype of the products, which torch.autocast may change,": product_dtype(student, teacher),
    }
    mine = [zlib.crc32(repr(fact).encode()) for fact in facts.values()]
    rows, *theirs = _tell([student.shape[0], *mine], student, group)
    if 0 in rows:
        rank = dist.get_global_rank(group, rows.index(0))
        raise ValueError(f"rank {rank} was given bad input: its own error says what")
    for (name, fact), code, codes in zip(facts.items(), mine, theirs, strict=False):
        for index, other in enumerate(codes):
            if other != code:
                raise ValueError(
                    f"{name} must be the same in all processes of the group: it is {fact} in rank "
                    f"{dist.get_rank()} and not in rank {dist.get_global_rank(group, index)}"
                )
    return chosen, rows


def _tell(numbers: list[int], student: object, group: "ProcessGroup") -> list[list[int]]:
    """The numbers of every process: for each number, a list with one entry per process."""
    device = None
    if isinstance(student, Tensor) and student.device.type not in ("cpu", "meta"):
        device = student.device
    if "cpu" in dist.get_backend_config(group):
        # There it does not wait for the work that a GPU still has before it.
        device = torch.device("cpu")
    sent = torch.tensor(numbers + [0] * (16 - len(numbers)), device=device or torch.accelerator.current_accelerator())
    received = sent.new_empty(dist.get_world_size(group) * 16)
    dist.all_gather_into_tensor(received, sent, group=group)
    columns: list[list[int]] = received.view(-1, 16).T.tolist()
    return columns


class _Sum(torch.autograd.Function):
    """The sum over the processes; so is its gradient, as each process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: "ProcessGroup") -> Tensor:
        ctx.group = group
        dtype = torch.promote_types(x.dtype, torch.float32)
        x = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    """From this process's rows of all features (B_r, D) to its share of the features of all rows (B, D_r), or back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: list[int], shares: list[int], group: "ProcessGroup", back: bool = False
    ) -> Tensor:
        ctx.args = (rows, shares, group, not back)
        rank = dist.get_rank(group)
        if not back:
            pieces = torch.split(x, shares, dim=1)
            return _send(pieces, [n * shares[rank] for n in rows], group).view(-1, shares[rank])
        own = rows[rank]
        received = _send(torch.split(x, rows), [own * n for n in shares], group)
        parts = torch.split(received, [own * n for n in shares])
        out = x.new_empty(own, sum(shares))
        for part, columns in zip(parts, torch.split(out, shares, dim=1), strict=True):
            columns.copy_(part.view(own, -1))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Embeddings travel in their own dtype and so do their gradients, so that nothing is rounded on the way.
        return _Exchange.apply(grad, *ctx.args), None, None, None, None


def _send(pieces: Sequence[Tensor], sizes: list[int], group: "ProcessGroup") -> Tensor:
    """The i-th piece goes to the i-th process; what each of them sent comes back, flat and in their order."""
    lengths = [piece.numel() for piece in pieces]
    sent, received = pieces[0].new_empty(sum(lengths)), pieces[0].new_empty(sum(sizes))
    for piece, place in zip(pieces, torch.split(sent, lengths), strict=True):
        place.view(piece.shape).copy_(piece)  # and not torch.cat, to which autocast has objections
    dist.all_to_all_single(received, sent, sizes, lengths, group=group)
    return received
