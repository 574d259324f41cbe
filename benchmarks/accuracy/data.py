"""Images in memory and their augmented views."""

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.accuracy.cache import rank_and_world
from benchmarks.accuracy.networks import Network
from benchmarks.accuracy.runs import Run

PAD, UNLABELLED = 4, -100


class Split(NamedTuple):
    images: Tensor  # (N, 3, H, W) bytes
    labels: Tensor  # (N,), or (N, H, W) for pixels; UNLABELLED where there is none


class Images:
    """A training split with a fixed set of augmented views, and what to choose by and to test on."""

    def __init__(self, train: Split, validation: Split, test: Split, classes: int, views: int) -> None:
        self.train, self.validation, self.test, self.classes = train, validation, test, classes
        shape = (len(train.labels), views)
        self.views = draw_views(shape, torch.Generator().manual_seed(0)).to(train.labels.device)
        self.fingerprint = fingerprint(train.images, train.labels)  # names what is computed from these images

    def epoch(
        self, run: Run, network: Network, draw: torch.Generator, fixed: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields places in the cache of the teacher's outputs, images and labels; in fixed views or in fresh ones."""
        device, (rank, world) = self.train.labels.device, rank_and_world()
        order = torch.randperm(len(self.train.labels), generator=draw)[rank::world]
        for step in range(max(1, len(order) // run.batch)):
            rows = order[step * run.batch : (step + 1) * run.batch].to(device)
            if fixed:
                count = self.views.shape[1]
                which = torch.randint(count, (len(rows),), generator=draw).to(device)
                at, chosen = rows * count + which, self.views[rows, which]
            else:
                at, chosen = rows, draw_views((len(rows),), draw).to(device)
            images, labels = in_views(self.train, rows, chosen)
            labels[rows % run.labelled != 0] = UNLABELLED
            yield at, images, labels

    def shown(self, split: Split) -> Iterator[Tensor]:
        """A split's images in order, as networks take them."""
        return (normalise(images) for images in split.images.split(100))


def draw_views(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """(..., 3): the row and the column of a crop, and whether it is flipped."""
    limits = torch.tensor([2 * PAD + 1, 2 * PAD + 1, 2])
    return (torch.rand(*shape, 3, generator=generator) * limits).long()


def in_views(split: Split, rows: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    labels = split.labels[rows]
    if labels.ndim > 1:  # labels of pixels move with the pixels
        labels = shift(labels[:, None], views, UNLABELLED)[:, 0].contiguous()
    return normalise(shift(split.images[rows], views)), labels


def shift(images: Tensor, views: Tensor, fill: int = 0) -> Tensor:
    """Pads, crops and flips each image (N, C, H, W) by its view."""
    height, width = images.shape[2:]
    padded = F.pad(images, (PAD,) * 4, value=fill)
    steps = torch.arange(width, device=images.device)
    rows = views[:, :1] + torch.arange(height, device=images.device)
    columns = views[:, 1:2] + torch.where(views[:, 2:] == 1, steps.flip(0), steps)
    first = torch.arange(len(images), device=images.device)[:, None, None]
    # Indexing with a slice between the tensors puts channels last, the memory format that convolutions like best.
    return padded[first, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    return (images.float() - 120) / 64  # near the mean and the standard deviation of most photographs


def fingerprint(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in tensors)).hexdigest()[:12]


def stacked(pixels: list[np.ndarray[Any, Any]]) -> Tensor:
    """(N, 3, H, W) from images (H, W, 3)."""
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def first_classes(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Images and labels from a file of CIFAR-100, by class and then by name, as a folder of images has them."""
    with path.open("rb") as file:
        raw = pickle.load(file, encoding="latin1")
    labels = torch.tensor(raw["fine_labels"])
    wanted = [i for i in range(len(labels)) if labels[i] < classes]
    wanted.sort(key=lambda i: (int(labels[i]), raw["filenames"][i]))
    return torch.from_numpy(raw["data"][wanted]).view(-1, 3, 32, 32), labels[wanted]
