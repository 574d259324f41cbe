"""A convolutional teacher, a transformer student and five labels per class, on scikit-learn's handwritten digits.

A setting in which a teacher has something to give. The teacher is trained with the labels of all 1000 training images.
The student gets the labels of five images per class, for its cross-entropy; RSD needs no labels, so the student learns
from the teacher's embedding of every training image besides:

    loss = cross_entropy(logits, labels) + 0.1 * criterion(projector(student_embedding), teacher_embedding)

It is compared with two students that have the same labels, initial weights, batches, augmentation, optimizer steps and
hyperparameters: one learns alone, the other from a teacher that was never trained, which shows how much of the gain
comes from the unlabelled images and how much from what the teacher knows. Learning rate and weight decay are those with
which the student alone does best on the validation images; nothing was chosen on the test images.

Run it with ``python docs/examples/digits.py``; it takes about a minute on one CPU core, less on several.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from rsd_loss import DecouplingProjector, RSDLoss, cross_correlation
from rsd_loss.features import pool

LABELS_PER_CLASS = 5
RSD_WEIGHT = 0.1
BATCH_SIZE = 125
SHIFTS = 9
ALONE, UNTRAINED, RSD = "student alone", "student + RSD, untrained teacher", "student + RSD"


class Split(NamedTuple):
    images: Tensor
    labels: Tensor


class ConvTeacher(nn.Module):
    """Three convolutions; (B, 1, 8, 8) images to (B, 64) embeddings and (B, 10) logits."""

    width = 64

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, stride in ((1, 32, 1), (32, 64, 2), (64, self.width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.width, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = pool(self.body(images))
        return embedding, self.head(embedding)


class ViTStudent(nn.Module):
    """Attention between four patches; (B, 1, 8, 8) images to (B, 48) embeddings and (B, 10) logits."""

    width = 48

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, self.width, kernel_size=4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(4, self.width))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.Sequential(
            *(nn.TransformerEncoderLayer(self.width, 4, 2 * self.width, **options) for _ in range(2))
        )
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.position
        embedding = pool(self.norm(self.blocks(tokens)))
        return embedding, self.head(embedding)


def load_splits() -> tuple[Split, Split, Split]:
    """Train (1000 images), validation (297) and test (500): stratified, and the same in every run."""
    pixels, digits = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(digits)), test_size=500, stratify=digits, random_state=0)
    train, validation = train_test_split(rest, train_size=1000, stratify=digits[rest], random_state=0)
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    return (
        Split(images[train], labels[train]),
        Split(images[validation], labels[validation]),
        Split(images[test], labels[test]),
    )


def all_shifts(images: Tensor) -> Tensor:
    """(N, 1, 8, 8) to (N, 9, 1, 8, 8): every image moved by up to one pixel each way. This is the augmentation."""
    padded = F.pad(images, (1, 1, 1, 1), value=images.min().item())
    return torch.stack([padded[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3)], dim=1)


class Optimizer:
    """AdamW with a cosine schedule, ``epochs`` passes over the training images long."""

    def __init__(
        self, parameters: list[nn.Parameter], lr: float, weight_decay: float, epochs: int, images: int
    ) -> None:
        self.adamw = torch.optim.AdamW(parameters, lr, weight_decay=weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.adamw, epochs * images // BATCH_SIZE)

    def step(self, loss: Tensor) -> None:
        self.adamw.zero_grad()
        loss.backward()
        self.adamw.step()
        self.schedule.step()


def train_teacher(teacher: ConvTeacher, shifted: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = Optimizer(list(teacher.parameters()), 3e-3, 0.05, epochs, len(labels))
    for _ in tqdm(range(epochs), desc="teacher", unit="epoch"):
        for batch in torch.randperm(len(labels)).split(BATCH_SIZE):
            _, logits = teacher(shifted[batch, torch.randint(SHIFTS, batch.shape)])
            optimizer.step(F.cross_entropy(logits, labels[batch], label_smoothing=0.1))
    teacher.eval()


def new_student(seed: int) -> tuple[ViTStudent, DecouplingProjector]:
    torch.manual_seed(seed)
    return ViTStudent(), DecouplingProjector(ViTStudent.width, ConvTeacher.width)


def train_student(
    student: ViTStudent,
    projector: DecouplingProjector,
    targets: Tensor | None,
    shifted: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int,
) -> None:
    """Trains in place; ``targets`` holds a teacher's (N, 9, 64) embeddings of ``shifted``, None to learn alone."""
    criterion = RSDLoss(kappa=0.01)
    # The projector learns too, so the optimizer needs its parameters. A student alone leaves them without a gradient.
    optimizer = Optimizer([*student.parameters(), *projector.parameters()], 8e-3, 1.0, epochs, len(labels))
    # A generator of its own, read alike in every arm: equal seeds mean equal labels, batches and augmentation.
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=draw)
    few = torch.cat([order[labels[order] == digit][:LABELS_PER_CLASS] for digit in range(10)])
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=draw).split(BATCH_SIZE):
            few_shift = torch.randint(SHIFTS, few.shape, generator=draw)
            shift = torch.randint(SHIFTS, batch.shape, generator=draw)
            images = shifted[few, few_shift]
            if targets is None:
                _, logits = student(images)
                loss = F.cross_entropy(logits, labels[few])
            else:
                embedding, logits = student(torch.cat([images, shifted[batch, shift]]))
                loss = F.cross_entropy(logits[: len(few)], labels[few])
                loss = loss + RSD_WEIGHT * criterion(projector(embedding[len(few) :]), targets[batch, shift])
            optimizer.step(loss)
    student.eval()
    projector.eval()


def trained_student(targets: Tensor | None, epochs: int, seed: int) -> tuple[ViTStudent, DecouplingProjector]:
    """The work of one process. It needs no more than its seed, so the order of the students changes nothing."""
    torch.set_num_threads(1)
    train, _, _ = load_splits()
    student, projector = new_student(seed)
    train_student(student, projector, targets, all_shifts(train.images), train.labels, epochs, seed)
    return student, projector


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """In percent."""
    return 100 * (model(split.images)[1].argmax(1) == split.labels).float().mean().item()


@torch.no_grad()
def correlation(student: ViTStudent, projector: DecouplingProjector, teacher: ConvTeacher, split: Split) -> Tensor:
    """(64, 64) matrix, teacher's features by the projected student's, sorted by the digit they respond to most."""
    target = teacher(split.images)[0]
    standardised = (target - target.mean(0)) / target.std(0)
    favourite = torch.stack([standardised[split.labels == digit].mean(0) for digit in range(10)]).argmax(0)
    order = favourite.argsort(stable=True)
    matrix = cross_correlation(projector.eval()(student.eval()(split.images)[0]), target)
    return matrix[order][:, order]


def plot(before: Tensor, after: Tensor, tests: dict[str, list[float]], teacher: float, output: Path) -> None:
    # A Figure of its own rather than pyplot: it draws without a display, and leaves the caller's backend alone.
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    *maps, dots = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    off_diagonal = ~torch.eye(len(before), dtype=torch.bool)
    for axes, matrix, when in zip(maps, (before, after), ("before", "after"), strict=True):
        image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        rest = matrix[off_diagonal].square().mean().sqrt()
        axes.set_title(f"{when} training\ndiagonal {matrix.diagonal().mean():.2f}, off-diagonal rms {rest:.2f}")
        axes.set(xlabel="projected student feature", ylabel="teacher feature")
    figure.colorbar(image, ax=maps, label="correlation over the validation images", shrink=0.85)
    for runs in zip(*tests.values(), strict=True):
        dots.plot(runs, range(3), "o-", color="0.3", alpha=0.6)
    dots.axvline(teacher, color="firebrick", linestyle="--", label="teacher")
    dots.set(yticks=range(3), yticklabels=list(tests), xlabel="test accuracy (%)", title="one line per seed")
    figure.savefig(output, dpi=150)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):5.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:3.1f}"


def parameter_count(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Runs the comparison and returns the test accuracies in percent: the teacher's, then each arm's, one per seed."""
    parser = argparse.ArgumentParser(description="Redundancy suppression distillation on handwritten digits.")
    parser.add_argument("--seeds", type=int, default=3, help="students per arm")
    parser.add_argument("--epochs", type=int, default=60, help="of teacher and students alike")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="where the picture goes")
    options = parser.parse_args(argv)
    start = time.perf_counter()

    train, validation, test = load_splits()
    shifted = all_shifts(train.images)
    torch.manual_seed(0)
    teacher, untrained = ConvTeacher(), ConvTeacher().eval()
    train_teacher(teacher, shifted, train.labels, options.epochs)
    # A frozen teacher and nine shifts: its embeddings can be computed once and looked up.
    with torch.no_grad():
        known, unknown = (model(shifted.flatten(0, 1))[0].unflatten(0, (-1, SHIFTS)) for model in (teacher, untrained))

    arms = {ALONE: None, UNTRAINED: unknown, RSD: known}
    runs = list(itertools.product(arms, range(options.seeds)))
    # A student is too small for a second thread, so every core trains a student of its own.
    students = Parallel(n_jobs=-1, return_as="generator")(
        delayed(trained_student)(arms[name], options.epochs, seed) for name, seed in runs
    )
    trained = list(tqdm(students, desc="students", total=len(runs)))
    validations: dict[str, list[float]] = {"teacher": [accuracy(teacher, validation)]}
    tests = {"teacher": [accuracy(teacher, test)]}
    for (name, _), (student, _) in zip(runs, trained, strict=True):
        validations.setdefault(name, []).append(accuracy(student, validation))
        tests.setdefault(name, []).append(accuracy(student, test))

    student, projector = trained[-1]
    before = correlation(*new_student(options.seeds - 1), teacher, validation)
    after = correlation(student, projector, teacher, validation)
    plot(before, after, {name: tests[name] for name in arms}, tests["teacher"][0], options.output)

    print(f"\nThe teacher saw all {len(train.labels)} training labels, a student {LABELS_PER_CLASS} per class.")
    print("RSD distils all training images and no further labels.\n")
    print(f"{'accuracy (%), mean ± std over seeds':<40}{'validation':>14}{'test':>14}")
    for name in tests:
        print(f"{name:<40}{spread(validations[name]):>14}{spread(tests[name]):>14}")
    print(f"teacher {parameter_count(teacher)} parameters, student {parameter_count(student)}")
    print(f"projector {parameter_count(projector)}, used in training only and gone afterwards")
    print(f"{options.output} written; {time.perf_counter() - start:.0f} s in all")
    return tests


if __name__ == "__main__":
    # Models this small gain a tenth from a second thread, and lose many times that where other programs run.
    torch.set_num_threads(1)
    main()
