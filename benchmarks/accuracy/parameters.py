"""Trainable parameters that RSD and OFA add to the papers' students: `python -m benchmarks.accuracy.parameters`.

timm builds the networks on the meta device, so nothing is downloaded or computed. Both methods drop these parameters
after training. It also counts the operations of both networks, forward and for one image: two for each multiplication
with addition. It writes benchmarks/results/overhead.csv in a quarter of a minute.
"""

import csv
from functools import cache

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import records
from benchmarks.accuracy.methods import METHODS, Setup
from benchmarks.accuracy.networks import Outputs
from benchmarks.accuracy.paper import SIDE, Paper, cells


@cache
def build(name: str, classes: int) -> tuple[nn.Module, Outputs, int]:
    """The network, the shapes that it makes of two images, and its operations for one, on the meta device."""
    task = Paper(classes)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = task.networks[name].build(classes)
        outputs = task.outputs(model, task.networks[name], torch.empty(2, 3, SIDE, SIDE))
    return model, outputs, counter.get_total_flops() // 2


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def rows() -> list[dict[str, str | int | float]]:
    result = []
    for classes, pair, above, name in ((n, *cell) for n in (1000, 100) for cell in cells(n)):
        keys = Paper(classes).pairs[pair]
        (_, teacher, teacher_operations), (model, student, student_operations) = (build(key, classes) for key in keys)
        row = {"classes": classes, "teacher": above, "student": name, "student_parameters": count(model)}
        for method in ("rsd", "ofa"):
            added = nn.ModuleList()
            with torch.device("meta"):
                METHODS[method].build(Setup(student, teacher, nn.Identity(), nn.Identity(), 0.01), added)
            row |= {f"{method}_added": count(added), f"{method}_percent": round(100 * count(added) / count(model), 1)}
        result.append(row | {"teacher_operations": teacher_operations, "student_operations": student_operations})
    return result


if __name__ == "__main__":
    origin = records.origin("benchmarks.accuracy.parameters", [], torch.device("cpu"), 1)
    last = {"timm": timm.__version__, **{name: origin[name] for name in ("date", "commit", "command")}}
    with (records.RESULTS / "overhead.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*(found := rows())[0], *last])
        writer.writeheader()
        writer.writerows({**row, **last} for row in found)
