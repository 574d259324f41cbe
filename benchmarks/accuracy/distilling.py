"""A teacher, trained once and kept, and the students under it."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy import training
from benchmarks.accuracy.cache import kept
from benchmarks.accuracy.data import in_views
from benchmarks.accuracy.methods import METHODS, Setup, method_named
from benchmarks.accuracy.networks import Outputs, as_map, down_to
from benchmarks.accuracy.runs import Run
from benchmarks.accuracy.training import Bench, Teach


def distil(bench: Bench, run: Run) -> tuple[list[float], nn.Module]:
    """Trains one student. Returns its losses and the student."""
    above, name = bench.task.pairs[run.pair]
    teacher, _, teach = teacher_of(bench, run, above)
    torch.manual_seed(run.seed)
    student = bench.model(name)  # first, so that every method starts from the same weights
    added = nn.ModuleList()
    term = method_named(run.method).build(setup(bench, name, student, teacher, teach, run), added)
    return training.fit(bench, name, student, run, term, added.to(bench.device), teach), student


@torch.no_grad()
def setup(bench: Bench, name: str, student: nn.Module, teacher: nn.Module, teach: Teach, run: Run) -> Setup:
    student.eval()
    images = next(iter(bench.data.shown(bench.data.train)))[:2]
    outputs = bench.outputs(name, student, images), teach(images, torch.arange(2, device=bench.device))
    return Setup(*outputs, student.get_classifier(), teacher.get_classifier(), run.kappa or 0.0)


def teacher_of(bench: Bench, run: Run, name: str) -> tuple[nn.Module, Run, Teach]:
    """The trained network, its row, and its outputs on training images; from the cache where that has them."""
    if name not in bench.teachers:
        which = [name, bench.data.fingerprint, run.teacher_epochs, run.precision, run.views]
        which += [run.teacher] * bool(run.teacher) + [f"{run.processes} processes"] * (run.processes > 1)
        stem = bench.args.cache / "-".join(str(x) for x in which)
        saved = kept(Path(f"{stem}.pt"), lambda: train_teacher(bench, run, name), bench.device)
        model = bench.model(name).eval()
        model.load_state_dict(saved["model"])
        if bench.data.views is None:  # every view is fresh, so there is nothing to keep
            teach = torch.no_grad()(lambda images, at: bench.outputs(name, model, images))
        else:
            found = kept(Path(f"{stem}-outputs.pt"), lambda: look_up(bench, name, model), bench.device)
            teach = partial(take, found)
        bench.teachers[name] = model, Run(**saved["run"]), teach
    return bench.teachers[name]


def train_teacher(bench: Bench, of: Run, name: str) -> dict[str, Any]:
    above = bench.task.taught_by.get(name)
    method = METHODS["kd" if above else "none"]
    batch = min(bench.task.defaults["batches"][0], len(bench.data.train.labels) // of.processes)
    run = replace(of, pair=name, method="teacher", seed=0, labelled=1, epochs=of.teacher_epochs, batch=batch)
    run = replace(run, weight=method.weight, kappa=None, reduction="", warmup=0.0)
    torch.manual_seed(0)
    model = bench.model(name)
    if bench.task.pretrained:
        bench.task.pretrained(model, bench.args)
    term, added, teach = None, nn.ModuleList(), None
    if above:
        teacher, _, teach = teacher_of(bench, of, above)
        term = method.build(setup(bench, name, model, teacher, teach, run), added)
    training.fit(bench, name, model, run, term, added, teach)
    return {"model": model.state_dict(), "run": asdict(run)}


@torch.no_grad()
def look_up(bench: Bench, name: str, model: nn.Module) -> list[Tensor]:
    """The teacher's outputs on every view, with stages as maps averaged down to the task's grid in float16."""
    model.eval()
    count, views = bench.data.views.shape[:2]
    count, found = count * views, None
    for rows in torch.arange(count, device=bench.device).split(512):
        image, view = rows // views, rows % views
        with bench.autocast():
            images, _ = in_views(bench.data.train, image, bench.data.views[image, view])
            out = bench.outputs(name, model, images)
        maps = [down_to(as_map(stage).float(), bench.task.grid).half() for stage in out.stages]
        batch = [out.logits, out.embedding.float(), *maps]
        found = found or [x.new_empty(count, *x.shape[1:]) for x in batch]  # filled in place: these are gigabytes
        for whole, part in zip(found, batch, strict=True):
            whole[rows] = part
    return found


def take(found: list[Tensor], images: Tensor, at: Tensor) -> Outputs:
    """The teacher's outputs by their places in the cache."""
    logits, embedding, *stages = (x[at] for x in found)
    return Outputs(logits, embedding, stages)
