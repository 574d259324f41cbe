"""The plots of the committed runs: `python -m benchmarks.accuracy.plots` draws them anew, in seconds."""

import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.accuracy.runs import read
from benchmarks.records import RESULTS

PAIRS = {"cnn_vit": "From ResNet to ViT", "cnn_mlp": "From ResNet to MLP", "vit_cnn": "From ViT to ResNet"}
BASELINES = {"kd": "KD", "dkd": "DKD", "dist": "DIST", "fitnet": "FitNets", "ofa": "OFA"}
TEACHERS = {
    "raw1280": "ImageNet network as it is",
    "adapted256": "adapted to the task",
    "adapted1280": "adapted to the task",
    "spread1280": "64 directions, spread",
    "spread2048": "64 directions, spread",
    "resnet": "ResNet trained on the task",
    "resnet_wide": "ResNet trained on the task",
    "resnet_small": "ResNet trained on the task",
    "vit": "ViT trained on the task",
    "vit_small": "ViT trained on the task",
}


def gain(path: Path) -> None:
    """The student alone, the best baseline, and ours, with standard deviations: for the first screen."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for place, pair in enumerate(PAIRS):
        found: dict[tuple[str, str], list[float]] = {}
        for line in read("distill", pair=pair, epochs="15"):
            found.setdefault((line["method"], line["weight"]), []).append(float(line["test"]))
        best: dict[str, list[float]] = {}
        for (method, _), tests in found.items():
            if len(tests) == 3:
                best[method] = max(tests, best.get(method, tests), key=statistics.mean)
        baseline = max(BASELINES.keys() & best.keys(), key=lambda method: statistics.mean(best[method]))
        bars = [("alone", "none", "0.75"), ("best baseline", baseline, "C0")]
        bars += [("RSD", "rsd", "#e88"), ("RSD + dense", "rsd_dense", "C3")]
        for row, (name, method, colour) in enumerate(bars):
            value, deviation, at = (*moments(best[method]), place + 0.2 * (row - 1.5))
            axes.barh(at, value, 0.19, xerr=deviation, color=colour, label=name if place == 0 else None)
            text = f"{value:.1f}" + (f" {BASELINES[method]}" if method in BASELINES else "")
            axes.text(value + deviation + 0.6, at, text, va="center", fontsize=8)
    axes.set_yticks(range(len(PAIRS)), list(PAIRS.values()))
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy, % ± standard deviation", xlim=(0, 92))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1, handlelength=1)
    figure.savefig(path, dpi=200)


def redundancy(path: Path) -> None:
    """The change in test accuracy against kappa = 0 with the same seed and precision, over kappa R."""
    figure = Figure(figsize=(5, 6), layout="constrained")
    axes = figure.add_subplot()
    known = {(line["teacher"], line["precision"]): line for line in read("redundancy_teachers", batch="128")}
    setting = {"pair": "vit_coarse", "method": "rsd", "batch": "128", "epochs": "10", "weight": "25"}
    for teacher, told in TEACHERS.items():
        tests: dict[float, dict[tuple[str, str], float]] = {}
        for line in read("redundancy", teacher=teacher, **setting):
            found = known[teacher, line["precision"]]
            share = round(float(line["kappa"]) * float(found["redundancy"]), 2)
            tests.setdefault(share, {})[line["seed"], line["precision"]] = float(line["test"])
        none = tests.pop(0.0)
        points = {at: [test - none[which] for which, test in runs.items()] for at, runs in sorted(tests.items())}
        label = f"{told}: D {found['features']}, R {float(found['redundancy']):.0f}"
        means, errors = zip(*(moments(changes) for changes in points.values()), strict=True)
        axes.errorbar(list(points), means, errors, marker="o", markersize=4, capsize=2, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="kappa R", ylabel="test accuracy against kappa = 0, points")
    axes.set_xticks(shares := [0.03, 0.1, 0.2, 0.3, 0.5, 1], [f"{share:g}" for share in shares])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def moments(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    for draw in (gain, redundancy):
        draw(RESULTS / f"{draw.__name__}.png")
