"""Throughput of the loss: `python -m benchmarks.throughput`.

Every contestant computes the loss of the same tensors in this one process, in two modes: `value_and_grad`, the value
and the student's gradient, and `value` alone, under no_grad. Each runs eagerly and under torch.compile.

Time is the median over several rounds in which the contestants take turns (torch.utils.benchmark), compilation left
out. The limit is the time that the arithmetic, 4 B D min(B, D) operations, or the traffic, 3 passes over (B, D), takes
at the best rates of a matrix product and of a copy measured in the same run, whichever is longer; for the value alone
it is min(2 B D^2, 4 B^2 D) operations or 2 passes.

Memory is the peak of what one step allocates beyond its inputs, the gradient included: the CUDA allocator's peak, or on
CPU the running sum of the allocations that torch.profiler records, which a library's own scratch space is not part of.

Operations on a machine without a GPU are a proxy for CUDA kernel launches: the operations that one step dispatches,
views and bare allocations left out. One operation may launch several kernels (a boolean mask does), and compiled code
does not dispatch, so its count is blank. On CUDA the kernels themselves are counted.

`--nproc` measures the loss of the batch of several processes instead: see benchmarks/distributed.py.
"""

import argparse
import logging
import platform
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch.utils.benchmark import Measurement

from benchmarks.speed import processes as distributed, measure, report, contestants as rivals
from benchmarks.report import Row

SHAPES = (
    # The paper's batch, 128; D is the teacher's width.
    (128, 192),  # DeiT-T
    (128, 384),  # ViT-S
    (128, 512),  # ResNet18
    (128, 768),  # Swin-T, ConvNeXt-T, Mixer-B/16: the usual teachers
    (128, 1024),  # Swin-B and other larger teachers
    (128, 2048),  # ResNet50
    # The wide projectors of self-supervised learning.
    (64, 4096),
    (128, 8192),
    # Large batches, or the global batch of several processes: B below, just above and far above D.
    (512, 768),
    (1024, 768),
    (4096, 768),
    # Many samples of few features; the last is 256 maps of 14 x 14 positions.
    (8192, 256),
    (50176, 384),
)
QUICK_SHAPES = ((128, 64), (128, 256))
MODES = ("value_and_grad", "value")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def run_case(rows: list[Row], device: torch.device, repeats: int, min_time: float, advance: Callable[[], Any]) -> None:
    """Fills in the rows of one shape and mode."""
    torch._dynamo.reset()  # else the shapes add up to torch.compile's limit of recompilations
    torch.manual_seed(0)
    with measure.noted(*rows):  # the tensors themselves may be too large
        student, teacher = torch.randn(2, *rows[0].shape, device=device).to(getattr(torch, rows[0].dtype))
        student.requires_grad_()
    if rows[0].status != "ok":
        return
    steps: dict[int, measure.Step] = {}
    times: dict[int, list[Measurement]] = {i: [] for i in range(len(rows))}
    for i, row in enumerate(rows):
        with measure.noted(row):
            step = measure.make_step(row, student, teacher)
            step()  # compiles; the measurements that follow warm up
            row.peak_bytes = measure.peak_bytes(step, device)
            row.operations = measure.operations(step, device, row.compiled)
            steps[i] = step
        advance()
    for turn, (i, step) in product(range(repeats), steps.items()):
        slow = turn >= 3 and times[i][-1].median > min_time
        if rows[i].status == "ok" and not slow:
            with measure.noted(rows[i]):
                times[i].append(measure.timer(step).blocked_autorange(min_run_time=min_time))
    for row, measured in zip(rows, times.values(), strict=True):
        if measured and row.status == "ok":
            merged = Measurement.merge(measured)[0]
            row.median_ms, row.iqr_ms = merged.median * 1e3, merged.iqr * 1e3


def table(rows: list[Row]) -> Table:
    first = rows[0]
    naive = next((row.median_ms for row in rows if row.label == "naive"), None)
    title = f"{first.rows} x {first.features}, {first.mode}; limit {first.limit_ms:.3g} ms"
    result = Table(title=title, title_justify="left")
    result.add_column("contestant", no_wrap=True)
    for heading in ("ms", "over naive", "x limit", "peak MB", "operations"):
        result.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        if row.status.startswith("missing"):
            continue  # said once, at the end
        if row.median_ms is None:
            result.add_row(row.label, row.status)
            continue
        result.add_row(
            row.label,
            f"{row.median_ms:.3f}",
            f"{naive / row.median_ms:.2f}" if naive else "",
            f"{row.median_ms / row.limit_ms:.1f}",
            f"{(row.peak_bytes or 0) / 1e6:.2f}",
            "" if row.operations is None else str(row.operations),
        )
    return result


def describe(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {threads} thread{'s' * (threads > 1)}"


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.check_output(command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,12})x(\d{1,12})", text)
    rows, features = map(int, match.groups()) if match else (0, 0)
    if rows < 2 or features < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, ROWSxFEATURES of at least 2x1 expected, such as 128x768")
    return rows, features


def duration(text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} given, a number of seconds above 0 expected, such as 0.1")
    return float(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Time, memory and operations of the loss against its rivals: a table for each shape and mode. "
        "Writes nothing unless asked to. On two cores all shapes take ten to twenty minutes, half that with "
        "--no-compile; --quick takes half a minute, and --nproc 2 4 a few minutes.",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=DTYPES, default="float32", help="of the embeddings (default: %(default)s)")
    add("--autocast", choices=DTYPES[1:3], default="", help="run the losses under torch.autocast")
    add("--shapes", type=shape, nargs="+", metavar="BxD", help="rows x features, such as 128x768 64x4096")
    add("--modes", choices=MODES, nargs="+", default=MODES, help="default: both")
    names = (*rivals.NAMES, *rivals.CAPTURED, *rivals.DISTRIBUTED)
    add("--contestants", choices=names, nargs="+", metavar="NAME", help=f"of {', '.join(names)}")
    add("--no-compile", action="store_true", help="eager contestants only")
    add("--repeats", type=report.count, default=5, help="rounds in which all take turns (default: %(default)s)")
    add("--min-time", type=duration, default=0.1, help="seconds for each in a round (default: %(default)s)")
    add("--csv", type=report.output, metavar="PATH", help="write the measurements there")
    plots = partial(report.output, inside="speedup.png")
    add("--plot", type=plots, metavar="DIR", help="write speedup.png and width.png there")
    add("--quick", action="store_true", help="a smoke test: small shapes, short timings, no compilation")
    add = parser.add_mutually_exclusive_group().add_argument
    told = "print the README's table of that file (and --plot it); run nothing"
    add("--table", type=report.measured, metavar="CSV", help=told)
    told = "the loss of the batch of N processes on this machine's CPU"
    add("--nproc", type=report.count, nargs="+", metavar="N", help=told)
    told = "print the bytes sent on paper, up to 1024 processes; run nothing"
    add("--nproc-table", action="store_true", help=told)
    args = parser.parse_args(argv)
    names = rivals.DISTRIBUTED if args.nproc else rivals.NAMES
    args.contestants = args.contestants or names
    if stray := set(args.contestants) - {*names, *(() if args.nproc else rivals.CAPTURED)}:
        where = f"{'with' if args.nproc else 'without'} --nproc"
        parser.error(f"argument --contestants: {', '.join(stray)}: not {where}: give some of {', '.join(names)}")
    if args.nproc and args.device == "cuda":
        parser.error("argument --device: --nproc measures on the CPU: leave out --device cuda")
    if args.plot and (args.nproc or args.nproc_table):
        parser.error("argument --plot: --nproc and --nproc-table plot nothing: leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda given, but torch finds no CUDA device here: leave it out for the CPU")
    if args.csv and (args.table or args.nproc_table):
        parser.error("argument --csv: nothing is measured with --table and --nproc-table: leave it out")
    timed = ((row.label, row.mode) for row in args.table or () if row.median_ms)
    timed = timed if args.table else product(args.contestants, args.modes)
    if args.plot and ("naive", "value_and_grad") not in timed:
        parser.error("argument --plot: naive's value_and_grad, to compare with, is missing: add it or do not plot")
    args.device = torch.device(args.device)
    if args.quick:
        quick = distributed.QUICK_SHAPES if args.nproc else QUICK_SHAPES
        args.shapes, args.repeats, args.min_time, args.no_compile = args.shapes or quick, 2, 0.01, True
    args.shapes = args.shapes or (distributed.SHAPES if args.nproc else SHAPES)
    return args


def provenance(device: torch.device, threads: int, argv: Sequence[str] | None) -> dict[str, Any]:
    return {
        "device": describe(device, threads),
        "torch": torch.__version__,
        "threads": threads,
        "date": date.today().isoformat(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "benchmarks.throughput", *(sys.argv[1:] if argv is None else argv)]),
    }


def progress_bar(console: Console) -> Progress:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def run(args: argparse.Namespace, origin: dict[str, Any], console: Console) -> list[Row]:
    """Measures every case, shows each as it is done, and keeps the CSV up to date."""
    if not args.no_compile:  # naive breaks its graph at every shape, which torch tells at length
        warnings.filterwarnings("ignore", module="torch")
        torch._logging.set_logs(all=logging.ERROR)
    pairs = list(product((False,) if args.no_compile else (False, True), args.contestants))
    cases = list(product(args.shapes, args.modes))
    done: list[Row] = []
    rates = measure.Rates(0, 0)
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(cases) * len(pairs))
        for (rows, features), mode in cases:
            progress.update(task, description=f"{rows} x {features} {mode}")
            rates = rates.best(measure.measure_rates(args.device, getattr(torch, args.autocast or args.dtype)))
            case = [Row(name, compiled, rows, features, args.dtype, args.autocast, mode) for compiled, name in pairs]
            run_case(case, args.device, args.repeats, args.min_time, lambda: progress.advance(task))
            done += case
            for row in done:  # the best rates so far hold for the earlier cases too
                row.limit_ms = rates.limit(*row.shape, row.mode, getattr(torch, row.dtype).itemsize) * 1e3
                vars(row).update(origin, matmul_gflops=rates.matmul / 1e9, copy_gbytes=rates.copy / 1e9)
            progress.console.print(table(case))
            if args.csv:
                report.write_csv(done, args.csv)
    console.print(f"{origin['device']}: {rates.matmul / 1e9:.0f} GFLOP/s, copy {rates.copy / 1e9:.1f} GB/s")
    for status in dict.fromkeys(row.status for row in done if row.status.startswith("missing")):
        console.print(status)
    return done


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.nproc_table:
        print(distributed.markdown_on_paper())
    elif args.table:
        rows = args.table
        print(report.markdown(rows))
    elif args.nproc:
        distributed.run(args, provenance(args.device, 1, argv), progress_bar(Console()))
    else:
        rows = run(args, provenance(args.device, torch.get_num_threads(), argv), Console())
    if args.plot:
        report.plot(rows, args.plot)


if __name__ == "__main__":
    main()
