"""What a GPU has to say, within a budget of seconds: `python -m benchmarks.speed.gpu_day --budget 400 --out DIR`.

The most valuable comes first: (1) value and gradient against float64, (2) the tests that need a GPU, (3) time and peak
memory, eager and then compiled, (4) the same in CUDA graphs, (5) kernel launches, (6) the term's share of a training
step, and with --tune (7) tiles of the Triton kernels. Every result is written as soon as it is there. A step may use
its share of the budget and what earlier steps left, and leaves out the rest. Last comes a table of who wins where, with
the decision that it suggests for implementation="auto".

Without a GPU, --rehearse runs the same steps shortened on the CPU; with TRITON_INTERPRET=1, Triton's kernels too.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

import timm
import torch
import torch.nn.functional as F

from benchmarks import records
from benchmarks.speed import contestants, measure
from benchmarks.speed.report import Row, short
from rsd_loss import DecouplingProjector, RSDLoss, _triton, rsd_loss

ROOT = Path(__file__).parents[2]
SHAPES = ((128, 512), (128, 768), (128, 2048), (256, 4096), (1024, 768), (4096, 768), (50176, 384), (200704, 768))
EXACT = ((128, 768), (1024, 768), (50176, 384))
TUNED = ((128, 768), (128, 2048), (4096, 768), (50176, 384))
TILES = ((32, 32), (16, 32), (64, 32), (32, 64), (64, 64), (16, 128))  # rows x columns
SMALL = ((16, 40), (40, 16))  # of a rehearsal
# By which share of the budget each step has to end.
ENDS = {"exact": 0.06, "tests": 0.35, "eager": 0.5, "compiled": 0.72, "graphs": 0.82, "launches": 0.87, "step": 0.93}
LOST = 1.1  # as much slower makes a winner; less is noise


def exact(device: torch.device, names: Iterable[str], shapes: Sequence[tuple[int, int]]) -> Iterator[str]:
    """The largest errors in float32, as shares of the largest number of the truth."""
    for (rows, features), name in product(shapes, names):
        torch.manual_seed(0)
        student, teacher = torch.randn(2, rows, features, device=device)
        results = []
        for x, implementation in ((student.double(), "reference"), (student, name)):
            loss = rsd_loss(x.requires_grad_(), teacher.to(x.dtype), kappa=0.01, implementation=implementation)
            results.append((loss.detach().double(), torch.autograd.grad(loss, x)[0].double()))
        value, grad = (((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True))
        # float32 has 6e-8; sums over the rows and a cancellation lose a few hundred times that.
        verdict = "right" if max(value, grad) < 1e-4 else "WRONG"
        yield f"{rows} x {features} {name}: {verdict}, relative error of value {value:.0e} and gradient {grad:.0e}"


def tests(device: torch.device, log: Path, seconds: float) -> Iterator[str]:
    """Runs the tests that need a GPU; pytest's last line, the rest goes to the log."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    if device.type == "cuda":
        command += ["tests/test_triton.py", "-k", "not interpreter"]
        command += ["-n", "8"] * bool(importlib.util.find_spec("xdist"))
    settings = {"cwd": ROOT, "env": os.environ | {"RSD_TEST_DEVICE": device.type}}
    with log.open("w") as file:
        try:
            subprocess.run(command, timeout=seconds, check=False, stdout=file, stderr=file, **settings)
        except subprocess.TimeoutExpired:
            yield f"cut short after {seconds:.0f} s: see {log}"
            return
    yield log.read_text().strip().splitlines()[-1].strip("= ")


def cell(row: Row, device: torch.device, seconds: float) -> str:
    """Measures one row and says how it went."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with measure.noted(row):
        step = measure.make_step(row, *measure.embeddings(row, device))
        step()
        if not row.contestant.endswith("+graph"):  # which allocates nothing when replayed
            row.peak_bytes = measure.peak_bytes(step, device)
        found = measure.timer(step, device).blocked_autorange(min_run_time=seconds)
        row.median_ms, row.iqr_ms = found.median * 1e3, found.iqr * 1e3
    told = f"{short(row.median_ms)} ms, {short((row.peak_bytes or 0) / 1e6)} MB" if row.median_ms else row.status
    return f"{row.rows} x {row.features} {row.dtype} {row.label}: {told}"


def launches(rows: Iterable[Row], device: torch.device) -> Iterator[str]:
    """Fills in the launches of eager rows that were timed: kernels on a GPU, operations on a CPU."""
    for row in rows:
        with measure.noted(row):
            step = measure.make_step(row, *measure.embeddings(row, device))
            step()
            row.operations = measure.operations(step, device, compiled=False)
        yield f"{row.rows} x {row.features} {row.dtype} {row.label}: {row.operations} launches"


def tune(rows: Iterable[Row], device: torch.device, seconds: float) -> Iterator[str]:
    """Times each row with every tile."""
    for row in rows:
        times = []
        for height, width in TILES:
            with patch.multiple(_triton, _BLOCK_R=height, _BLOCK_C=width):
                tried = replace(row)
                cell(tried, device, seconds)
            label = f"block_r={height} block_c={width}"
            times.append((tried.median_ms or float("inf"), label))
            yield f"{row.rows} x {row.features} {label}: {short(tried.median_ms)} ms"
        (fastest, label), (now, _) = min(times), times[0]
        yield f"{row.rows} x {row.features}: best is {label}, {now / fastest:.2f}x the speed of {times[0][1]}"


def kind(row: Row) -> str:
    return "CUDA graph" if row.contestant.endswith("+graph") else "compiled" if row.compiled else "eager"


def verdict(case: list[Row]) -> str:
    """Who wins among these rows, and by how much."""
    timed = sorted((row.median_ms or 0, row.contestant.removesuffix("+graph")) for row in case if row.median_ms)
    if not timed:
        return "-"
    (first, winner), *others = timed
    told = [f"{winner} wins, {short(first)} ms"]
    ours = [pair for pair in others if pair[1] in contestants.OURS][:1]
    rest = [pair for pair in others if pair[1] not in contestants.OURS][:1]
    told += [f"{name} {ms / first:.2f}x as long" for ms, name in ours + rest]
    return ", ".join(told)


def summary(rows: list[Row]) -> str:
    """A table of who wins where, and what follows for "auto"."""
    rows = [row for row in rows if row.contestant.removesuffix("+graph") in contestants.NAMES]
    kinds = ("eager", "compiled", "CUDA graph")
    lines = [f"| rows x features | dtype | {' | '.join(kinds)} |", "|---" * 5 + "|"]
    pairs: dict[str, list[float]] = {"wide": [], "tall": []}  # the time of fused over Triton's, without CUDA graphs
    for shape, dtype in dict.fromkeys((row.shape, row.dtype) for row in rows):
        cells = []
        for name in kinds:
            case = [row for row in rows if (row.shape, row.dtype, kind(row)) == (shape, dtype, name)]
            times = {row.contestant: row.median_ms for row in case if row.median_ms}
            if {"fused", "triton"} <= times.keys():
                pairs["wide" if shape[0] < shape[1] else "tall"].append(times["fused"] / times["triton"])
            cells.append(verdict(case))
        lines.append(f"| {shape[0]} x {shape[1]} | {dtype} | {' | '.join(cells)} |")
    picks = {}
    for side, ratios in pairs.items():
        wins, losses = sum(r > LOST for r in ratios), sum(r < 1 / LOST for r in ratios)
        picks[side] = "triton" if ratios and wins >= 0.75 * len(ratios) and not losses else "fused"
        told = (
            f"Triton beats fused by a tenth or more at {wins} of {len(ratios)} {side} settings and loses at {losses}."
        )
        lines += ["", told if ratios else f"Triton and fused were not both timed at a {side} shape."]
    picked = " and ".join(f"{pick} where inputs are {side}" for side, pick in picks.items())
    return "\n".join([*lines, "", f"Suggested for auto: {picked}, if no value and no test above is wrong."])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.gpu_day", description=__doc__.partition("\n\n")[2]
    )
    add = parser.add_argument
    add("--budget", type=float, default=400, metavar="SECONDS", help="in all; one item may exceed it (default: 400)")
    add("--out", type=Path, required=True, metavar="DIR", help="for the results; made if it is not there")
    add("--tune", action="store_true", help="try other tiles of the Triton kernels at four shapes")
    add("--rehearse", action="store_true", help="the same steps, shortened, on the CPU")
    args = parser.parse_args(argv)
    if not 0 < args.budget < 1e5:
        parser.error("argument --budget: give a number of seconds above 0, such as 400")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here: --rehearse runs the steps shortened on the CPU")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    measure.silence_compiler()
    start = time.perf_counter()
    device, seconds = (torch.device("cpu"), 0.01) if args.rehearse else (torch.device("cuda"), 0.2)
    origin = records.origin("benchmarks.speed.gpu_day", argv, device, torch.get_num_threads())
    file = args.out / re.sub(r"\W+", "_", f"gpu_day {origin['device'].lower()}").strip("_")
    rows: list[Row] = []

    def say(text: str) -> None:
        line = f"{time.perf_counter() - start:5.0f} s  {text}"
        print(line, flush=True)
        with file.with_suffix(".txt").open("a") as log:
            log.write(line + "\n")

    def left(end: str) -> float:
        return start + ENDS.get(end, 1.0) * args.budget - time.perf_counter()

    def run(step: str, lines: Iterator[str]) -> None:
        """Goes on until the step or its time is over."""
        while left(step) > 0 and (line := next(lines, None)) is not None:
            say(f"{step}: {line}")
            if rows:
                records.write_csv(rows, file.with_suffix(".csv"))
        if left(step) <= 0:
            say(f"{step}: its share of the budget is used up")

    def new(name: str, shape: tuple[int, int], dtype: str = "float32", compiled: bool = False) -> Row:
        threads, autocast = torch.get_num_threads(), dtype if dtype != "float32" else ""
        return Row(name, compiled, *shape, dtype, autocast, "value_and_grad", threads=threads, **origin)

    def timed(cells: Iterable[Row]) -> Iterator[str]:
        for row in cells:
            rows.append(row)
            yield cell(row, device, seconds)

    names = []
    for name in contestants.NAMES:
        probe = new(name, SMALL[0])
        with measure.noted(probe):
            contestants.build(name, device, compiled=False)
            names.append(name)
    ours, others = ([n for n in names if (n in contestants.OURS) == fast] for fast in (True, False))
    shapes, exact_at, tuned_at = (SMALL,) * 3 if args.rehearse else (SHAPES, EXACT, TUNED)
    settings = list(product(("float32", "bfloat16"), shapes))
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {sys.version.split()[0]}"
    say(f"{origin['device']}; {versions}; commit {origin['commit']}; contestants: {', '.join(names)}")
    run("exact", exact(device, ours, exact_at))
    run("tests", tests(device, file.with_suffix(".tests.txt"), max(1.0, left("tests"))))
    run("eager", timed(new(name, shape, dtype) for dtype, shape in settings for name in names))
    # Compiling takes seconds, so what decides comes first.
    first, second = ([(n, *setting) for setting in settings for n in group] for group in (ours, others))
    run(
        "compiled",
        timed(new(n, shape, dtype, compiled=True) for n, dtype, shape in (*first, *second) if n != "lightly"),
    )
    if not args.rehearse:
        run("graphs", timed(new(f"{name}+graph", shape, dtype) for dtype, shape in settings for name in names))
    eager = [row for row in rows if kind(row) == "eager" and row.dtype == "float32" and row.median_ms]
    run("launches", launches(eager, device))
    run("step", steps(ours, device, args.rehearse))
    if args.tune and "triton" in names:
        run("tune", tune([new("triton", shape) for shape in tuned_at], device, seconds))
    say(f"done\n\n{summary(rows)}")


def steps(names: list[str], device: torch.device, short_: bool) -> Iterator[str]:
    """What the term adds to a training step of a ViT: projector and loss, with a teacher of 768 features.

    A step is the student's forward and backward pass and AdamW's update. It has no forward pass of the teacher, so the
    share of a real step is smaller.
    """
    batch, side, seconds = (4, 32, 0.01) if short_ else (128, 224, 0.5)
    torch.manual_seed(0)
    student = timm.create_model("vit_tiny_patch16_224", num_classes=100, img_size=side).to(device)
    projector = DecouplingProjector(student.num_features, 768, device=device)
    optimizer = torch.optim.AdamW([*student.parameters(), *projector.parameters()])
    images, teacher = torch.randn(batch, 3, side, side, device=device), torch.randn(batch, 768, device=device)
    labels = torch.randint(100, (batch,), device=device)

    def step(criterion: RSDLoss | None) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = student.forward_head(student.forward_features(images), pre_logits=True)
            loss = F.cross_entropy(student.get_classifier()(embeddings), labels)
            if criterion:
                loss = loss + 0.1 * criterion(projector(embeddings), teacher)
        loss.backward()
        optimizer.step()

    for name in names:
        turns = (None, RSDLoss(kappa=0.0, implementation=name))  # type: ignore[arg-type]
        times: dict[RSDLoss | None, list[float]] = {criterion: [] for criterion in turns}
        step(turns[1])
        for criterion in turns * 3:  # they take turns
            timer = measure.timer(partial(step, criterion), device)
            times[criterion] += timer.blocked_autorange(min_run_time=seconds).times
        alone, both = (1e3 * median(found) for found in times.values())
        yield f"ViT-Ti, {batch} images, {name}: {both:.4g} ms, the term {100 * (1 - alone / both):.1f} % of it"


if __name__ == "__main__":
    main()
