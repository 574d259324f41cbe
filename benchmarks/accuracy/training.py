"""One run: a student, its two losses, and a loop that goes on where it was stopped."""

import argparse
import hashlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.accuracy.cache import rank_and_world, wait, write
from benchmarks.accuracy.data import UNLABELLED, Split
from benchmarks.accuracy.methods import Term
from benchmarks.accuracy.networks import Outputs
from benchmarks.accuracy.runs import Run


@dataclass
class Bench:
    """What all runs of one call share."""

    task: Any  # the module classification or segmentation, or a Paper
    data: Any  # what the task's load returns
    args: argparse.Namespace
    progress: Progress
    origin: dict[str, Any]  # a row's last columns
    teachers: dict[str, tuple[nn.Module, Run, "Teach"]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device(self.args.device)

    def model(self, name: str) -> nn.Module:
        return self.task.networks[name].build(self.data.classes).to(self.device, memory_format=torch.channels_last)

    def outputs(self, name: str, model: nn.Module, images: Tensor) -> Outputs:
        return self.task.outputs(model, self.task.networks[name], images)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bfloat16)


Teach = Callable[[Tensor, Tensor], Outputs]  # from images, and their places in the cache


class Objective(nn.Module):
    """Both losses of a step in one module, so that DDP and the compiler see the projectors too."""

    def __init__(self, outputs: Callable, model: nn.Module, added: nn.ModuleList, term: Term | None, smoothing: float):
        super().__init__()
        self.outputs, self.model, self.added, self.term, self.smoothing = outputs, model, added, term, smoothing

    def forward(self, images: Tensor, labels: Tensor, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        student = self.outputs(self.model, images)
        loss = cross_entropy(student.logits, labels, self.smoothing)
        return loss, self.term(student, teacher, labels) if self.term and teacher else loss.new_zeros(())


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over what has a label, 0 if nothing has one. Maps of logits are enlarged to the labels."""
    if labels.is_floating_point():  # a mixture of two images has two labels
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if logits.ndim == 4:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=smoothing)
    return total / (labels != UNLABELLED).sum().clamp(min=1)


class Checkpoint:
    """A run after its last whole epoch. All randomness of an epoch follows from `draw`."""

    def __init__(self, path: Path, parts: dict[str, Any], draw: torch.Generator) -> None:
        self.path, self.parts, self.draw = path, parts, draw
        self.epoch, self.minutes, self.losses, self.times = 0, 0.0, [], []
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)  # AdamW keeps its steps on the CPU
            for name, part in parts.items():
                part.load_state_dict(state[name])
            draw.set_state(state["draw"])
            self.epoch, self.minutes, self.losses, self.times = state["log"]

    def save(self, epoch: int, minutes: float) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"draw": self.draw.get_state(), "log": [epoch, minutes, self.losses, self.times]}
        write(state, self.path)


def fit(
    bench: Bench, name: str, model: nn.Module, run: Run, term: Term | None, added: nn.ModuleList, teach: Teach | None
) -> list[float]:
    """Trains in place, fills in the row and returns the losses. Nothing else looks at the test images."""
    network = bench.task.networks[name]
    steps = max(1, len(bench.data.train.labels) // run.processes // run.batch)
    objective = Objective(partial(bench.outputs, name), model, added, term, network.smoothing)
    parameters = list(objective.parameters())
    lr = network.lr * run.batch * run.processes / 128
    optimizer = network.optimizer(parameters, lr=lr, weight_decay=network.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, network.schedule(run.epochs * steps))
    draw = torch.Generator().manual_seed(run.seed)
    which = (bench.data.fingerprint, run.key, bench.origin["commit"])  # no run is half one code, half another
    path = bench.args.cache / f"{hashlib.sha256(repr(which).encode()).hexdigest()[:16]}.run"
    kept = Checkpoint(path, {"objective": objective, "optimizer": optimizer, "schedule": schedule}, draw)
    if bench.args.compile:
        torch.compiler.reset()  # else all runs count towards one limit of compilations
    step = torch.compile(objective) if bench.args.compile else objective
    step = DistributedDataParallel(step) if run.processes > 1 else step
    bar = bench.progress.add_task(f"{run.pair} {run.method} seed {run.seed}", total=run.epochs * steps)
    bench.progress.advance(bar, kept.epoch * steps)
    model.train()
    start = before = time.perf_counter()
    for epoch in range(kept.epoch, run.epochs):
        for i, (at, images, labels) in enumerate(bench.data.epoch(run, network, draw, teach is not None)):
            with bench.autocast():
                target = teach(images, at) if teach and run.method != "none" else None
                loss, taught = step(images, labels, target)
                grown = min(1.0, (epoch * steps + i + 1) / max(1, run.warmup * run.epochs * steps))
                loss = loss + run.weight * grown * taught
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, network.clip)
            optimizer.step()
            schedule.step()
            kept.losses.append(loss.item())  # waits for a GPU
            now = time.perf_counter()
            kept.times.append(now - before)
            before = now
            bench.progress.advance(bar)
        if rank_and_world()[0] == 0 and epoch + 1 < run.epochs:
            kept.save(epoch + 1, kept.minutes + (now - start) / 60)
            before = time.perf_counter()
    bench.progress.remove_task(bar)
    run.step_ms = statistics.median(kept.times or [0.0]) * 1e3
    run.minutes = kept.minutes + (time.perf_counter() - start) / 60
    run.added_parameters = sum(parameter.numel() for parameter in objective.added.parameters())
    run.validation, run.test = (score(bench, model, split) for split in (bench.data.validation, bench.data.test))
    vars(run).update(bench.origin)
    wait()  # every process has read the checkpoint
    path.unlink(missing_ok=True)
    return kept.losses


@torch.no_grad()
def score(bench: Bench, model: nn.Module, split: Split) -> float:
    if not len(split.labels):
        return math.nan
    model.eval()
    predicted = torch.cat([model(images).argmax(1) for images in bench.data.shown(split)])
    return bench.task.score(predicted, split.labels.to(bench.device))
