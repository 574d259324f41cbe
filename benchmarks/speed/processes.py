"""The loss of the batch of all processes: `python -m benchmarks.speed.processes --nproc 2 4`.

`distributed` is `gather_distributed=True`. The alternative is to gather the rows of all processes through autograd and
to repeat the loss in each: `gather+reference` with the plain formula, `gather+fused` in one process's fused way. The
processes are joined by gloo on one machine and have one thread each.

A step's time is that of the slowest process after a barrier; the figure is the median over repetitions, in which the
contestants take turns. Memory is that of the process with the highest peak: the least of three steps', because gloo's
threads sometimes hold a tensor for longer than the call.

Bytes sent are those of one process in one step, the mean over the processes. They are counted from the calls of the
step at the cost of a ring: an all_reduce of n bytes sends 2 n (W - 1) / W, an all_gather of n from each n (W - 1), and
an all_to_all what goes to others. They are not measured on a wire.
"""

import argparse
import datetime
import multiprocessing
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import records
from benchmarks.speed import contestants, measure
from benchmarks.speed.report import short, source

# Rows in each process, and features.
SHAPES = (
    (128, 192),  # the paper's batch in each process; DeiT-T, narrower than the batch of all: split by rows
    (128, 768),  # Swin-T, ConvNeXt-T, Mixer-B/16, the usual teachers; from here on split by features
    (128, 2048),  # ResNet50
    (128, 8192),  # the wide projectors of self-supervised learning
    (1024, 384),  # ViT-S and a large batch: many rows of few features
)
SECONDS = 0.5  # for each contestant at each shape


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


class SentBytes(TorchDispatchMode):
    """Adds up what this process sends, at the cost of a ring."""

    count = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        world, rank = dist.get_world_size(), dist.get_rank()
        match func.overloadpacket.__name__:
            case "all_reduce":
                self.count += 2 * args[0].nbytes * (world - 1) / world
            case "all_gather_into_tensor":
                self.count += args[0].nbytes * (world - 1)
            case "_allgather_base_":
                self.count += args[1].nbytes * (world - 1)
            case "all_to_all_single":
                self.count += args[0].nbytes * (1 - args[2][rank] / sum(args[2]))
            case "alltoall_base_":  # of equal parts
                self.count += args[1].nbytes * (world - 1) / world
            case name if "c10d" in func.namespace and name != "wait_tensor":
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


def run_case(rows: list[Row]) -> list[Row]:
    """Fills in the rows of one shape; in every process at once, which all return the same."""
    torch.manual_seed(dist.get_rank())
    with measure.noted(*rows):  # the tensors themselves may be too large
        pair = measure.embeddings(rows[0], torch.device("cpu"))
    if rows[0].status != "ok":
        return rows
    steps, turns = {}, {}
    times: dict[int, list[float]] = {i: [] for i in range(len(rows))}
    for i, row in enumerate(rows):
        with measure.noted(row):
            step = measure.make_step(row, *pair)
            with SentBytes() as sent:
                step()  # warms up
            peak = min(measure.peak_bytes(step, pair[0].device) for _ in range(3))
            row.peak_bytes = int(over_processes(peak, dist.ReduceOp.MAX))
            row.sent_bytes = round(over_processes(sent.count, dist.ReduceOp.SUM) / dist.get_world_size())
            steps[i], turns[i] = step, max(3, int(SECONDS / seconds(step)))
    for turn in range(max(turns.values(), default=0)):
        for i, step in steps.items():
            if turn < turns[i]:
                times[i].append(seconds(step))
    for i in steps:
        quartiles = statistics.quantiles(times[i], n=4)
        rows[i].median_ms, rows[i].iqr_ms = quartiles[1] * 1e3, (quartiles[2] - quartiles[0]) * 1e3
    return rows


def run(processes: int, shapes: Sequence[tuple[int, int]], origin: dict[str, Any]) -> list[Row]:
    """Measures every shape with this number of processes."""
    done: list[Row] = []
    cores, context = os.cpu_count() or 1, multiprocessing.get_context("spawn")
    note = f"{processes} processes share {cores} cores" if processes > cores else ""
    columns = {"note": note, "threads": 1, **origin}
    with TemporaryDirectory() as folder, ProcessPoolExecutor(processes, mp_context=context) as pool:
        # No call of `join` returns before all have begun, so each process takes one, and later one of each case.
        list(pool.map(join, range(processes), repeat(processes), repeat(folder)))
        for shape in track(shapes, f"{processes} processes"):
            names = contestants.DISTRIBUTED
            case = [Row(name, processes, *shape, "float32", "", "value_and_grad", **columns) for name in names]
            case, *_ = pool.map(run_case, repeat(case, processes))
            done += case
    return done


def table(rows: list[Row]) -> Table:
    result = Table("processes", "rows x features", show_edge=False)
    result.add_column("implementation", no_wrap=True)
    for heading in ("ms", "sent MB", "peak MB"):
        result.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        cells = [row.status]
        if row.median_ms is not None:
            cells = [f"{row.median_ms:.3f}", *(f"{(n or 0) / 1e6:.3f}" for n in (row.sent_bytes, row.peak_bytes))]
        result.add_row(str(row.processes), f"{row.rows} x {row.features}", row.contestant, *cells)
    return result


def markdown(rows: list[Row]) -> str:
    """The page's table, of the value with the student's gradient, and a line that says where it comes from."""
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
    notes = ". ".join(dict.fromkeys(row.note for row in rows if row.note))
    told = f"Value and student's gradient, {rows[0].dtype}, gloo; medians. {notes[:1].upper()}{notes[1:]}."
    return "\n".join([*lines, "", told, source(rows[0])])


def count(text: str) -> int:
    if not text.isdecimal() or not 1 < int(text) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} given, a number of processes from 2 to 99 expected")
    return int(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.processes",
        description="The loss of the batch of N processes on this machine's CPU, beside gathering all rows and "
        "repeating it in each process. Takes about a minute for each N.",
    )
    parser.add_argument("--nproc", type=count, nargs="+", default=[2], metavar="N", help="default: 2")
    parser.add_argument("--csv", type=records.output, metavar="PATH", help="write the measurements there")
    args = parser.parse_args(argv)
    origin, rows = records.origin("benchmarks.speed.processes", argv, torch.device("cpu"), 1), []
    for processes in args.nproc:
        rows += run(processes, SHAPES, origin)
        if args.csv:
            records.write_csv(rows, args.csv)
    Console().print(table(rows))


if __name__ == "__main__":
    main()
