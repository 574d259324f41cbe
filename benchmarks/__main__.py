"""Time and memory of the loss against the naive one: `python -m benchmarks`."""

import argparse
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch.utils.benchmark import Measurement

from benchmarks import records
from benchmarks.speed import contestants, measure, report
from benchmarks.speed.report import Row

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
FEW = ((128, 512), (128, 768), (128, 2048), (1024, 768), (8192, 256))
ROUNDS, SECONDS = 5, 0.1  # contestants take turns; seconds for each in a round
DTYPES = ("float32", "bfloat16", "float16", "float64")


def run_case(rows: list[Row], device: torch.device, seconds: float, advance: Callable[[], Any] = lambda: None) -> None:
    """Fills in the rows of one shape and mode."""
    torch._dynamo.reset()  # else the shapes add up to torch.compile's limit of recompilations
    torch.manual_seed(0)
    with measure.noted(*rows):  # the tensors themselves may be too large
        pair = measure.embeddings(rows[0], device)
    steps: dict[int, measure.Step] = {}
    times: dict[int, list[Measurement]] = {i: [] for i in range(len(rows))}
    for i, row in enumerate(rows):
        with measure.noted(row):
            if row.status != "ok":
                continue
            step = measure.make_step(row, *pair)
            step()  # compiles; the measurements that follow warm up
            row.peak_bytes = measure.peak_bytes(step, device)
            row.operations = measure.operations(step, device, row.compiled)
            steps[i] = step
        advance()
    for turn, (i, step) in product(range(ROUNDS), steps.items()):
        slow = turn >= 3 and times[i][-1].median > seconds
        if rows[i].status == "ok" and not slow:
            with measure.noted(rows[i]):
                times[i].append(measure.timer(step, device).blocked_autorange(min_run_time=seconds))
    for row, measured in zip(rows, times.values(), strict=True):
        if measured and row.status == "ok":
            merged = Measurement.merge(measured)[0]
            row.median_ms, row.iqr_ms = merged.median * 1e3, merged.iqr * 1e3


def run(args: argparse.Namespace, console: Console, **columns: Any) -> list[Row]:
    """Measures every case with a bar of progress, and keeps the CSV up to date; `columns` are those of each row."""
    measure.silence_compiler()
    kinds = list(product((False, True) if args.compile else (False,), contestants.NAMES))
    cases = list(product(args.shapes, ("value_and_grad", "value") if args.value else ("value_and_grad",)))
    done: list[Row] = []
    rates = measure.Rates()
    bar = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(kinds))
        for shape, mode in cases:
            progress.update(task, description=f"{shape[0]} x {shape[1]} {mode}")
            rates = rates.best(measure.measure_rates(args.device, getattr(torch, args.autocast or args.dtype)))
            case = [Row(name, compiled, *shape, args.dtype, args.autocast, mode, **columns) for compiled, name in kinds]
            run_case(case, args.device, SECONDS, lambda: progress.advance(task))
            done += case
            for row in done:  # the best rates so far hold for the earlier cases too
                row.limit_ms = rates.limit(*row.shape, row.mode, getattr(torch, row.dtype).itemsize) * 1e3
                row.matmul_gflops, row.copy_gbytes = rates.matmul / 1e9, rates.copy / 1e9
            if args.csv:
                records.write_csv(done, args.csv)
    return done


def shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text)
    rows, features = map(int, match.groups()) if match else (0, 0)
    if rows < 2 or features < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, ROWSxFEATURES of at least 2x1 expected, such as 128x768")
    return rows, features


def device(text: str) -> torch.device:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} given, cpu or cuda expected")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no CUDA device here: leave --device out for the CPU")
    return torch.device(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time and peak memory of the loss against the naive one. Takes about a minute at a handful of "
        "shapes, and writes nothing unless asked to. The limit is the time that the loss's arithmetic or its memory "
        "traffic takes at the best rates of this machine; the peak leaves out the inputs.",
    )
    add = parser.add_argument
    add("--shapes", nargs="+", default=["few"], metavar="BxD", help="rows x features, such as 128x768, or: all")
    add("--dtype", choices=DTYPES, default="float32", help="of the embeddings (default: %(default)s)")
    add("--autocast", choices=DTYPES[1:3], default="", help="run the losses under torch.autocast")
    add("--device", type=device, default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--compile", action="store_true", help="also under torch.compile, which takes minutes more")
    add("--value", action="store_true", help="also the value alone, without a gradient")
    add("--csv", type=records.output, metavar="PATH", help="write the measurements there")
    add("--plot", type=records.output, metavar="PATH", help="plot the speed-ups there, a PNG file")
    args = parser.parse_args(argv)
    try:
        args.shapes = {"few": FEW, "all": SHAPES}.get(args.shapes[0]) or [shape(text) for text in args.shapes]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --shapes: {error}")
    console, threads = Console(), torch.get_num_threads()
    origin = records.origin("benchmarks", argv, args.device, threads)
    console.print(f"{origin['device']}; torch {torch.__version__}; the value and the student's gradient", style="dim")
    rows = run(args, console, threads=threads, **origin)
    console.print(report.table(rows))
    for status in dict.fromkeys(row.status for row in rows if row.status.startswith("missing")):
        console.print(status, style="dim")
    if args.plot:
        report.plot(rows, args.plot)


if __name__ == "__main__":
    main()
