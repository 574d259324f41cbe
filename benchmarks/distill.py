"""Does it distil: `python -m benchmarks.distill --data DIR`.

Trains a student of one family under a teacher of another, once for every pair, method and seed asked for, and appends
one row per finished run to a CSV. A run that is in the file already is not repeated.

A tenth of the training images is held out for validation, the same tenth in every run: choose by val_accuracy. The
test images are looked at once, when a run is over. Every training image has a fixed set of augmented views, for which
a teacher's outputs are computed once and kept. Within a seed all methods start from the same weights and see the same
images in the same order.
"""

import argparse
import csv
import hashlib
import itertools
import math
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
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

from benchmarks.methods import METHODS, Outputs, Setup, Term, as_map, method_named
from benchmarks.throughput import commit, describe

SIDE, PAD = 32, 4
CACHED_SIDE = 8  # of the teacher's maps in the cache, where they are larger


class Network(NamedTuple):
    """A timm model for 32 x 32 images, small enough for a CPU, and how it is trained (at a batch of 128)."""

    build: Callable[[int], nn.Module]
    blocks: tuple[int, ...]  # where its four stages end, as forward_intermediates counts
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    weight_decay: float


def resnet(classes: int, width: int, depth: int) -> ResNet:
    channels = (width, 2 * width, 4 * width, 8 * width)
    # The stem's width follows from "deep"; a single 3 x 3 convolution without pooling takes its place.
    model = ResNet(BasicBlock, (depth,) * 4, classes, channels=channels, stem_type="deep", stem_width=width // 2)
    model.conv1, model.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
    return model


def vit(classes: int, width: int, heads: int, depth: int = 6, patch: int = 4) -> VisionTransformer:
    shape = {"img_size": SIDE, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
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
}
# On ten thousand images a transformer surpasses no small CNN by itself. So it is trained as DeiT was, under a CNN.
TAUGHT_BY = {"vit": "resnet"}


def outputs(model: nn.Module, network: Network, images: Tensor) -> Outputs:
    layout = "NCHW" if isinstance(model, ResNet) else "NLC"
    last, stages = model.forward_intermediates(images, indices=network.blocks, output_fmt=layout)
    embedding = model.forward_head(last, pre_logits=True)
    return Outputs(model.get_classifier()(embedding).float(), embedding, stages)


class Split(NamedTuple):
    images: Tensor  # (N, 3, 32, 32) bytes
    labels: Tensor


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split
    classes: int
    fingerprint: str  # names what is computed from these images


def load(source: str, cache: Path, device: torch.device) -> Data:
    """From a folder with train/ and test/, one folder per class in each; or "cifar100", which is downloaded."""
    if source == "cifar100":
        sets = [torchvision.datasets.CIFAR100(str(cache), train, download=True) for train in (True, False)]
    else:
        sets = [torchvision.datasets.ImageFolder(str(Path(source) / part)) for part in ("train", "test")]
        if sets[0].classes != sets[1].classes:
            raise SystemExit(f"{source}: train/ and test/ hold different classes")
    splits = []
    for images in sets:
        pixels = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)) for image, _ in images]
        splits.append((torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor(images.targets)))
    (images, labels), test = splits
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    parts = [
        Split(*(x.contiguous().to(device) for x in pair))
        for pair in ((images[rest], labels[rest]), (images[held_out], labels[held_out]), test)
    ]
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:12]
    return Data(*parts, len(sets[0].classes), digest)


def crop(images: Tensor, views: Tensor) -> Tensor:
    """Pads, crops and mirrors each image by its view (row, column, mirror or not); to float, about standardised."""
    padded = F.pad(images, (PAD,) * 4)
    steps = torch.arange(SIDE, device=images.device)
    rows = views[:, :1] + steps
    columns = views[:, 1:2] + torch.where(views[:, 2:] == 1, steps.flip(0), steps)
    first = torch.arange(len(images), device=images.device)[:, None, None]
    # With the channels between, indexing puts them last, which is the memory format that convolutions like best.
    return normalise(padded[first, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))


def normalise(images: Tensor) -> Tensor:
    return (images.float() - 120) / 64  # near enough to the mean and deviation of any photographs


def draw_views(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    limits = torch.tensor([2 * PAD + 1, 2 * PAD + 1, 2])
    return (torch.rand(*shape, 3, generator=generator) * limits).long()


def take(targets: Outputs, rows: Tensor) -> Outputs:
    return Outputs(targets.logits[rows], targets.embedding[rows], [stage[rows] for stage in targets.stages])


@dataclass
class Run:
    """One line of the CSV; the fields up to warmup say which run it is."""

    data: str
    pair: str
    method: str
    seed: int
    teacher_epochs: int
    epochs: int
    batch: int
    precision: str
    views: int
    weight: float
    kappa: float | None
    reduction: str
    warmup: float
    val_accuracy: float = 0.0  # in percent
    test_accuracy: float = 0.0
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
            raise SystemExit(f"{path} has other columns than this version writes: name another file with --csv")
        return {tuple(line[name] for name in KEY) for line in reader}


def cosine(steps: int) -> Callable[[int], float]:
    """Factors of the learning rate: up over the first twentieth, then down half a cosine."""
    up = max(1, steps // 20)
    return lambda i: min((i + 1) / up, 0.5 * (1 + math.cos(math.pi * max(0, i - up) / max(1, steps - up))))


class Bench:
    """The data, the device and the cache that all runs share."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress, self.device = args, progress, torch.device(args.device)
        self.data = load(args.data, args.cache, self.device)
        count = len(self.data.train.labels)
        self.teachers: dict[str, tuple[nn.Module, Outputs, Run]] = {}
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
        return NETWORKS[name].build(self.data.classes).to(self.device, memory_format=torch.channels_last)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bfloat16)

    def fit(
        self,
        name: str,
        model: nn.Module,
        run: Run,
        term: Term | None = None,
        added: nn.ModuleList | None = None,
        targets: Outputs | None = None,
    ) -> None:
        """Trains in place and fills in the row; the test images are seen here and nowhere else."""
        network, (images, labels) = NETWORKS[name], self.data.train
        steps = max(1, len(labels) // run.batch)
        parameters = [*model.parameters(), *(added.parameters() if added else ())]
        optimizer = network.optimizer(parameters, lr=network.lr * run.batch / 128, weight_decay=network.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(run.epochs * steps))
        draw = torch.Generator().manual_seed(run.seed)
        task = self.progress.add_task(f"{run.pair} {run.method} seed {run.seed}", total=run.epochs * steps)
        times, start = [], time.perf_counter()
        model.train()
        for epoch, step in itertools.product(range(run.epochs), range(steps)):
            if step == 0:
                order = torch.randperm(len(labels), generator=draw)
            before = time.perf_counter()
            rows = order[step * run.batch : (step + 1) * run.batch].to(self.device)
            if targets is None:
                views = draw_views((len(rows),), draw).to(self.device)
            else:
                which = torch.randint(self.args.views, (len(rows),), generator=draw).to(self.device)
                views = self.views[rows, which]
            y = labels[rows]
            with self.autocast():
                student = outputs(model, network, crop(images[rows], views))
                loss = F.cross_entropy(student.logits, y)
                if term and targets:
                    grown = min(1.0, (epoch * steps + step + 1) / max(1, run.warmup * run.epochs * steps))
                    teacher = take(targets, rows * self.args.views + which)
                    loss = loss + run.weight * grown * term(student, teacher, y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            schedule.step()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
            self.progress.advance(task)
        self.progress.remove_task(task)
        run.step_ms, run.minutes = statistics.median(times) * 1e3, (time.perf_counter() - start) / 60
        run.added_parameters = sum(parameter.numel() for parameter in added.parameters()) if added else 0
        run.val_accuracy, run.test_accuracy = (self.accuracy(model, x) for x in (self.data.validation, self.data.test))
        vars(run).update(self.origin)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: Split) -> float:
        model.eval()
        right = [
            (model(normalise(x)).argmax(1) == y).sum() for x, y in zip(*(s.split(500) for s in split), strict=True)
        ]
        return 100 * sum(int(count) for count in right) / len(split.labels)

    def teacher(self, name: str) -> tuple[nn.Module, Outputs, Run]:
        """The trained network, what it makes of the training views, and its own row; from the cache if it is there."""
        if name not in self.teachers:
            args = self.args
            stem = f"{name}-{self.data.fingerprint}-{args.teacher_epochs}-{precision(args)}-{args.views}"
            saved = kept(args.cache / f"{stem}.pt", lambda: self.train_teacher(name), self.device)
            model = self.model(name).eval()
            model.load_state_dict(saved["model"])
            targets = kept(args.cache / f"{stem}-outputs.pt", lambda: tuple(self.look_up(name, model)), self.device)
            self.teachers[name] = model, Outputs(*targets), Run(**saved["run"])
        return self.teachers[name]

    def train_teacher(self, name: str) -> dict[str, Any]:
        args, method = self.args, METHODS["kd" if name in TAUGHT_BY else "none"]
        batch = min(128, len(self.data.train.labels))
        settings = {"epochs": args.teacher_epochs, "batch": batch, "weight": method.weight, "kappa": None}
        run = Run(pair=name, method="teacher", seed=0, reduction="", warmup=0.0, **settings, **shared(args))
        torch.manual_seed(0)
        model = self.model(name)
        if name in TAUGHT_BY:
            above, targets, _ = self.teacher(TAUGHT_BY[name])
            term = method.build(self.setup(name, model, above, targets, run), nn.ModuleList())
            self.fit(name, model, run, term, targets=targets)
        else:
            self.fit(name, model, run)
        return {"model": model.state_dict(), "run": asdict(run)}

    @torch.no_grad()
    def look_up(self, name: str, model: nn.Module) -> Outputs:
        """The teacher's outputs on every view, its maps averaged down to 8 x 8 in float16."""
        model.eval()
        count, found = len(self.views) * self.args.views, None
        for rows in torch.arange(count, device=self.device).split(512):
            image, view = rows // self.args.views, rows % self.args.views
            with self.autocast():
                out = outputs(model, NETWORKS[name], crop(self.data.train.images[image], self.views[image, view]))
            maps = [as_map(stage).float() for stage in out.stages]
            maps = [F.adaptive_avg_pool2d(x, min(CACHED_SIDE, x.shape[2])).half() for x in maps]
            batch = [out.logits, out.embedding.float(), *maps]
            found = found or [x.new_empty(count, *x.shape[1:]) for x in batch]  # gigabytes, that are not copied
            for whole, part in zip(found, batch, strict=True):
                whole[rows] = part
        logits, embedding, *stages = found
        return Outputs(logits, embedding, stages)

    def setup(self, name: str, student: nn.Module, teacher: nn.Module, targets: Outputs, run: Run) -> Setup:
        with torch.no_grad():
            student.eval()
            sample = outputs(student, NETWORKS[name], normalise(self.data.train.images[:2]))
        teacher_sample = take(targets, torch.arange(2, device=self.device))
        heads = student.get_classifier(), teacher.get_classifier()
        return Setup(sample, teacher_sample, *heads, run.kappa or 0.0, run.reduction)

    def distil(self, run: Run) -> None:
        teacher_name, name = PAIRS[run.pair]
        teacher, targets, _ = self.teacher(teacher_name)
        torch.manual_seed(run.seed)
        student = self.model(name)  # first, so that its weights are the same for every method
        added = nn.ModuleList()
        term = method_named(run.method).build(self.setup(name, student, teacher, targets, run), added)
        self.fit(name, student, run, term, added.to(self.device), targets)


def kept(path: Path, make: Callable[[], Any], device: torch.device) -> Any:
    """What is in the file; made and put there first if it is not. On a CPU the file stays on disk and is mapped."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # a run that is stopped leaves no half of a file
        torch.save(make(), partial)
        partial.replace(path)
    return torch.load(path, map_location=device, weights_only=True, mmap=device.type == "cpu")


def precision(args: argparse.Namespace) -> str:
    return "bfloat16" if args.bfloat16 else "float32"


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What all runs of one call have in common."""
    return {
        "data": Path(args.data).name,
        "teacher_epochs": args.teacher_epochs,
        "precision": precision(args),
        "views": args.views,
    }


def planned(args: argparse.Namespace) -> list[Run]:
    runs = []
    for seed, pair, name in itertools.product(args.seeds, args.pairs, args.methods or METHODS):
        if not args.methods and name == "sdd" and pair != "cnn_cnn":
            continue
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


def method_name(text: str) -> str:
    try:
        method_named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distill", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("--data", required=True, help='a folder with train/ and test/, or "cifar100", which is downloaded')
    add("--pairs", choices=PAIRS, nargs="+", default=list(PAIRS), help="teacher_student (default: all)")
    add(
        "--methods",
        type=method_name,
        nargs="+",
        metavar="METHOD",
        help=f"default: all, and sdd where both networks are convolutional; {', '.join(METHODS)}; with settings as in rsd_dense:side=4,kappa=0.0",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--epochs", type=int, default=20, help="of a student (default: %(default)s)")
    add("--batches", type=int, nargs="+", default=[128], help="batch sizes (default: 128)")
    add("--weights", type=weight, nargs="+", default=[Weight(1, True)], metavar="W", help="0.3, or x3: 3 times its own")
    add("--kappas", type=float, nargs="+", default=[0.01], help="default: 0.01")
    add("--reductions", choices=("sum", "mean"), nargs="+", default=["sum"], help="default: sum")
    add("--warmup", type=float, help="share of the run over which the weight grows (default: the method's own)")
    add("--teacher-epochs", type=int, default=30, help="default: %(default)s")
    add("--views", type=int, default=8, help="augmented views of each image (default: %(default)s)")
    add("--device", default="cpu", help="default: %(default)s")
    add("--threads", type=int, help="for torch (default: its own choice)")
    add("--bfloat16", action="store_true", help="train under autocast")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rsd-loss"
    add("--cache", type=Path, default=cache, help="for teachers and their outputs (default: %(default)s)")
    add("--csv", type=Path, default=Path("benchmarks/results/distill.csv"), help="default: %(default)s")
    args = parser.parse_args(argv)
    given = sys.argv[1:] if argv is None else argv
    # As anybody could type it: where one machine keeps its images and its cache is of no use to another.
    words = [Path(word).name if Path(word).is_absolute() or Path(word).is_dir() else word for word in given]
    args.command = shlex.join(["python", "-m", "benchmarks.distill", *words])
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    done = finished(args.csv)
    runs = [run for run in planned(args) if run.key not in done]
    console = Console()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("all runs", total=len(runs))
        bench = Bench(args, progress) if runs else None
        for run in runs:
            teacher = bench.teacher(PAIRS[run.pair][0])[2]
            if teacher.key not in done:
                append(teacher, args.csv)
                done.add(teacher.key)
                console.print(f"{teacher.pair}: teacher {teacher.val_accuracy:.1f} %, {teacher.minutes:.1f} min")
            bench.distil(run)
            append(run, args.csv)
            progress.advance(task)
            what = f"{run.pair} {run.method} weight {run.weight:g} seed {run.seed}"
            console.print(
                f"{what}: validation {run.val_accuracy:.1f} %, {run.step_ms:.0f} ms a step, {run.minutes:.1f} min"
            )


if __name__ == "__main__":
    main()
