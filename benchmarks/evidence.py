"""What becomes of the runs of benchmarks.distill: `python -m benchmarks.evidence`.

Prints the tables of docs/evidence.md and draws its plots, from the files in benchmarks/results.
"""

import argparse
import csv
import itertools
import operator
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks import report
from benchmarks.distill import KEY, cell
from benchmarks.methods import method_named

RESULTS = Path(__file__).parent / "results"
HEADINGS = {
    "cnn_vit": "From ResNet to ViT",
    "cnn_mlp": "From ResNet to MLP",
    "vit_cnn": "From ViT to ResNet",
    "cnn_cnn": "From ResNet to ResNet",
    "small_cnn_coarse": "128 features",
    "cnn_coarse": "256 features",
}
GAIN = ("cnn_vit", "cnn_mlp", "vit_cnn")
RIVALS = {"kd": "KD", "dkd": "DKD", "dist": "DIST", "fitnet": "FitNets", "ofa": "OFA"}
TUNED = ("small_cnn_coarse", "256")  # the pair and batch at which rivals had several weights, too
Line = dict[str, str]
SETTING = [name for name in KEY if name not in ("seed", "teacher_epochs")]
SCENES = {
    "none": "the student alone",
    "kd": "KD per pixel",
    "cwd": "CWD",
    "pkd": "PKD",
    "fitnet_map": "FitNets on maps",
    "rsd": "pooled term alone",
    "rsd_dense": "pooled and dense term",
    "rsd_dense:pooled=0.0": "dense term alone, last stages",
    "rsd_dense:pooled=0.0,teacher_stage=3": "dense term alone",
    "rsd_dense:pooled=0.0,student_stage=3": "dense term alone",
    "cwd_rsd_dense": "CWD and the dense term",
    "cwd_rsd_dense:cwd=9.0,dense=1.0,student_stage=3,teacher_stage=4": "CWD and the dense term",
}


def read(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pairs(lines: list[Line]) -> list[str]:
    found = dict.fromkeys(line["pair"] for line in lines if line["method"] != "teacher")
    order = list(HEADINGS)
    return sorted(found, key=lambda pair: order.index(pair) if pair in order else len(order))


def groups(lines: Iterable[Line]) -> list[list[Line]]:
    """Runs that differ in the seed only, the best setting first."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in SETTING), []).append(line)
    return sorted(found.values(), key=lambda group: -statistics.mean(accuracies(group)))


def accuracies(group: list[Line], split: str = "test") -> list[float]:
    return [float(line[split]) for line in group]


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def over_none(group: list[Line], lines: list[Line], value: str, of: Callable[[float, float], float]) -> list[float]:
    """Of each run and that of the student alone with the same seed, where there is one."""
    alone = {
        line["seed"]: float(line[value])
        for line in lines
        if line["method"] == "none"
        and all(line[k] == group[0][k] for k in ("data", "pair", "epochs", "batch", "views"))
    }
    return [of(float(line[value]), alone[line["seed"]]) for line in group if line["seed"] in alone]


def markdown(lines: list[Line], pair: str, steps: list[Line]) -> str:
    """One line per method and setting: mean and sample standard deviation of the test accuracy over the seeds."""
    table = [
        "| method | epochs | weight | kappa | seeds | test accuracy, % | gain | parameters added | step time |",
        "|---" * 9 + "|",
    ]
    for group in groups(line for line in lines if line["pair"] == pair):
        first = group[0]
        gains = over_none(group, lines, "test", lambda a, b: a - b)
        timed = [line for line in steps if all(line[k] == first[k] for k in ("pair", "method", "batch"))]
        ratios = over_none(timed, steps, "step_ms", lambda a, b: a / b) if timed else []
        cells = [first[name] for name in ("method", "epochs", "weight", "kappa")]
        cells += [str(len(group)), spread(accuracies(group))]
        cells.append(f"{statistics.mean(gains):+.1f}" if gains and first["method"] != "none" else "")
        cells += [f"{int(first['added_parameters']):,}", f"x {statistics.median(ratios):.2f}" if ratios else ""]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def variants(lines: list[Line], pair: str, labelled: str = "1") -> str:
    """One line per method with its settings, the best on validation first."""
    here = groups(line for line in lines if (line["pair"], line["labelled"]) == (pair, labelled))
    names = ["weight", "kappa"] if len({group[0]["epochs"] for group in here}) < 2 else ["epochs", "weight", "kappa"]
    table = [f"| method | {' | '.join(names)} | seeds | validation, % | test, % |", "|---" * (4 + len(names)) + "|"]
    for group in sorted(here, key=lambda group: -statistics.mean(accuracies(group, "validation"))):
        cells = [f"`{group[0]['method']}`", *(group[0][name] for name in names), str(len(group))]
        cells += [spread(accuracies(group, split)) for split in ("validation", "test")]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def scenes(lines: list[Line], labelled: str) -> str:
    """Validation / test of each method at the weight that is best on validation with the first seed."""
    table = ["| method | ResNet to ViT | seeds | ViT to ResNet | seeds |", "|---" * 5 + "|"]
    best: dict[str, dict[str, list[Line]]] = {}
    lines = sorted(lines, key=operator.itemgetter("seed"))  # they finished in any order
    for group in groups(line for line in lines if line["labelled"] == labelled and line["method"] in SCENES):
        here, pair = best.setdefault(SCENES[group[0]["method"]], {}), group[0]["pair"]
        here[pair] = max(group, here.get(pair, group), key=lambda runs: float(runs[0]["validation"]))
    for name, found in sorted(best.items(), key=lambda item: -float(item[1]["cnn_vit"][0]["validation"])):
        cells = [name]
        for group in (found.get("cnn_vit", []), found.get("vit_cnn", [])):
            both = " / ".join(spread(accuracies(group, split)) for split in ("validation", "test")) if group else ""
            cells += [both, str(len(group) or "")]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def widths(lines: list[Line]) -> str:
    """Validation / test accuracy of rsd_wide by width, weight and kappa; 0.1 and 0.01 are those of 256 features."""
    table = ["| features | weight | kappa 0 | kappa 0.01 | kappa 2.56 / D |", "|---" * 5 + "|"]
    for width, scaled in itertools.product((64, 256, 1024, 2048), (False, True)):
        weight = 25.6 / width if scaled else 0.1
        cells = [str(width), f"25.6 / D = {cell(weight)}" if scaled else "0.1"]
        for kappa in (0, 0.01, 2.56 / width):
            which = {"method": f"rsd_wide:width={width}", "weight": cell(weight), "kappa": cell(float(kappa))}
            found = [line for line in lines if which.items() <= line.items()]
            both = (spread(accuracies(found, split)) for split in ("validation", "test"))
            cells.append(" / ".join(both) if found else "-")
        if width != 256 or not scaled:
            table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def tuning(lines: list[Line], pair: str, batch: str) -> str:
    """One line per method: validation accuracy by weight, and the test accuracy where that is best; kappa is 0.01."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        here = (line["pair"], line["batch"]) == (pair, batch) and line["kappa"] in ("", "0.01")
        if here and line["warmup"] == cell(method_named(line["method"]).warmup):
            found.setdefault(line["method"], []).append(line)
    best = {name: max(group, key=lambda line: float(line["validation"])) for name, group in found.items()}
    table = ["| method | validation accuracy, %, by weight | test accuracy at the best, % |", "|---|---|---|"]
    for name in sorted(found, key=lambda name: -float(best[name]["validation"])):
        ordered = sorted(found[name], key=lambda line: float(line["weight"]))
        by_weight = "; ".join(f"{line['weight']}: {float(line['validation']):.1f}" for line in ordered)
        table.append(f"| {name} | {by_weight} | {float(best[name]['test']):.1f} |")
    return "\n".join(table)


def origin(lines: list[Line], module: str = "benchmarks.distill") -> str:
    """Where and when the lines come from, and commands that make them all; in the file each has its own."""
    machines = "; ".join(dict.fromkeys(f"{line['device']}, torch {line['torch']}" for line in lines))
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    dates = sorted({line["date"] for line in lines})
    text = f"{machines}; commits {commits}; {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "") + ":"
    return "\n".join([text, "", "<!-- not run: hours of training -->", "```", *commands(lines, module), "```"])


def commands(lines: list[Line], module: str = "benchmarks.distill") -> list[str]:
    """Few calls of a benchmark of training that together plan these runs and no others."""
    calls = [options(line) for line in lines if line["method"] != "teacher"]  # teachers are trained on the way
    for name in ("--seeds", "--batches", "--weights", "--kappas", "--methods", "--pairs"):
        # Calls that differ in this option only are one with all its values.
        joined: dict[tuple[tuple[str, tuple[str, ...]], ...], set[str]] = {}
        for call in calls:
            rest = tuple(item for item in call.items() if item[0] != name)
            joined.setdefault(rest, set()).update(call[name])
        calls = [{**dict(rest), name: tuple(sorted(values))} for rest, values in joined.items()]
    words = ([word for item in call.items() for word in (item[0], *item[1])] for call in calls)
    return [shlex.join(["python", "-m", module, *call]) for call in words]


def options(line: Line) -> dict[str, tuple[str, ...]]:
    """Of a call that plans this one run."""
    method = method_named(line["method"])
    found = {
        "--data": (line["data"],),
        "--csv": ("again.csv",),  # and not the file that has the runs, where none is repeated
        "--teacher-epochs": (line["teacher_epochs"],),
        "--views": (line["views"],),
        "--epochs": (line["epochs"],),
        "--reductions": (line["reduction"] or "sum",),  # which the others have no use for
        "--seeds": (line["seed"],),
        "--batches": (line["batch"],),
        "--weights": ("x1" if line["weight"] == cell(method.weight) else line["weight"],),
        "--kappas": (line["kappa"] if method.kappa else "0.01",),
        "--methods": (line["method"],),
        "--pairs": (line["pair"],),
    }
    if threads := re.search(r"(\d+) threads?$", line["device"]):
        found["--threads"] = (threads[1],)
    if line["labelled"] != "1":
        found["--labelled"] = (line["labelled"],)
    if line["precision"] != "float32":
        found[f"--{line['precision']}"] = ()
    if line["warmup"] != cell(method.warmup):
        found["--warmup"] = (line["warmup"],)
    return found


def label(line: Line, among: list[Line]) -> str:
    """The method, with what sets it apart from others of its name."""
    same = [other for other in among if other["method"] == line["method"]]
    apart = [name for name in ("weight", "epochs") if len({other[name] for other in same}) > 1]
    return ", ".join([line["method"], *(f"{name} {line[name]}" for name in apart)])


def best_rival(lines: list[Line]) -> list[Line]:
    """The best of what is not ours, among those with as many seeds as the student alone."""
    seeds = sum(line["method"] == "none" and line["epochs"] == "15" for line in lines)
    rivals = [line for line in lines if "rsd" not in line["method"] and line["method"] not in ("none", "teacher")]
    return next(group for group in groups(rivals) if len(group) == seeds)


def plot_gain(lines: list[Line], path: Path) -> None:
    """The student alone, the best rival, and ours: for the first screen."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for place, pair in enumerate(GAIN):
        here = [line for line in lines if line["pair"] == pair and line["epochs"] == "15"]
        ours = [[line for line in here if line["method"] == name] for name in ("none", "rsd", "rsd_dense")]
        ours = [[line for line in runs if line["weight"] in ("0", "0.1")] for runs in ours]
        if not all(ours[:2]):
            continue
        bars = [("alone", ours[0], "0.75"), ("best rival", best_rival(here), "C0")]
        bars += [("RSD", ours[1], "#e88"), ("RSD + dense", ours[2], "C3")]
        for row, (name, runs, colour) in enumerate(bars):
            if not runs:
                continue
            value, at = statistics.mean(accuracies(runs)), place + 0.2 * (row - 1.5)
            axes.barh(at, value, 0.19, color=colour, label=name if place == 0 else None)
            text = f"{value:.1f}" + (f" {RIVALS[runs[0]['method']]}" if name == "best rival" else "")
            axes.text(value + 0.4, at, text, va="center", fontsize=8)
    axes.set_yticks(range(len(GAIN)), [HEADINGS[pair] for pair in GAIN])
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy, %", xlim=(0, 92))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, columnspacing=1, handlelength=1)
    figure.savefig(path, dpi=200)


def plot_accuracy(lines: list[Line], path: Path) -> None:
    """Mean and spread of the test accuracy of every method, one panel per pair, as narrow as a telephone."""
    shown = pairs(lines)
    ordered = {pair: groups(line for line in lines if line["pair"] == pair)[::-1] for pair in shown}
    heights = [len(ordered[pair]) + 2.5 for pair in shown]
    figure = Figure(figsize=(5, 0.22 * sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, pair in zip(panels, shown, strict=True):
        for place, group in enumerate(ordered[pair]):
            values, ours = accuracies(group), "rsd" in group[0]["method"]
            axes.plot(values, [place] * len(values), "o", color="C3" if ours else "C0", alpha=0.5)
            axes.plot(statistics.mean(values), place, "|", color="black", markersize=12)
        firsts = [group[0] for group in ordered[pair]]
        axes.set_yticks(range(len(firsts)), [label(first, firsts) for first in firsts])
        axes.set_ylim(-0.6, len(firsts) - 0.4)
        axes.grid(axis="x", alpha=0.3)
        axes.set_title(HEADINGS.get(pair, pair), fontsize=11)
    panels[-1].set_xlabel("test accuracy, %; red: RSD and its variants")
    figure.savefig(path, dpi=150)


def plot_sensitivity(lines: list[Line], path: Path) -> None:
    """Validation accuracy over weight and kappa, a panel per pair and batch; outlined: within a point of its best."""
    plain = {"method": "rsd", "reduction": "sum", "warmup": "0"}
    lines = [line for line in lines if plain.items() <= line.items()]
    panels = list(dict.fromkeys((line["pair"], line["batch"]) for line in lines))
    weights, kappas = (sorted({float(line[name]) for line in lines}) for name in ("weight", "kappa"))
    figure = Figure(figsize=(5, 2.6 * len(panels)), layout="constrained")
    panes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, (pair, batch) in zip(panes, panels, strict=True):
        values = np.full((len(kappas), len(weights)), np.nan)
        for line in lines:
            if (line["pair"], line["batch"]) == (pair, batch):
                values[kappas.index(float(line["kappa"])), weights.index(float(line["weight"]))] = float(
                    line["validation"]
                )
        top = np.nanmax(values)
        axes.imshow(values, cmap="viridis", vmin=top - 15, vmax=top, origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = value < np.nanmax(values) - 7
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
            if value >= np.nanmax(values) - 1:
                corner = (column - 0.47, row - 0.47)
                axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="red", linewidth=2))
        axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axes.set_yticks(range(len(kappas)), [f"{kappa:g}" for kappa in kappas])
        axes.set(xlabel="weight", ylabel="kappa")
        axes.set_title(f"{HEADINGS.get(pair, pair)}, batch {batch}", fontsize=11)
    figure.savefig(path, dpi=150)


def results(text: str) -> Path:
    """A folder that has the three files, and takes the plots: argparse's type."""
    needed = {*KEY, "validation", "test", "added_parameters", "step_ms", "device", "torch", "commit", "date"}
    for path in (Path(text, f"{name}.csv") for name in ("distill", "distill_steps", "sensitivity")):
        try:
            lines = read(path)
        except (OSError, ValueError, csv.Error):
            lines = []
        whole = (needed <= line.keys() and None not in line.values() for line in lines)
        if not all(whole) or not any(line["method"] != "teacher" for line in lines):
            message = f"'{path}' cannot be read or has no whole runs: give a folder where benchmarks.distill wrote it"
            raise argparse.ArgumentTypeError(message)
    return report.output(text, "accuracy.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description="Prints the tables of docs/evidence.md and draws its plots, from runs on file, in seconds.",
    )
    described = "has distill.csv, distill_steps.csv and sensitivity.csv, and gets the plots"
    parser.add_argument(
        "--results", type=results, default=str(RESULTS), metavar="DIR", help=f"{described} (default: %(default)s)"
    )
    folder = parser.parse_args(argv).results
    lines, steps = read(folder / "distill.csv"), read(folder / "distill_steps.csv")
    for pair in pairs(lines):
        print(f"\n{pair}\n\n{markdown(lines, pair, steps)}")
    print(f"\n{origin(lines)}\n\n{origin(steps)}")
    plot_gain(lines, folder / "gain.png")
    plot_accuracy(lines, folder / "accuracy.png")
    settings = read(folder / "sensitivity.csv")
    print(f"\n{tuning(settings, *TUNED)}\n\n{origin(settings)}")
    plot_sensitivity(settings, folder / "sensitivity.png")


if __name__ == "__main__":
    main()
