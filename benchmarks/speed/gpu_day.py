"""Everything that waits for a GPU, in one command: `python -m benchmarks.gpu_day --out DIR`.

Runs the numerical tests on the GPU, then Triton's, then the throughput benchmark in float32 and under bfloat16 and
float16 autocast: eager, compiled and captured in CUDA graphs, kernels counted. Last it prints which implementation wins
at each shape, and by how much. Each part writes when it is done, so that a run cut short leaves what it had. It needs
no network. About twenty minutes on one H100, by estimate: nobody has run it yet. `--device cpu --quick` rehearses it in
a minute.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report, throughput
from benchmarks.report import Row

ROOT = Path(__file__).parents[1]
NUMERICAL = ("loss", "precision", "memory", "compile", "errors", "features", "diagnostics", "projector", "properties")
OURS = ("reference", "fused", "triton")


def tests(name: str, files: Sequence[str], device: str, out: Path, seconds: int) -> str:
    """Runs test files with the device chosen; returns pytest's last line, the rest goes to a file."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [f"tests/test_{file}.py" for file in files]
    log = out / f"tests_{name}.txt"
    with log.open("w") as file:
        settings = {"cwd": ROOT, "env": os.environ | {"RSD_TEST_DEVICE": device}, "stdout": file, "stderr": file}
        try:
            subprocess.run(command, timeout=seconds, check=False, **settings)
        except subprocess.TimeoutExpired:
            return f"cut short after {seconds} s: see {log}"
    return log.read_text().strip().splitlines()[-1]


def winners(rows: list[Row]) -> str:
    """For each shape, the fastest of ours at value and gradient, by how it is run, and the fastest rival over it."""
    lines = ["| rows x features | eager | compiled | in a CUDA graph |", "|---" * 4 + "|"]
    timed = [row for row in rows if row.median_ms and row.mode == "value_and_grad"]
    for shape in dict.fromkeys(row.shape for row in timed):
        cells = [f"{shape[0]} x {shape[1]}"]
        for compiled, suffix in ((False, ""), (True, ""), (False, "+graph")):
            here = {
                row.contestant.removesuffix("+graph"): row
                for row in timed
                if row.shape == shape and row.compiled == compiled and row.contestant.endswith("+graph") == bool(suffix)
            }
            ours = sorted((row.median_ms or 0, name) for name, row in here.items() if name in OURS)
            rivals = sorted((row.median_ms or 0, name) for name, row in here.items() if name not in OURS)
            text = f"{ours[0][1]}, {ours[0][0]:.3g} ms" if ours else "-"
            text += f"; {ours[1][0] / ours[0][0]:.2f}x before {ours[1][1]}" if len(ours) > 1 else ""
            text += f"; {rivals[0][0] / ours[0][0]:.2f}x before {rivals[0][1]}" if ours and rivals else ""
            cells.append(text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rule(rows: list[Row]) -> str:
    """What "auto" should pick on this device, eager: Triton where it wins by a tenth at nearly all shapes."""
    best = {}
    for row in rows:
        if row.median_ms and row.mode == "value_and_grad" and not row.compiled and row.contestant in OURS:
            best.setdefault(row.shape, {})[row.contestant] = row.median_ms
    both = [times for times in best.values() if {"fused", "triton"} <= times.keys()]
    wins = sum(times["fused"] > 1.1 * times["triton"] for times in both)
    if not both:
        return "triton was not timed: nothing follows"
    return f"triton is faster than fused by a tenth at {wins} of {len(both)} shapes"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_day",
        description=__doc__.partition("\n\n")[2],
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for logs and CSV files; made if it is not there")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    add("--quick", action="store_true", help="one test file, and throughput's --quick")
    add("--dtypes", choices=("float32", *throughput.DTYPES[1:3]), nargs="+", default=list(throughput.DTYPES[:3]))
    add("--parts", choices=("tests", "triton", "throughput"), nargs="+", default=["tests", "triton", "throughput"])
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch finds no CUDA device here: rehearse with --device cpu --quick")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    start = time.perf_counter()

    def say(part: str, text: str) -> None:
        print(f"{time.perf_counter() - start:6.0f} s  {part}: {text}", flush=True)

    if "tests" in args.parts:
        files = NUMERICAL[-2:-1] if args.quick else (*NUMERICAL, "cuda")
        say("tests", tests("numerical", files, args.device, args.out, 600))
    if "triton" in args.parts and not args.quick:
        say("triton", tests("triton", ("triton", "triton_compile"), "cpu", args.out, 300))
    name = (
        re.sub(r"\W+", "_", throughput.describe(torch.device(args.device), torch.get_num_threads())).strip("_").lower()
    )
    for dtype in args.dtypes if "throughput" in args.parts else ():
        path = args.out / f"throughput_{name}_{dtype}.csv"
        options = ["--device", args.device, "--csv", str(path), *(["--quick"] if args.quick else [])]
        options += [] if dtype == "float32" else ["--autocast", dtype]
        if args.device == "cuda":
            options += ["--min-time", "0.02", "--contestants", *throughput.rivals.NAMES, *throughput.rivals.CAPTURED]
        throughput.main(options)
        rows = report.read_csv(path)
        say("throughput", f"{path}\n\n{dtype}, value and gradient\n\n{winners(rows)}\n\n{rule(rows)}\n")


if __name__ == "__main__":
    main()
