"""Trainable parameters that RSD and OFA add to a student: `python -m benchmarks.overhead`.

For the teachers and students of the two papers, with ImageNet's classes and with CIFAR-100's; built by timm on the
meta device, so that nothing is downloaded or computed. Both methods throw them away after training. The file has the
operations of both networks too, forward and of one image, two for each multiplication and addition.
"""

import argparse
import csv
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import paper, report
from benchmarks.methods import METHODS, Outputs, Setup
from benchmarks.throughput import commit


@cache
def build(name: str, classes: int) -> tuple[nn.Module, Outputs, int]:
    """The network, the shapes of what it makes of two images, and its operations for one, on the meta device."""
    network = paper.TASKS[classes].networks[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = network.build(classes)
        outputs = paper.outputs(model, network, torch.empty(2, 3, paper.SIDE, paper.SIDE))
    return model, outputs, counter.get_total_flops() // 2


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def rows() -> list[dict[str, str | int | float]]:
    result = []
    for classes, pair, above, name in ((n, *cell) for n in (1000, 100) for cell in paper.cells(n)):
        keys = paper.TASKS[classes].pairs[pair]
        (_, teacher, teacher_operations), (model, student, student_operations) = (build(key, classes) for key in keys)
        row: dict[str, str | int | float] = {"classes": classes, "teacher": above, "student": name}
        row["student_parameters"] = parameters(model)
        for method in ("rsd", "ofa"):
            added = nn.ModuleList()
            with torch.device("meta"):
                METHODS[method].build(Setup(student, teacher, nn.Identity(), nn.Identity(), 0.01, "sum"), added)
            row[f"{method}_added"] = parameters(added)
            row[f"{method}_percent"] = round(100 * parameters(added) / parameters(model), 1)
        row |= {"teacher_operations": teacher_operations, "student_operations": student_operations}
        result.append(row)
    return result


def table(found: list[dict[str, str | int | float]]) -> Table:
    title = "trainable parameters, millions (% of the student's)"
    # Without its edge, 80 columns hold it.
    result = Table("classes", "teacher", "student", title=title, title_justify="left", show_edge=False)
    for heading in ("size", "RSD adds", "OFA adds"):
        result.add_column(heading, justify="right")
    for row in found:
        added = (f"{row[f'{name}_added'] / 1e6:.2f} ({row[f'{name}_percent']} %)" for name in ("rsd", "ofa"))
        size = f"{row['student_parameters'] / 1e6:.2f}"
        result.add_row(str(row["classes"]), str(row["teacher"]), str(row["student"]), size, *added)
    return result


def markdown(path: Path) -> str:
    """The table of a file, in millions, and where it comes from."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    lines = ["| classes | teacher | student | its parameters | RSD adds | OFA adds |", "|---" * 6 + "|"]
    for row in found:
        millions = {name: f"{int(row[name]) / 1e6:.2f}" for name in ("student_parameters", "rsd_added", "ofa_added")}
        added = (f"{millions[f'{name}_added']} ({row[f'{name}_percent']} %)" for name in ("rsd", "ofa"))
        cells = (row["classes"], row["teacher"], row["student"], millions["student_parameters"], *added)
        lines.append(f"| {' | '.join(cells)} |")
    first = found[0]
    lines += ["", f"timm {first['timm']}; {first['date']}; commit {first['commit']}; `{first['command']}`"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=f"{__doc__.partition(': `')[0]}. Prints a table of the pairs of the two papers, in a quarter of a "
        "minute; the networks are built by timm without weights, and nothing is downloaded or trained.",
    )
    parser.add_argument("--csv", type=report.output, metavar="PATH", help="also write the table there")
    args = parser.parse_args(argv)
    found = rows()
    Console().print(table(found))
    if args.csv:
        command = shlex.join(["python", "-m", "benchmarks.overhead", *(sys.argv[1:] if argv is None else argv)])
        origin = {"timm": timm.__version__, "date": date.today().isoformat(), "commit": commit(), "command": command}
        args.csv.parent.mkdir(parents=True, exist_ok=True)
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*found[0], *origin])
            writer.writeheader()
            writer.writerows({**row, **origin} for row in found)


if __name__ == "__main__":
    main()
