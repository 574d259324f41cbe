"""Does it distil: `python -m benchmarks.distill --data DIR`.

Trains a student of one family under a teacher of another, once for every pair, method and seed asked for, and appends
one row per finished run to a CSV. A run that is in the file already is not repeated.

A tenth of the training images is held out for validation, the same tenth in every run: choose by val_accuracy. The
test images are looked at once, when a run is over. Every training image has a fixed set of augmented views, for which
a teacher's outputs are computed once and kept. Within a seed all methods start from the same weights and see the same
images in the same order. A run that is stopped goes on from its last whole epoch.
"""

import argparse
import csv
import hashlib
import itertools
import math
import os
import pickle
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from timm.layers import set_fused_attn
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import report
from benchmarks.methods import METHODS, Outputs, Setup, Term, as_map, down_to, method_named
from benchmarks.throughput import commit, describe

SIDE, PAD, UNLABELLED = 32, 4, -100


def cosine(steps: int, up: float = 0.05, floor: float = 0.0) -> Callable[[int], float]:
    """Factors of the learning rate: up over a share of the steps, then down half a cosine."""
    first = max(1, int(up * steps))

    def factor(i: int) -> float:
        done = max(0, i - first) / max(1, steps - first)
        return min((i + 1) / first, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    return factor


class Network(NamedTuple):
    """A timm model and how it is trained."""

    build: Callable[[int], nn.Module]
    blocks: tuple[int, ...]  # where its four stages end, as forward_intermediates counts
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float  # at a batch of 128, that of all processes together; in proportion at others
    weight_decay: float
    schedule: Callable[[int], Callable[[int], float]] = cosine
    clip: float = 5.0
    smoothing: float = 0.0  # of labels
    strong: bool = False  # augmentation, where the task has two


def resnet(classes: int, width: int, depth: int) -> ResNet:
    channels = (width, 2 * width, 4 * width, 8 * width)
    # The stem's width follows from "deep"; a single 3 x 3 convolution without pooling takes its place.
    model = ResNet(BasicBlock, (depth,) * 4, classes, channels=channels, stem_type="deep", stem_width=width // 2)
    model.conv1, model.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
    return model


def vit(
    classes: int, width: int, heads: int, depth: int = 6, patch: int = 4, size: int | tuple[int, int] = SIDE
) -> VisionTransformer:
    shape = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    shape["mlp_ratio"] = 2
    return VisionTransformer(num_classes=classes, class_token=False, global_pool="avg", **shape)


def resmlp(classes: int, width: int, depth: int = 6) -> MlpMixer:
    shape = {"img_size": SIDE, "patch_size": 4, "embed_dim": width, "num_blocks": depth, "mlp_ratio": 4}
    return MlpMixer(num_classes=classes, block_layer=ResBlock, norm_layer=Affine, **shape)


def sgd(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)


NETWORKS = {
    "resnet": Network(lambda classes: resnet(classes, 32, 2), (1, 2, 3, 4), sgd, 0.1, 5e-4),
    "resnet_small": Network(lambda classes: resnet(classes, 16, 1), (1, 2, 3, 4), sgd, 0.1, 5e-4),
    "vit": Network(lambda classes: vit(classes, 192, 6), (0, 1, 4, 5), torch.optim.AdamW, 1e-3, 0.05),
    "vit_small": Network(lambda classes: vit(classes, 96, 3), (0, 1, 4, 5), torch.optim.AdamW, 1e-3, 0.05),
    "vit_coarse": Network(lambda classes: vit(classes, 96, 3, patch=8), (0, 1, 4, 5), torch.optim.AdamW, 1e-3, 0.05),
    "resmlp_small": Network(lambda classes: resmlp(classes, 96), (0, 1, 4, 5), torch.optim.AdamW, 1e-3, 0.05),
}
PAIRS = {  # teacher, student
    "cnn_vit": ("resnet", "vit_small"),
    "cnn_mlp": ("resnet", "resmlp_small"),
    "vit_cnn": ("vit", "resnet_small"),
    "cnn_cnn": ("resnet", "resnet_small"),
    # For grids of settings: a student of a quarter of the cost, under teachers of 256 and 128 features.
    "cnn_coarse": ("resnet", "vit_coarse"),
    "small_cnn_coarse": ("resnet_small", "vit_coarse"),
    "small_cnn_vit": ("resnet_small", "vit_small"),  # for finer grids: the teacher's third stage has 8 x 8, too
}
# On ten thousand images a transformer surpasses no small CNN by itself. So it is trained as DeiT was, under a CNN.
TAUGHT_BY = {"vit": "resnet"}


def outputs(model: nn.Module, network: Network, images: Tensor) -> Outputs:
    layout = "NCHW" if isinstance(model, ResNet) else "NLC"
    last, stages = model.forward_intermediates(images, indices=network.blocks, output_fmt=layout)
    embedding = model.forward_head(last, pre_logits=True)
    return Outputs(model.get_classifier()(embedding).float(), embedding, stages)


class Split(NamedTuple):
    images: Tensor  # (N, 3, H, W) bytes
    labels: Tensor  # (N,), or (N, H, W) of pixels; UNLABELLED where there is none


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split
    classes: int
    fingerprint: str  # names what is computed from these images


def load(source: str, cache: Path, device: torch.device) -> Data:
    """From a folder with train/ and test/, one folder per class in each; or "cifar100", which is downloaded.

    "cifar100-20" is its first twenty classes, in the order that a folder of them has.
    """
    parts = ("train", "test")
    if Path(source).is_dir():
        sets = [torchvision.datasets.ImageFolder(str(Path(source) / part)) for part in parts]
        classes = len(sets[0].classes)
        splits = [(stacked([small(image) for image, _ in images]), torch.tensor(images.targets)) for images in sets]
    else:
        for part in parts:
            torchvision.datasets.CIFAR100(str(cache), part == "train", download=True)
        classes = 20 if source == "cifar100-20" else 100
        splits = [first_classes(cache / "cifar-100-python" / part, classes) for part in parts]
    (images, labels), test = splits
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    found = [
        Split(*(x.contiguous().to(device) for x in pair))
        for pair in ((images[rest], labels[rest]), (images[held_out], labels[held_out]), test)
    ]
    return Data(*found, classes, fingerprint(images, labels))


def first_classes(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a file of CIFAR-100, by class and then by name."""
    with path.open("rb") as file:
        raw = pickle.load(file, encoding="latin1")
    labels = torch.tensor(raw["fine_labels"])
    wanted = [i for i in range(len(labels)) if labels[i] < classes]
    wanted.sort(key=lambda i: (int(labels[i]), raw["filenames"][i]))
    return torch.from_numpy(raw["data"][wanted]).view(-1, 3, SIDE, SIDE), labels[wanted]


def small(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def stacked(pixels: list[np.ndarray[Any, Any]]) -> Tensor:
    """(N, 3, H, W) of images (H, W, 3)."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def fingerprint(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()[:12]


def shift(images: Tensor, views: Tensor, fill: int = 0) -> Tensor:
    """Pads, crops and mirrors each image (N, C, H, W) by its view (row, column, mirror or not)."""
    height, width = images.shape[2:]
    padded = F.pad(images, (PAD,) * 4, value=fill)
    steps = torch.arange(width, device=images.device)
    rows = views[:, :1] + torch.arange(height, device=images.device)
    columns = views[:, 1:2] + torch.where(views[:, 2:] == 1, steps.flip(0), steps)
    first = torch.arange(len(images), device=images.device)[:, None, None]
    # With the channels between, indexing puts them last, which is the memory format that convolutions like best.
    return padded[first, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    return (images.float() - 120) / 64  # near enough to the mean and deviation of any photographs


def draw_views(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    limits = torch.tensor([2 * PAD + 1, 2 * PAD + 1, 2])
    return (torch.rand(*shape, 3, generator=generator) * limits).long()


def in_views(split: Split, rows: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    return normalise(shift(split.images[rows], views)), split.labels[rows]


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    return 100 * (predicted == labels).float().mean().item()


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """The mean over what has a label, 0 if nothing has; maps of logits are enlarged to the labels."""
    if labels.is_floating_point():  # a mixture of two images has two labels
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if logits.ndim == 4:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum", label_smoothing=smoothing)
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def in_memory(
    bench: "Bench", network: Network, run: "Run", draw: torch.Generator, fixed: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """An epoch of images in memory: where the teacher's outputs have them, images, labels; in fixed or fresh views."""
    train, views = bench.data.train, bench.args.views
    order = torch.randperm(len(train.labels), generator=draw)[bench.rank :: bench.world]
    for step in range(max(1, len(order) // run.batch)):
        rows = order[step * run.batch : (step + 1) * run.batch].to(bench.device)
        if fixed:
            which = torch.randint(views, (len(rows),), generator=draw).to(bench.device)
            at, chosen = rows * views + which, bench.views[rows, which]
        else:
            at, chosen = rows, draw_views((len(rows),), draw).to(bench.device)
        images, y = bench.task.in_views(train, rows, chosen)
        y[rows % run.labelled != 0] = UNLABELLED
        yield at, images, y


def as_they_are(bench: "Bench", split: Split) -> Iterator[Tensor]:
    return (normalise(images) for images in split.images.split(100))


class Task(NamedTuple):
    """What sets one benchmark of training apart from another."""

    module: str  # that is run
    source: Callable[[str], str]  # checks what --data names
    description: str
    networks: dict[str, Network]
    pairs: dict[str, tuple[str, str]]  # teacher, student
    taught_by: dict[str, str]  # teachers that are trained under another
    methods: tuple[str, ...]  # by default
    not_for: tuple[str, ...]  # methods that need other networks
    load: Callable[[str, Path, torch.device], Data]
    outputs: Callable[[nn.Module, Network, Tensor], Outputs]
    score: Callable[[Tensor, Tensor], float]  # of predictions and labels, in percent
    defaults: dict[str, Any]  # of options
    in_views: Callable[[Split, Tensor, Tensor], tuple[Tensor, Tensor]] = in_views  # images and labels of some rows
    grid: tuple[int, int] = (8, 8)  # to which a teacher's maps are averaged down in the cache
    # Of images that are not in memory there is no cache: the teacher looks at each batch, from weights that this loads.
    pretrained: Callable[[nn.Module, Path | None], None] | None = None
    batches: Callable[..., Iterator[tuple[Tensor, Tensor, Tensor]]] = in_memory
    shown: Callable[..., Iterator[Tensor]] = as_they_are  # a split's images, in order, as networks take them


def take(targets: Outputs, images: Tensor, rows: Tensor) -> Outputs:
    """The outputs of some images, by their places in the cache."""
    return Outputs(targets.logits[rows], targets.embedding[rows], [stage[rows] for stage in targets.stages])


@dataclass
class Run:
    """One line of the CSV; the fields up to warmup say which run it is."""

    data: str
    labelled: int  # 1: every training image has its label, n: every n-th
    pair: str
    method: str
    seed: int
    teacher: str  # the file of its weights, if they were not trained here
    teacher_epochs: int
    epochs: int
    batch: int  # of each process
    processes: int
    precision: str
    views: int
    weight: float
    kappa: float | None
    reduction: str
    warmup: float
    validation: float = 0.0  # accuracy in percent, or what the task has for it
    test: float = 0.0
    added_parameters: int = 0
    step_ms: float = 0.0  # median
    minutes: float = 0.0
    device: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(cell(getattr(self, name)) for name in KEY)


COLUMNS = [field.name for field in fields(Run)]
KEY = COLUMNS[: COLUMNS.index("warmup") + 1]


def cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def append(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow({name: cell(value) for name, value in asdict(run).items()})


def finished(path: Path) -> set[tuple[str, ...]]:
    """The keys of the runs in the file."""
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes: name another file")
        return {tuple(line[name] for name in KEY) for line in reader}


class Objective(nn.Module):
    """The two losses of a step, in one module, so that what wraps or compiles it has the projectors too."""

    def __init__(
        self,
        outputs: Callable[[nn.Module, Network, Tensor], Outputs],
        network: Network,
        model: nn.Module,
        added: nn.ModuleList,
        term: Term | None,
    ) -> None:
        super().__init__()
        self.outputs, self.network, self.model, self.added, self.term = outputs, network, model, added, term

    def forward(self, images: Tensor, labels: Tensor, teacher: Outputs | None) -> tuple[Tensor, Tensor]:
        student = self.outputs(self.model, self.network, images)
        loss = cross_entropy(student.logits, labels, self.network.smoothing)
        return loss, self.term(student, teacher, labels) if self.term and teacher else loss.new_zeros(())


Teach = Callable[[Tensor, Tensor], Outputs]  # of images, and where the cache has them


class Bench:
    """The data, the device and the cache that all runs share."""

    def __init__(self, task: Task, args: argparse.Namespace, progress: Progress) -> None:
        self.task, self.args, self.progress, self.device = task, args, progress, torch.device(args.device)
        self.rank, self.world = rank_and_world()
        if args.threads:
            torch.set_num_threads(args.threads)
        if self.rank:
            everyone()  # the first process downloads what is missing
        self.data = task.load(args.data, args.cache, self.device)
        if not self.rank:
            everyone()
        count = len(self.data.train.labels)
        self.teachers: dict[str, tuple[nn.Module, Run, Teach]] = {}
        self.views = draw_views((count, args.views), torch.Generator().manual_seed(0)).to(self.device)
        self.origin = {
            "device": describe(self.device, torch.get_num_threads()),
            "torch": str(torch.__version__),
            "commit": commit(),
            "date": date.today().isoformat(),
            "command": args.command,
        }
        # What torch fuses is slower in bfloat16 on a CPU: 0.43 s against 0.15 s for a step of vit_small on one core.
        set_fused_attn(self.device.type != "cpu")

    def model(self, name: str) -> nn.Module:
        return self.task.networks[name].build(self.data.classes).to(self.device, memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.args.float16 else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=precision(self.args) != "float32")

    def fit(
        self,
        name: str,
        model: nn.Module,
        run: Run,
        term: Term | None = None,
        added: nn.ModuleList | None = None,
        teach: Teach | None = None,
    ) -> list[float]:
        """Trains in place, fills in the row, and returns the losses; the test images are seen here and nowhere else.

        Every epoch ends with a checkpoint, from which the same call goes on.
        """
        network = self.task.networks[name]
        steps = max(1, len(self.data.train.labels) // self.world // run.batch)
        objective = Objective(self.task.outputs, network, model, nn.ModuleList() if added is None else added, term)
        parameters = list(objective.parameters())
        lr = network.lr * run.batch * self.world / 128
        optimizer = network.optimizer(parameters, lr=lr, weight_decay=network.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, network.schedule(run.epochs * steps))
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.args.float16)
        draw = torch.Generator().manual_seed(run.seed)
        losses, times, minutes, first = [], [], 0.0, 0
        parts = {"objective": objective, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
        which = (self.data.fingerprint, run.key, self.origin["commit"])  # no run is half of one code, half of another
        digest = hashlib.sha256(repr(which).encode()).hexdigest()
        path = self.args.cache / f"{digest[:16]}.run"
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)  # AdamW keeps its steps on the CPU
            for key, part in parts.items():
                part.load_state_dict(state[key])
            draw.set_state(state["draw"])
            torch.set_rng_state(state["random"])
            losses, times, minutes, first = (state[key] for key in ("losses", "times", "minutes", "epoch"))
        if self.args.compile:
            torch.compiler.reset()  # else all runs count towards one limit, beyond which they are not compiled
        step = torch.compile(objective) if self.args.compile else objective
        step = DistributedDataParallel(step) if self.world > 1 else step
        bar = self.progress.add_task(f"{run.pair} {run.method} seed {run.seed}", total=run.epochs * steps)
        self.progress.advance(bar, first * steps)
        model.train()
        start = before = time.perf_counter()
        for epoch in range(first, run.epochs):
            for i, (at, images, y) in enumerate(self.task.batches(self, network, run, draw, teach is not None)):
                with self.autocast():
                    target = teach(images, at) if teach and run.method != "none" else None
                    loss, taught = step(images, y, target)
                    grown = min(1.0, (epoch * steps + i + 1) / max(1, run.warmup * run.epochs * steps))
                    loss = loss + run.weight * grown * taught
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, network.clip)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                losses.append(loss.item())  # which waits for a GPU
                now = time.perf_counter()
                times.append(now - before)
                before = now
                self.progress.advance(bar)
            if self.rank == 0 and epoch + 1 < run.epochs:
                state = {key: part.state_dict() for key, part in parts.items()}
                state |= {"draw": draw.get_state(), "random": torch.get_rng_state(), "epoch": epoch + 1}
                state |= {"losses": losses, "times": times, "minutes": minutes + (now - start) / 60}
                write(state, path)
                before = time.perf_counter()
        self.progress.remove_task(bar)
        run.step_ms = statistics.median(times or [0.0]) * 1e3
        run.minutes = minutes + (time.perf_counter() - start) / 60
        run.added_parameters = sum(parameter.numel() for parameter in objective.added.parameters())
        run.validation, run.test = (self.score(model, x) for x in (self.data.validation, self.data.test))
        vars(run).update(self.origin)
        everyone()  # has what it needs of the file
        path.unlink(missing_ok=True)
        return losses

    @torch.no_grad()
    def score(self, model: nn.Module, split: Split) -> float:
        if not len(split.labels):
            return math.nan
        model.eval()
        predicted = torch.cat([model(images).argmax(1) for images in self.task.shown(self, split)])
        return self.task.score(predicted, split.labels.to(self.device))

    def teacher(self, name: str) -> tuple[nn.Module, Run, Teach]:
        """The trained network, its own row, and what it makes of the training images; from the cache if it is there."""
        if name not in self.teachers:
            args = self.args
            which = [name, self.data.fingerprint, args.teacher_epochs, precision(args), args.views]
            which += [args.teacher_name] if args.teacher else []
            stem = "-".join(str(x) for x in which + ([f"{self.world} processes"] if self.world > 1 else []))
            saved = kept(args.cache / f"{stem}.pt", lambda: self.train_teacher(name), self.device)
            model = self.model(name).eval()
            model.load_state_dict(saved["model"])
            if self.task.pretrained:
                teach = torch.no_grad()(lambda images, at: self.task.outputs(model, self.task.networks[name], images))
            else:
                targets = kept(args.cache / f"{stem}-outputs.pt", lambda: tuple(self.look_up(name, model)), self.device)
                teach = partial(take, Outputs(*targets))
            self.teachers[name] = model, Run(**saved["run"]), teach
        return self.teachers[name]

    def train_teacher(self, name: str) -> dict[str, Any]:
        args, above = self.args, self.task.taught_by.get(name)
        method = METHODS["kd" if above else "none"]
        if self.task.pretrained and not args.teacher and not args.teacher_epochs and self.data.classes != 1000:
            report.refuse("the teacher's classifier would be random: give --teacher-epochs or --teacher")
        batch = min(self.task.defaults["batches"][0], len(self.data.train.labels) // self.world)
        settings = {"epochs": args.teacher_epochs, "batch": batch, "weight": method.weight, "kappa": None}
        run = Run(
            pair=name, method="teacher", seed=0, reduction="", warmup=0.0, **settings, **shared(args) | {"labelled": 1}
        )
        torch.manual_seed(0)
        model = self.model(name)
        if self.task.pretrained:
            self.task.pretrained(model, args.teacher)
        if above:
            teacher, _, teach = self.teacher(above)
            term = method.build(self.setup(name, model, teacher, teach, run), nn.ModuleList())
            self.fit(name, model, run, term, teach=teach)
        else:
            self.fit(name, model, run)
        return {"model": model.state_dict(), "run": asdict(run)}

    @torch.no_grad()
    def look_up(self, name: str, model: nn.Module) -> Outputs:
        """The teacher's outputs on every view, its maps averaged down to the task's grid in float16."""
        model.eval()
        count, found = len(self.views) * self.args.views, None
        for rows in torch.arange(count, device=self.device).split(512):
            image, view = rows // self.args.views, rows % self.args.views
            with self.autocast():
                images, _ = self.task.in_views(self.data.train, image, self.views[image, view])
                out = self.task.outputs(model, self.task.networks[name], images)
            maps = [down_to(as_map(stage).float(), self.task.grid).half() for stage in out.stages]
            batch = [out.logits, out.embedding.float(), *maps]
            found = found or [x.new_empty(count, *x.shape[1:]) for x in batch]  # gigabytes, that are not copied
            for whole, part in zip(found, batch, strict=True):
                whole[rows] = part
        logits, embedding, *stages = found
        return Outputs(logits, embedding, stages)

    def setup(self, name: str, student: nn.Module, teacher: nn.Module, teach: Teach, run: Run) -> Setup:
        with torch.no_grad():
            student.eval()
            images = next(iter(self.task.shown(self, self.data.train)))[:2]
            sample = self.task.outputs(student, self.task.networks[name], images)
        teacher_sample = teach(images, torch.arange(2, device=self.device))
        heads = student.get_classifier(), teacher.get_classifier()
        return Setup(sample, teacher_sample, *heads, run.kappa or 0.0, run.reduction)

    def distil(self, run: Run) -> list[float]:
        teacher_name, name = self.task.pairs[run.pair]
        teacher, _, teach = self.teacher(teacher_name)
        torch.manual_seed(run.seed)
        student = self.model(name)  # first, so that its weights are the same for every method
        added = nn.ModuleList()
        term = method_named(run.method).build(self.setup(name, student, teacher, teach, run), added)
        self.student = student  # the last one, for those who want to look at it
        return self.fit(name, student, run, term, added.to(self.device), teach)


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everyone() -> None:
    """Waits for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def write(what: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(f".{os.getpid()}.partial")  # a run that is stopped leaves no half of a file
    torch.save(what, partial_file)
    partial_file.replace(path)


def kept(path: Path, make: Callable[[], Any], device: torch.device) -> Any:
    """What is in the file; made and put there first if it is not. On a CPU the file stays on disk and is mapped."""
    missing = not path.exists()
    everyone()  # has looked, and then makes it together
    if missing:
        made = make()
        if rank_and_world()[0] == 0:
            write(made, path)
        everyone()
    return torch.load(path, map_location=device, weights_only=True, mmap=device.type == "cpu")


def precision(args: argparse.Namespace) -> str:
    return "float16" if args.float16 else "bfloat16" if args.bfloat16 else "float32"


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one call have in common."""
    return {
        "data": Path(args.data).resolve().name,
        "labelled": args.labelled,
        "teacher": args.teacher_name,
        "teacher_epochs": args.teacher_epochs,
        "processes": rank_and_world()[1],
        "precision": precision(args),
        "views": args.views,
    }


def planned(args: argparse.Namespace) -> list[Run]:
    runs = []
    for seed, pair, name in itertools.product(args.seeds, args.pairs, args.methods):
        method = method_named(name)
        weights = [w.apply(method.weight) for w in args.weights] if name != "none" else [0.0]
        kappas = args.kappas if method.kappa else [method.kappa]
        reductions = args.reductions if method.kappa is not None else [""]
        warmup = method.warmup if args.warmup is None else args.warmup
        for batch, weight, kappa, reduction in itertools.product(args.batches, weights, kappas, reductions):
            settings = {"weight": weight, "kappa": kappa, "reduction": reduction, "warmup": warmup}
            run = Run(pair=pair, method=name, seed=seed, epochs=args.epochs, batch=batch, **settings, **shared(args))
            runs.append(run)
    return runs


class Weight(NamedTuple):
    value: float
    relative: bool

    def apply(self, own: float) -> float:
        return own * self.value if self.relative else self.value


def weight(text: str) -> Weight:
    return Weight(float(text.removeprefix("x")), text.startswith("x"))


def source(text: str) -> str:
    """A folder with train/ and test/, one folder per class in each; "cifar100" or "cifar100-20" are downloaded."""
    return text if text in ("cifar100", "cifar100-20") else folders(text, "train", "test")


def folders(text: str, *parts: str) -> str:
    classes = [sorted(path.name for path in (Path(text) / part).glob("*/")) for part in parts]
    if not classes[0] or classes[0] != classes[1]:
        message = f"{text} has no {'/ and '.join(parts)}/ with a folder for each class, the same in both"
        raise argparse.ArgumentTypeError(message)
    return text


def device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used here: {str(error).splitlines()[0]}") from error
    return text


def teacher_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


def method_name(text: str) -> str:
    try:
        method_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse(argv: Sequence[str] | None, task: Task) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {task.module}", description=task.description)
    add = parser.add_argument
    add("--data", required=True, type=task.source, help=getattr(task.source, "func", task.source).__doc__)
    add("--pairs", choices=task.pairs, nargs="+", default=list(task.pairs), help="teacher_student (default: all)")
    add(
        "--methods",
        type=method_name,
        nargs="+",
        default=list(task.methods),
        metavar="METHOD",
        help="with settings of its own as in rsd_dense:side=4,dense=0.5; default: " + " ".join(task.methods),
    )
    add("--seeds", type=int, nargs="+", help="default: %(default)s")
    add("--epochs", type=int, help="of a student (default: %(default)s)")
    add("--batches", type=int, nargs="+", help="batch sizes (default: %(default)s)")
    add("--weights", type=weight, nargs="+", default=[Weight(1, True)], metavar="W", help="0.3, or x3: 3 times its own")
    add("--kappas", type=float, nargs="+", default=[0.01], help="default: 0.01")
    add("--reductions", choices=("sum", "mean"), nargs="+", default=["sum"], help="default: sum")
    add("--warmup", type=float, help="share of the run over which the weight grows (default: the method's own)")
    add("--teacher-epochs", type=int, help="default: %(default)s")
    add("--device", type=device, default="cpu", help="default: %(default)s")
    add("--threads", type=int, help="for torch (default: its own choice)")
    half = parser.add_mutually_exclusive_group()
    half.add_argument("--bfloat16", action="store_true", help="train under autocast")
    if not task.pretrained:
        add("--labelled", type=int, metavar="N", help="the student has every Nth image's label (default: 1)")
        add("--views", type=int, help="augmented views of each image (default: %(default)s)")
    else:
        half.add_argument("--float16", action="store_true", help="train under autocast, with a GradScaler")
        add("--compile", action="store_true", help="the student and its losses")
        add("--workers", type=int, default=8, help="processes that load images (default: %(default)s)")
        add("--teacher", type=teacher_file, metavar="FILE", help="weights of the teacher, taken as they are")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rsd-loss"
    add("--cache", type=Path, default=cache, help="for teachers and their outputs (default: %(default)s)")
    add("--csv", type=report.output, help="default: %(default)s")
    rest = {"seeds": [0, 1, 2], "labelled": 1, "views": 8, "float16": False, "compile": False, "teacher": None}
    parser.set_defaults(**rest | task.defaults)
    args = parser.parse_args(argv)
    least = {"seeds": 0, "epochs": 1, "batches": 2, "threads": 1, "labelled": 1}
    least |= {"teacher_epochs": 0, "workers": 1} if task.pretrained else {"teacher_epochs": 1, "views": 1}
    for name, low in least.items():
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [low if values is None else values]) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    try:
        args.done = finished(args.csv)
    except ValueError as error:
        parser.error(f"--csv: {error}")
    mixing = [pair for pair in args.pairs if task.networks[task.pairs[pair][1]].strong]
    for method in args.methods:
        name = method.partition(":")[0]
        if args.labelled > 1 and name in NEED_LABELS:
            parser.error(f"{method} needs the label of every image: leave it out or --labelled")
        if mixing and name in NEED_LABELS:
            parser.error(f"{method} needs one label an image, and {mixing[0]} mixes images: leave one of them out")
        if name in task.not_for:
            parser.error(f"{method} is for other networks than these pairs have: leave it out")
    args.teacher_name = ""
    if args.teacher:
        digest = hashlib.sha256(args.teacher.read_bytes()).hexdigest()
        args.teacher_name, args.teacher_epochs = f"{args.teacher.stem}-{digest[:8]}", 0
        if len(teachers := {task.pairs[pair][0] for pair in args.pairs}) > 1:
            parser.error(f"--teacher is of one teacher, and --pairs has {', '.join(sorted(teachers))}")
    given = sys.argv[1:] if argv is None else argv
    # As anybody could type it: where one machine keeps its images and its cache is of no use to another.
    words = [Path(word).name if Path(word).is_absolute() or Path(word).is_dir() else word for word in given]
    launcher = ["python", "-m"]
    if dist.is_torchelastic_launched():
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m"]
        if ":" in args.device:
            parser.error(f"--device {args.device} is one device: give cuda, of which each process takes its own")
    args.command = shlex.join([*launcher, task.module, *words])
    return args


def shown(run: Run) -> str:
    """What may be chosen by; the test images' where nothing is to be chosen."""
    return f"test {run.test:.1f} %" if math.isnan(run.validation) else f"validation {run.validation:.1f} %"


def main(argv: Sequence[str] | None = None, task: Task | None = None) -> None:
    task = task or CLASSIFICATION
    if dist.is_torchelastic_launched() and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before anything asks for "cuda"
    args = parse(argv, task)
    if dist.is_torchelastic_launched():
        own = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else None
        # A download, or the evaluation of the first process, may take long.
        dist.init_process_group("nccl" if own else "gloo", device_id=own, timeout=timedelta(hours=2))
    first = rank_and_world()[0] == 0
    done = args.done
    runs = [run for run in planned(args) if run.key not in done]
    console = Console(quiet=not first)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not first) as progress:
        bar = progress.add_task("all runs", total=len(runs))
        bench = Bench(task, args, progress) if runs else None
        for run in runs:
            teacher = bench.teacher(task.pairs[run.pair][0])[1]
            if teacher.key not in done:
                if first:
                    append(teacher, args.csv)
                done.add(teacher.key)
                console.print(f"{teacher.pair}: teacher {shown(teacher)}, {teacher.minutes:.1f} min")
            bench.distil(run)
            if first:
                append(run, args.csv)
            progress.advance(bar)
            what = f"{run.pair} {run.method} weight {run.weight:g} seed {run.seed}"
            console.print(f"{what}: {shown(run)}, {run.step_ms:.0f} ms a step, {run.minutes:.1f} min", soft_wrap=True)
    if dist.is_initialized():
        dist.destroy_process_group()


NEED_LABELS = ("dkd", "ofa", "sdd")
OF_MAPS = ("cwd", "cwd_rsd_dense")  # of logits, which segmentation has
CLASSIFICATION = Task(
    module="benchmarks.distill",
    source=source,
    description=__doc__.partition("\n\n")[2],
    networks=NETWORKS,
    pairs=PAIRS,
    taught_by=TAUGHT_BY,
    methods=("none", "kd", "dkd", "dist", "fitnet", "ofa", "rsd", "rsd_dense"),
    not_for=OF_MAPS,
    load=load,
    outputs=outputs,
    score=accuracy,
    defaults={"epochs": 20, "batches": [128], "teacher_epochs": 30, "csv": "benchmarks/results/distill.csv"},
)

if __name__ == "__main__":
    main()
