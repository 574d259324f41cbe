"""Whether published accuracies are still this code's: `python -m benchmarks.accuracy.probe`.

An accuracy takes hours to measure again. So probe.csv keeps the first two losses of every published method and pair, on
noise, under a teacher that has seen two batches. A change to a method, a network, the training loop or the loss changes
them, and a test says so. Then run what changed again, or name in results/README.md the commit of the results; and run
this, which takes half a minute and writes probe.csv again. Another torch or timm may change the losses, too.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from rich.progress import Progress

from benchmarks.accuracy.__main__ import TASKS
from benchmarks.accuracy.data import Images, Split
from benchmarks.accuracy.distilling import distil
from benchmarks.accuracy.evidence import RESULTS, read
from benchmarks.accuracy.methods import method_named
from benchmarks.accuracy.runs import Run
from benchmarks.accuracy.training import Bench

FILES = {"classification": ("distill", "sensitivity", "dense", "width"), "segmentation": ("segment",)}
VERSIONS = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}
Case = tuple[str, str, str]  # task, pair, method


def published() -> list[Case]:
    """Every method of the results once and every pair once, as far as this code still has the methods."""
    found: dict[tuple[str, str], Case] = {}
    for task, files in FILES.items():
        for line in (line for name in files for line in read(name)):
            if known(line["method"]):
                case = (task, line["pair"], line["method"])
                found.setdefault((task, line["method"]), case)
                found.setdefault((task, line["pair"]), case)
    return list(dict.fromkeys(found.values()))


def known(method: str) -> bool:
    try:
        method_named(method)
    except ValueError:
        return False
    return True


def bench(task: str, cache: Path) -> Bench:
    """Of noise."""
    generator = torch.Generator().manual_seed(0)
    size = (96, 128) if task == "segmentation" else (32, 32)
    images = torch.randint(256, (16, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (16, *size) if task == "segmentation" else (16,), generator=generator)
    few = Split(images[:2], labels[:2])
    data = Images(Split(images, labels), few, few, classes=11, views=1)
    args = argparse.Namespace(cache=cache / task, device="cpu", bfloat16=False, compile=False)
    return Bench(TASKS[task], data, args, Progress(disable=True), {"commit": ""})


def short_run(pair: str, name: str, **settings: object) -> Run:
    """Two steps under a teacher of one step."""
    method = method_named(name)
    own = {"weight": method.weight, "kappa": method.kappa, "warmup": method.warmup, "precision": "float32"}
    few = {"seed": 0, "teacher_epochs": 1, "epochs": 1, "batch": 8, "processes": 1, "views": 1, "labelled": 1}
    return Run(data="noise", pair=pair, method=name, teacher="", reduction="", **few | own | settings)


def losses(cases: Sequence[Case]) -> Iterator[list[float]]:
    """The first two losses of each case."""
    with tempfile.TemporaryDirectory() as cache:
        benches = {task: bench(task, Path(cache)) for task in FILES}
        for task, pair, method in cases:
            yield distil(benches[task], short_run(pair, method))[0]


def main(argv: Sequence[str] | None = None) -> None:
    description = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.accuracy.probe", None, __doc__, formatter_class=description)
    parser.parse_args(argv)
    cases = published()
    with (RESULTS / "probe.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "pair", "method", "first_loss", "second_loss", *VERSIONS])
        for case, found in zip(cases, losses(cases), strict=True):
            writer.writerow([*case, *(f"{loss:.6g}" for loss in found), *VERSIONS.values()])
    print(f"{len(cases)} probes in benchmarks/results/probe.csv")


if __name__ == "__main__":
    main()
