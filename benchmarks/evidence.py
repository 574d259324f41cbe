"""What becomes of the runs of benchmarks.distill: `python -m benchmarks.evidence`.

Prints the tables of docs/evidence.md and draws its plots, from the files in benchmarks/results.
"""

import csv
import re
import shlex
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.distill import KEY, cell
from benchmarks.methods import method_named

RESULTS = Path(__file__).parent / "results"
TUNED = ("small_cnn_coarse", "256")  # the pair and batch at which rivals had several weights, too
Line = dict[str, str]
SETTING = [name for name in KEY if name not in ("seed", "teacher_epochs")]


def read(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pairs(lines: list[Line]) -> list[str]:
    return list(dict.fromkeys(line["pair"] for line in lines if line["method"] != "teacher"))


def groups(lines: Iterable[Line]) -> list[list[Line]]:
    """Runs that differ in the seed only, the best setting first."""
    found: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        found.setdefault(tuple(line[name] for name in SETTING), []).append(line)
    return sorted(found.values(), key=lambda group: -statistics.mean(accuracies(group)))


def accuracies(group: list[Line]) -> list[float]:
    return [float(line["test"]) for line in group]


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
        "| method | epochs | weight | kappa | seeds | test accuracy, % | over none | parameters added | step time |",
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


def origin(lines: list[Line]) -> str:
    """Where and when the lines come from, and commands that make them all; in the file each has its own."""
    machines = "; ".join(dict.fromkeys(f"{line['device']}, torch {line['torch']}" for line in lines))
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    dates = sorted({line["date"] for line in lines})
    text = f"{machines}; commits {commits}; {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "") + ":"
    return "\n".join([text, "", "<!-- not run: hours of training -->", "```", *commands(lines), "```"])


def commands(lines: list[Line]) -> list[str]:
    """Few calls of benchmarks.distill that together plan these runs and no others."""
    calls = [options(line) for line in lines if line["method"] != "teacher"]  # teachers are trained on the way
    for name in ("--seeds", "--batches", "--weights", "--kappas", "--methods", "--pairs"):
        # Calls that differ in this option only are one with all its values.
        joined: dict[tuple[tuple[str, tuple[str, ...]], ...], set[str]] = {}
        for call in calls:
            rest = tuple(item for item in call.items() if item[0] != name)
            joined.setdefault(rest, set()).update(call[name])
        calls = [{**dict(rest), name: tuple(sorted(values))} for rest, values in joined.items()]
    words = ([word for item in call.items() for word in (item[0], *item[1])] for call in calls)
    return [shlex.join(["python", "-m", "benchmarks.distill", *call]) for call in words]


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
    if line["precision"] == "bfloat16":
        found["--bfloat16"] = ()
    if line["warmup"] != cell(method.warmup):
        found["--warmup"] = (line["warmup"],)
    return found


def label(line: Line, among: list[Line]) -> str:
    """The method, with what sets it apart from others of its name."""
    same = [other for other in among if other["method"] == line["method"]]
    apart = [name for name in ("weight", "epochs") if len({other[name] for other in same}) > 1]
    return ", ".join([line["method"], *(f"{name} {line[name]}" for name in apart)])


def plot_accuracy(lines: list[Line], path: Path) -> None:
    """Mean and spread of the test accuracy of every method, one panel per pair."""
    shown = pairs(lines)
    figure = Figure(figsize=(4.5 * len(shown), 4.5), layout="constrained")
    for axes, pair in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        ordered = groups(line for line in lines if line["pair"] == pair)[::-1]
        for place, group in enumerate(ordered):
            values, ours = accuracies(group), "rsd" in group[0]["method"]
            axes.plot(values, [place] * len(values), "o", color="C3" if ours else "C0", alpha=0.5)
            axes.plot(statistics.mean(values), place, "|", color="black", markersize=14)
        firsts = [group[0] for group in ordered]
        axes.set_yticks(range(len(firsts)), [label(first, firsts) for first in firsts])
        axes.grid(axis="x", alpha=0.3)
        axes.set(xlabel="test accuracy, %", title=pair)
    figure.suptitle("One dot per seed, a stroke for the mean; red: RSD and its variants", fontsize=10)
    figure.savefig(path, dpi=150)


def plot_sensitivity(lines: list[Line], path: Path) -> None:
    """Validation accuracy over weight and kappa, a panel per pair and batch; outlined: within a point of its best."""
    plain = {"method": "rsd", "reduction": "sum", "warmup": "0"}
    lines = [line for line in lines if plain.items() <= line.items()]
    panels = list(dict.fromkeys((line["pair"], line["batch"]) for line in lines))
    weights, kappas = (sorted({float(line[name]) for line in lines}) for name in ("weight", "kappa"))
    figure = Figure(figsize=(3.2 * len(panels) + 1, 4.4), layout="constrained")
    panes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (pair, batch) in zip(panes, panels, strict=True):
        values = np.full((len(kappas), len(weights)), np.nan)
        for line in lines:
            if (line["pair"], line["batch"]) == (pair, batch):
                values[kappas.index(float(line["kappa"])), weights.index(float(line["weight"]))] = float(
                    line["validation"]
                )
        axes.imshow(values, cmap="viridis", vmin=np.nanmax(values) - 15, vmax=np.nanmax(values), origin="lower")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = value < np.nanmax(values) - 7
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
            if value >= np.nanmax(values) - 1:
                corner = (column - 0.47, row - 0.47)
                axes.add_patch(Rectangle(corner, 0.94, 0.94, fill=False, edgecolor="red", linewidth=2))
        axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
        axes.set_yticks(range(len(kappas)), [f"{kappa:g}" for kappa in kappas])
        axes.set(xlabel="weight", ylabel="kappa", title=f"{pair}, batch {batch}")
    figure.suptitle("Validation accuracy, %; red: within one point of the best of the panel", fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    lines, steps = read(RESULTS / "distill.csv"), read(RESULTS / "distill_steps.csv")
    for pair in pairs(lines):
        print(f"\n{pair}\n\n{markdown(lines, pair, steps)}")
    print(f"\n{origin(lines)}\n\n{origin(steps)}")
    plot_accuracy(lines, RESULTS / "accuracy.png")
    settings = read(RESULTS / "sensitivity.csv")
    print(f"\n{tuning(settings, *TUNED)}\n\n{origin(settings)}")
    plot_sensitivity(settings, RESULTS / "sensitivity.png")


if __name__ == "__main__":
    main()
