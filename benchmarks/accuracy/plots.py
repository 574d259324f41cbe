"""The plots of the committed runs: `python -m benchmarks.accuracy.plots` draws them anew, in seconds."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.accuracy.evidence import RESULTS, Line, groups, read, scores

PAIRS = {
    "cnn_vit": "From ResNet to ViT",
    "cnn_mlp": "From ResNet to MLP",
    "vit_cnn": "From ViT to ResNet",
    "cnn_cnn": "From ResNet to ResNet",
}
TEACHERS = {"small_cnn_coarse": "128 features", "cnn_coarse": "256 features"}
BASELINES = {"kd": "KD", "dkd": "DKD", "dist": "DIST", "fitnet": "FitNets", "ofa": "OFA"}


def gain(path: Path) -> None:
    """The student alone, the best baseline, and ours, with standard deviations: for the first screen."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    shown = ("cnn_vit", "cnn_mlp", "vit_cnn")
    for place, pair in enumerate(shown):
        whole = [group for group in groups(read("distill", pair=pair, epochs="15")) if len(group) == 3]
        best = {group[0]["method"]: group for group in reversed(whole)}
        baseline = next(group for group in whole if group[0]["method"] in BASELINES)
        bars = [("alone", best["none"], "0.75"), ("best baseline", baseline, "C0")]
        bars += [("RSD", best["rsd"], "#e88"), ("RSD + dense", best["rsd_dense"], "C3")]
        for row, (name, runs, colour) in enumerate(bars):
            value, deviation, at = (*moments(runs), place + 0.2 * (row - 1.5))
            axes.barh(at, value, 0.19, xerr=deviation, color=colour, label=name if place == 0 else None)
            text = f"{value:.1f}" + (f" {BASELINES[runs[0]['method']]}" if runs is baseline else "")
            axes.text(value + deviation + 0.6, at, text, va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [PAIRS[pair] for pair in shown])
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy, % ± standard deviation", xlim=(0, 92))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1, handlelength=1)
    figure.savefig(path, dpi=200)


def moments(runs: list[Line]) -> tuple[float, float]:
    return statistics.mean(scores(runs)), statistics.stdev(scores(runs))


def label(line: Line, among: list[Line]) -> str:
    """The method, with what sets it apart from others of its name."""
    same = [other for other in among if other["method"] == line["method"]]
    apart = [name for name in ("weight", "epochs") if len({other[name] for other in same}) > 1]
    return ", ".join([line["method"], *(f"{name} {line[name]}" for name in apart)])


def accuracy(path: Path) -> None:
    """Every run of every method, a panel for each pair."""
    ordered = {pair: groups(read("distill", pair=pair))[::-1] for pair in PAIRS}
    heights = [len(found) + 2.5 for found in ordered.values()]
    figure = Figure(figsize=(5, 0.22 * sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(PAIRS), 1, height_ratios=heights)
    for axes, (pair, found) in zip(panels, ordered.items(), strict=True):
        for place, group in enumerate(found):
            values, ours = scores(group), "rsd" in group[0]["method"]
            axes.plot(values, [place] * len(values), "o", color="C3" if ours else "C0", alpha=0.5)
            axes.plot(statistics.mean(values), place, "|", color="black", markersize=12)
        firsts = [group[0] for group in found]
        axes.set_yticks(range(len(firsts)), [label(first, firsts) for first in firsts])
        axes.set_ylim(-0.6, len(firsts) - 0.4)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(PAIRS[pair], fontsize=11)
    panels[-1].set_xlabel("test accuracy, %; red: RSD and its variants")
    figure.savefig(path, dpi=150)


def sensitivity(path: Path) -> None:
    """Validation accuracy over weight and kappa, for each pair and batch; outlined: within a point of the best."""
    lines = read("sensitivity", method="rsd", warmup="0")
    weights, kappas = (sorted({float(line[name]) for line in lines}) for name in ("weight", "kappa"))
    panels = list(dict.fromkeys((line["pair"], line["batch"]) for line in lines))
    figure = Figure(figsize=(5, 2.6 * len(panels)), layout="constrained")
    for axes, (pair, batch) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        values = np.full((len(kappas), len(weights)), np.nan)
        for line in lines:
            if (line["pair"], line["batch"]) == (pair, batch):
                at = kappas.index(float(line["kappa"])), weights.index(float(line["weight"]))
                values[at] = float(line["validation"])
        top = np.nanmax(values)
        axes.imshow(values, cmap="viridis", vmin=top - 15, vmax=top, origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if value < top - 7 else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
            if value >= top - 1:
                corner = (column - 0.47, row - 0.47)
                axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="red", linewidth=2))
        axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axes.set_yticks(range(len(kappas)), [f"{kappa:g}" for kappa in kappas])
        axes.set(xlabel="weight", ylabel="kappa")
        axes.set_title(f"{TEACHERS[pair]}, batch {batch}", fontsize=11)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    for draw in (gain, accuracy, sensitivity):
        draw(RESULTS / f"{draw.__name__}.png")
