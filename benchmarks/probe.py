"""Whether published accuracies are still those of this code: `python -m benchmarks.probe`.

An accuracy takes hours to measure again. So the first two losses of every method that has one are kept beside the
results: on noise, under a teacher that has seen two batches of it. A change to a method, a network, the training loop
or the loss changes them, and a test says so. Then run again what has changed, or say in docs/evidence.md of which
commit the results are; and write benchmarks/results/probe.csv anew by this command, which takes half a minute.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import Progress

from benchmarks import evidence, segment
from benchmarks.distill import CLASSIFICATION, Bench, Data, Split, Task, parse, planned

PATH = evidence.RESULTS / "probe.csv"
TASKS = {
    "distill": CLASSIFICATION,
    "sensitivity": CLASSIFICATION,
    "dense": CLASSIFICATION,
    "width": CLASSIFICATION,
    "segment": segment.SEGMENTATION,
}


def noise(task: Task) -> Data:
    generator = torch.Generator().manual_seed(0)
    size = segment.SIZE if task is segment.SEGMENTATION else (32, 32)
    images = torch.randint(256, (16, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(5, (16, *size) if task is segment.SEGMENTATION else (16,), generator=generator)
    train, few = Split(images, labels), Split(images[:2], labels[:2])
    return Data(train, few, few, 11, "noise")


def published() -> list[tuple[str, str, str]]:
    """Task, pair and method of results: every method once, and every pair once."""
    found: dict[tuple[str, str], tuple[str, str, str]] = {}
    for name, task in TASKS.items():
        path = evidence.RESULTS / f"{name}.csv"
        for line in evidence.read(path) if path.exists() else ():
            if line["method"] != "teacher":
                case = (task.module, line["pair"], line["method"])
                found.setdefault((task.module, line["method"]), case)
                found.setdefault((task.module, line["pair"]), case)
    return list(dict.fromkeys(found.values()))


def probes(cases: Sequence[tuple[str, str, str]]) -> Iterator[tuple[float, float]]:
    """The first two losses of each case."""
    tasks = {task.module: task for task in TASKS.values()}
    benches: dict[str, Bench] = {}
    with tempfile.TemporaryDirectory() as cache:
        for module, pair, method in cases:
            task = tasks[module]._replace(source=str, load=lambda *_, task=tasks[module]: noise(task))
            few = ["--epochs", "1", "--teacher-epochs", "1", "--batches", "8", "--views", "1", "--seeds", "0"]
            which = ["--data", "noise", "--cache", f"{cache}/{module}", "--pairs", pair, "--methods", method]
            args = parse([*which, *few], task)
            (run,) = planned(args)
            if module not in benches:
                benches[module] = Bench(task, args, Progress(disable=True))
            first, second = benches[module].distil(run)
            yield first, second


def main(argv: Sequence[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(
        prog="python -m benchmarks.probe", description=__doc__, formatter_class=formatter
    ).parse_args(argv)
    cases = published()
    with PATH.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "pair", "method", "first_loss", "second_loss"])
        for case, losses in zip(cases, probes(cases), strict=True):
            writer.writerow([*case, *(f"{loss:.6g}" for loss in losses)])
    print(f"{len(cases)} probes in {Path('benchmarks') / 'results' / PATH.name}")


if __name__ == "__main__":
    main()
