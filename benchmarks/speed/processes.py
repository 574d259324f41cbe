"""The loss of the batch of all processes: `python -m benchmarks.throughput --nproc 2 4`.

`distributed` is `gather_distributed=True`. It is measured against gathering and repeating: every process gathers
everybody's rows of both embeddings, through autograd, and computes the loss of all of them again, with the plain
formula (`gather+reference`) or in one process's fused way (`gather+fused`). The processes are joined by gloo on one
machine and have one thread each.

A step's time is that of the slowest process after a barrier; the median is taken over the repetitions, in which the
contestants take turns. On a machine with fewer cores than processes they also wait for each other's arithmetic, which
the column `note` says. Memory is that of the process with the highest peak, as for one process: the least of three
steps', because gloo's threads now and then hold a tensor for longer than the call that it was for.

Bytes sent are those of a process in one step, the mean over the processes. They are the calls that the step makes,
with the sizes it makes them, at the cost of a ring: an all_reduce of n bytes sends 2 n (W - 1) / W, an all_gather of n
from each n (W - 1), and an all_to_all what is for others (as much as a reduce_scatter of the same tensor). They are not
measured on a wire, and a backend may use another algorithm than the ring.
"""

import argparse
import datetime
import multiprocessing
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product, repeat
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from rich.progress import Progress
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import measure, report
from benchmarks.report import short

# Rows in each process, and features.
SHAPES = (
    (128, 192),  # the paper's batch in each process; DeiT-T, narrower than the batch of all: split by rows
    (128, 768),  # Swin-T, ConvNeXt-T, Mixer-B/16, the usual teachers; from here on split by features
    (128, 2048),  # ResNet50
    (128, 8192),  # the wide projectors of self-supervised learning
    (1024, 384),  # ViT-S and a large batch: many rows of few features
)
QUICK_SHAPES = ((16, 24), (16, 100))


@dataclass
class Row:
    """One contestant at one shape in one mode: a line of the CSV."""

    contestant: str
    processes: int
    rows: int  # in each process
    features: int
    dtype: str
    autocast: str
    mode: str
    median_ms: float | None = None
    iqr_ms: float | None = None
    sent_bytes: int | None = None
    peak_bytes: int | None = None
    status: str = "ok"
    note: str = ""
    device: str = ""
    torch: str = ""
    threads: int = 0
    date: str = ""
    commit: str = ""
    command: str = ""

    compiled: ClassVar[bool] = False  # the exchange is not traced


def sent_bytes(
    rows_per_process: int, features: int, processes: int, itemsize: int = 4, mode: str = "value_and_grad"
) -> dict[str, int]:
    """What each contestant sends on paper, per process and step, to compare with what is counted."""
    rows, others, sums, grad = rows_per_process * processes, processes - 1, max(itemsize, 4), mode == "value_and_grad"
    exchanged = 0
    if features <= rows:  # means in float64, squares, P; the upstream, and for half precision the column sums
        summed = 16 * features + (2 * features + features**2 + grad * (1 + (itemsize < 4)) * features) * sums
    else:  # both embeddings, and the student's gradient back; K, the three vectors of the result and their gradient
        exchanged = (2 + grad) * rows_per_process * features * itemsize
        summed = (rows**2 + (1 + grad) * 3 * features) * sums
    agreed = 16 * 8 * others  # the processes tell each other 16 numbers first
    gathered = (2 + grad) * rows_per_process * features * itemsize * others  # embeddings, and the student's gradient
    ours = agreed + round((exchanged + 2 * summed) * others / processes)
    return {"gather+reference": gathered, "gather+fused": gathered, "distributed": ours}


class SentBytes(TorchDispatchMode):
    """Adds up what this process sends, at the cost of a ring."""

    count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            group = dist.ProcessGroup.unbox(next(arg for arg in args if isinstance(arg, torch.ScriptObject)))
            others = group.size() - 1
            match func.overloadpacket.__name__:
                case "allreduce_":
                    self.count += 2 * sum(x.nbytes for x in args[0]) * others / group.size()
                case "_allgather_base_":
                    self.count += args[1].nbytes * others
                case "alltoall_base_":
                    sizes = args[4] or [args[1].shape[0] // group.size()] * group.size()
                    self.count += args[1].nbytes * (1 - sizes[group.rank()] / sum(sizes))
                case name:
                    raise NotImplementedError(f"what {name} sends is not known here")
        return func(*args, **(kwargs or {}))


def join(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(minutes=5)  # for those that wait for one that has failed
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, processes, rank)


def over_processes(value: float, op: Any) -> float:
    out = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(out, op)
    return out.item()


def seconds(step: measure.Step) -> float:
    """Of one step in the slowest process."""
    dist.barrier()
    start = perf_counter()
    step()
    return over_processes(perf_counter() - start, dist.ReduceOp.MAX)


def run_case(rows: list[Row], repeats: int, min_time: float) -> list[Row]:
    """Fills in the rows of one case; in every process at once, which all return the same."""
    torch.manual_seed(dist.get_rank())
    with measure.noted(*rows):  # the tensors themselves may be too large
        student, teacher = torch.randn(2, rows[0].rows, rows[0].features).to(getattr(torch, rows[0].dtype))
        student.requires_grad_()
    if rows[0].status != "ok":
        return rows
    steps, turns = {}, {}
    times: dict[int, list[float]] = {i: [] for i in range(len(rows))}
    for i, row in enumerate(rows):
        with measure.noted(row):
            step = measure.make_step(row, student, teacher)
            with SentBytes() as sent:
                step()  # warms up
            peak = min(measure.peak_bytes(step, student.device) for _ in range(3))
            row.peak_bytes = int(over_processes(peak, dist.ReduceOp.MAX))
            row.sent_bytes = round(over_processes(sent.count, dist.ReduceOp.SUM) / dist.get_world_size())
            steps[i], turns[i] = step, max(3, int(repeats * min_time / seconds(step)))
    for turn in range(max(turns.values(), default=0)):
        for i, step in steps.items():
            if turn < turns[i]:
                times[i].append(seconds(step))
    for i in steps:
        quartiles = statistics.quantiles(times[i], n=4)
        rows[i].median_ms, rows[i].iqr_ms = quartiles[1] * 1e3, (quartiles[2] - quartiles[0]) * 1e3
    return rows


def run(args: argparse.Namespace, origin: dict[str, Any], progress: Progress) -> None:
    """Measures every case, shows each as it is done, and keeps the CSV up to date."""
    done: list[Row] = []
    cores, names, context = os.cpu_count() or 1, args.contestants, multiprocessing.get_context("spawn")
    with progress:
        task = progress.add_task("", total=len(args.nproc) * len(args.shapes) * len(args.modes))
        for n in args.nproc:
            origin["note"] = f"{n} processes share {cores} cores" if n > cores else ""
            with TemporaryDirectory() as folder, ProcessPoolExecutor(n, mp_context=context) as pool:
                # None returns before all have begun: each process takes one call of these and one of every case.
                list(pool.map(join, range(n), repeat(n), repeat(folder)))
                for shape, mode in product(args.shapes, args.modes):
                    progress.update(task, description=f"{n} processes, {shape[0]} x {shape[1]} {mode}")
                    case = [Row(name, n, *shape, args.dtype, args.autocast, mode, **origin) for name in names]
                    case, *_ = pool.map(run_case, repeat(case, n), repeat(args.repeats), repeat(args.min_time))
                    done += case
                    progress.console.print(table(case))
                    progress.advance(task)
                    if args.csv:
                        report.write_csv(done, args.csv)


def table(rows: list[Row]) -> Table:
    first = rows[0]
    rivals = {row.contestant: row.median_ms for row in rows if row.contestant.startswith("gather+")}
    title = f"{first.processes} processes, {first.rows} x {first.features} in each, {first.mode} {first.note}"
    result = Table(title=title, title_justify="left")
    result.add_column("contestant", no_wrap=True)
    for heading in ("ms", *(f"over {name}".replace("+", "+\n") for name in rivals), "sent MB", "peak MB"):
        result.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        if row.median_ms is None:
            result.add_row(row.contestant, row.status)
            continue
        ratios = (f"{rival / row.median_ms:.2f}" if rival else "" for rival in rivals.values())
        megabytes = (f"{count / 1e6:.3f}" for count in (row.sent_bytes, row.peak_bytes))
        result.add_row(row.contestant, f"{row.median_ms:.3f}", *ratios, *megabytes)
    return result


def markdown(rows: list[Row]) -> str:
    """The documentation's table, of the value with the student's gradient, and a line that says where it comes from."""
    lines = [
        "| processes | rows x features in each | gather+reference, ms | gather+fused, ms | distributed, ms "
        "| gather+fused / distributed | MB sent, gathering / distributed | peak MB, gather+fused / distributed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in rows if row.mode == "value_and_grad"]
    for case in dict.fromkeys((row.processes, row.rows, row.features) for row in rows):
        plain, fused, ours = (
            next(row for row in rows if (row.contestant, row.processes, row.rows, row.features) == (name, *case))
            for name in ("gather+reference", "gather+fused", "distributed")
        )
        megabytes = [
            " / ".join(short((getattr(row, name) or 0) / 1e6) for row in (fused, ours))
            for name in ("sent_bytes", "peak_bytes")
        ]
        times = (short(row.median_ms) for row in (plain, fused, ours))
        ratio = short(fused.median_ms / ours.median_ms, "x") if fused.median_ms and ours.median_ms else "-"
        lines.append(f"| {' | '.join(map(str, (case[0], f'{case[1]} x {case[2]}', *times, ratio, *megabytes)))} |")
    first = rows[0]
    notes = "; ".join(dict.fromkeys(row.note for row in rows if row.note))
    lines += [
        "",
        f"Value and student's gradient, {first.dtype}, gloo; medians. {notes[:1].upper()}{notes[1:]}.",
        f"{first.device} in each process; torch {first.torch}; {first.date}; commit {first.commit}; `{first.command}`",
    ]
    return "\n".join(lines)


def markdown_on_paper() -> str:
    """What is sent with the paper's batch in each process, for more of them than one machine has."""
    lines = [
        "| processes | features | split by | gather and repeat, MB | distributed, MB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for processes, features in product((8, 64, 1024), (768, 2048, 8192)):
        sent = sent_bytes(128, features, processes)
        rival, ours = sent["gather+fused"], sent["distributed"]
        split = "rows" if features <= 128 * processes else "features"
        cells = (processes, features, split, short(rival / 1e6), short(ours / 1e6), short(rival / ours, "x"))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The benchmark's own command is throughput's, which imports this module; with other numbers if asked to."""
    from benchmarks import throughput

    throughput.main(["--nproc", "2", "4", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
