"""A convolutional teacher, a transformer student and five labels per class, on scikit-learn's handwritten digits.

The teacher is trained with the labels of all 1000 training images. The student gets five labels per class for its
cross-entropy. RSD needs no labels, so the student also learns from the teacher's embeddings of all training images:

    loss = cross_entropy(logits, labels) + 25 * criterion(projector(student_embedding), teacher_embedding)

Two more students have the same labels, initial weights, batches and hyperparameters. One learns alone. The other has a
teacher that was never trained: it shows how much of the gain comes from the unlabelled images alone. Learning rate and
weight decay are those with which the student alone does best on the validation images.

Run it with ``python docs/examples/digits.py``; it takes about two minutes on two CPU cores. ``--width 768`` takes a
wide teacher, and ``--width 768 --kappa 0.01`` shows what the paper's kappa costs with one.
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
from rsd_loss.diagnostics import summary
from rsd_loss.features import pool

LABELS_PER_CLASS = 5
RSD_WEIGHT = 25
BATCH_SIZE = 125
SHIFTS = 9
TEACHER, ALONE, UNTRAINED, RSD = (
    "teacher, all labels",
    "student alone",
    "student + RSD, untrained teacher",
    "student + RSD",
)


class Split(NamedTuple):
    images: Tensor
    labels: Tensor


class ConvTeacher(nn.Module):
    """Three convolutions; (B, 1, 8, 8) images to (B, width) embeddings and (B, 10) logits."""

    width = 64

    def __init__(self, width: int = width) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, stride in ((1, 32, 1), (32, 64, 2), (64, width, 2)):
            layers += [nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

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
    train, validation, test = (Split(images[rows], labels[rows]) for rows in (train, validation, test))
    return train, validation, test


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


def new_student(seed: int, teacher_width: int) -> tuple[ViTStudent, DecouplingProjector]:
    torch.manual_seed(seed)
    return ViTStudent(), DecouplingProjector(ViTStudent.width, teacher_width)


def trained_student(
    targets: Tensor | None, kappa: float, epochs: int, seed: int
) -> tuple[ViTStudent, DecouplingProjector]:
    """The work of one process; ``targets`` has a teacher's embeddings of all shifts, None to learn alone."""
    torch.set_num_threads(1)
    (_, labels), shifted = load_splits()[0], all_shifts(load_splits()[0].images)
    student, projector = new_student(seed, ConvTeacher.width if targets is None else targets.shape[-1])
    criterion = RSDLoss(kappa=kappa, reduction="mean")
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
    return student.eval(), projector.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """In percent."""
    return 100 * (model(split.images)[1].argmax(1) == split.labels).float().mean().item()


def plot(embeddings: dict[str, Tensor], target: Tensor, labels: Tensor, output: Path) -> None:
    """The correlation of projected students with their teacher, whose features are sorted by their favourite digit."""
    standardised = (target - target.mean(0)) / (target.std(0) + 1e-5)
    order = torch.stack([standardised[labels == digit].mean(0) for digit in range(10)]).argmax(0).argsort(stable=True)
    # A Figure of its own rather than pyplot: it draws without a display, and leaves the caller's backend alone.
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (title, embedding) in zip(panels, embeddings.items(), strict=True):
        matrix = cross_correlation(embedding, target)[order][:, order]
        image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set(title=title, xlabel="projected student feature", ylabel="teacher feature")
    figure.colorbar(image, ax=panels, label="correlation over the validation images", shrink=0.85)
    figure.savefig(output, dpi=150)


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Runs the comparison and returns the test accuracies in percent: the teacher's, then each arm's, one per seed."""
    parser = argparse.ArgumentParser(description="Redundancy suppression distillation on handwritten digits.")
    parser.add_argument("--seeds", type=int, default=3, help="students per arm")
    parser.add_argument("--epochs", type=int, default=60, help="of teacher and students alike")
    parser.add_argument("--width", type=int, default=ConvTeacher.width, help="features of the teacher")
    parser.add_argument("--kappa", type=float, default=0.0, help="weight of the decorrelation")
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="where the picture goes")
    options = parser.parse_args(argv)
    start = time.perf_counter()

    train, validation, test = load_splits()
    shifted = all_shifts(train.images)
    torch.manual_seed(0)
    teacher, untrained = ConvTeacher(options.width), ConvTeacher(options.width).eval()
    train_teacher(teacher, shifted, train.labels, options.epochs)
    # A frozen teacher and nine shifts: its embeddings can be computed once and looked up.
    with torch.no_grad():
        known, unknown = (model(shifted.flatten(0, 1))[0].unflatten(0, (-1, SHIFTS)) for model in (teacher, untrained))

    arms = {ALONE: None, UNTRAINED: unknown, RSD: known}
    runs = list(itertools.product(arms, range(options.seeds)))
    # A student is too small for a second thread, so every core trains a student of its own.
    jobs = (delayed(trained_student)(arms[name], options.kappa, options.epochs, seed) for name, seed in runs)
    students = Parallel(n_jobs=-1, return_as="generator")(jobs)
    trained = list(tqdm(students, desc="students", total=len(runs)))
    tests = {TEACHER: [accuracy(teacher, test)]}
    for (name, _), (student, _) in zip(runs, trained, strict=True):
        tests.setdefault(name, []).append(accuracy(student, test))
    print(f"\n{'test accuracy, %':<34}mean ± std, {options.seeds} seeds")
    for name, values in tests.items():
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{name:<34}{statistics.mean(values):.1f}{spread}")

    with torch.no_grad():
        target = teacher(validation.images)[0]
        new = [module.eval() for module in new_student(options.seeds - 1, options.width)]
        embeddings = {
            title: projector(student(validation.images)[0])
            for title, (student, projector) in (("new student", new), ("trained student", trained[-1]))
        }
    plot(embeddings, target, validation.labels, options.output)
    print(f"\n{'projected embedding':<24}{'diagonal':>9}{'off-diagonal':>14}{'rank':>7}{'CKA':>7}")
    for title, embedding in (embeddings | {"the teacher with itself": target}).items():
        diagonal, off_diagonal, rank, cka = summary(embedding, target)[:4]
        print(f"{title:<24}{diagonal:>9.2f}{off_diagonal:>14.2f}{rank:>7.1f}{cka:>7.2f}")
    redundancy = (options.width - 1) * summary(target, target).off_diagonal_rms ** 2
    print(f"The teacher's redundancy R is {redundancy:.1f}, and kappa R is {options.kappa * redundancy:.2f}.")
    print(f"{options.output} written; {time.perf_counter() - start:.0f} s in all")
    return tests


if __name__ == "__main__":
    # Models this small gain a tenth from a second thread, and lose many times that where other programs run.
    torch.set_num_threads(1)
    main()
