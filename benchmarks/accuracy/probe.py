"""Whether published accuracies are still this code's: `python -m benchmarks.accuracy.probe`.

An accuracy takes hours to measure again. So probe.csv keeps the first two losses of published methods and pairs, on
noise, under a teacher that has seen one batch. A change to a method, a network, the training loop or the loss changes
them, and a test says so. Then run what changed again, or name in results/README.md the commit of the results; and run
this, which computes the losses of the file's cases again in half a minute. Another torch or timm may change them, too.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch
from rich.progress import Progress

from benchmarks.accuracy import classification, segmentation
from benchmarks.accuracy.data import Images, Split
from benchmarks.accuracy.distilling import distil
from benchmarks.accuracy.methods import method_named
from benchmarks.accuracy.runs import Run, read
from benchmarks.accuracy.training import Bench
from benchmarks.records import RESULTS

TASKS = {"classification": (classification, (32, 32)), "segmentation": (segmentation, segmentation.SIZE)}
VERSIONS = {"torch": torch.__version__.partition("+")[0], "timm": timm.__version__}


def bench(task: str, cache: Path) -> Bench:
    """With noise for images."""
    generator, (module, size) = torch.Generator().manual_seed(0), TASKS[task]
    images = torch.randint(256, (16, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (16, *size) if task == "segmentation" else (16,), generator=generator)
    few = Split(images[:2], labels[:2])
    data = Images(Split(images, labels), few, few, classes=11, views=1)
    args = argparse.Namespace(cache=cache / task, device="cpu", bfloat16=False, compile=False)
    return Bench(module, data, args, Progress(disable=True), {"commit": ""})


def short_run(pair: str, name: str, **settings: object) -> Run:
    """Two steps, under a teacher of one step."""
    method = method_named(name)
    own = {"weight": method.weight, "kappa": method.kappa, "warmup": method.warmup, "precision": "float32"}
    few = {"seed": 0, "teacher_epochs": 1, "epochs": 1, "batch": 8, "processes": 1, "views": 1, "labelled": 1}
    return Run(data="noise", pair=pair, method=name, teacher="", reduction="", **few | own | settings)


def losses(cases: Sequence[dict[str, str]]) -> Iterator[list[float]]:
    """The first two losses of each case."""
    with tempfile.TemporaryDirectory() as cache:
        benches = {task: bench(task, Path(cache)) for task in TASKS}
        for case in cases:
            yield distil(benches[case["task"]], short_run(case["pair"], case["method"]))[0]


if __name__ == "__main__":
    cases = read("probe")
    for case, (first, second) in zip(cases, losses(cases), strict=True):
        case |= {"first_loss": f"{first:.6g}", "second_loss": f"{second:.6g}", **VERSIONS}
    with (RESULTS / "probe.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, cases[0])
        writer.writeheader()
        writer.writerows(cases)
