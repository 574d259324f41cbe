"""Road scenes: semantic segmentation of CamVid's eleven classes.

Scores are the mean IoU in percent, over all pixels of a split. Choose by `validation`. The test scenes are looked at
once, when a run is over. Everything else is as in classification.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from benchmarks.accuracy.data import UNLABELLED, Images, Split, stacked
from benchmarks.accuracy.networks import Network, Outputs, resnet
from benchmarks.accuracy.networks import vit as plain_vit
from rsd_loss.features import pool

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
SIZE = (96, 128)
PARTS = ("train", "val", "test")


class Pyramid(nn.Module):
    """Logits at half the resolution, from the sum of all stages of a convolutional network."""

    def __init__(self, widths: list[int], classes: int, width: int = 48) -> None:
        super().__init__()
        self.sides = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths)
        self.norm, self.head = nn.BatchNorm2d(width), nn.Conv2d(width, classes, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        size = stages[0].shape[2:]
        sides = [F.interpolate(side(x), size, mode="bilinear") for side, x in zip(self.sides, stages, strict=True)]
        return self.head(F.relu(self.norm(torch.stack(sides).sum(dim=0))))


class Patches(nn.Module):
    """Logits at half the resolution. Each token gives those of its patch."""

    def __init__(self, width: int, classes: int, patch: int) -> None:
        super().__init__()
        self.norm, self.head = LayerNorm2d(width), nn.Conv2d(width, classes * (patch // 2) ** 2, 1)
        self.patch = patch

    def forward(self, stages: list[Tensor]) -> Tensor:
        return F.pixel_shuffle(self.head(self.norm(stages[-1])), self.patch // 2)


class Segmenter(nn.Module):
    def __init__(self, backbone: nn.Module, blocks: tuple[int, ...], head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.blocks, self.head = backbone, blocks, head

    def stages(self, images: Tensor) -> list[Tensor]:
        return self.backbone.forward_intermediates(images, indices=self.blocks, intermediates_only=True)

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.head(self.stages(images)), images.shape[2:], mode="bilinear")

    def get_classifier(self) -> nn.Module:
        return self.head


def cnn(classes: int, width: int, depth: int) -> Segmenter:
    backbone = resnet(1, width, depth)
    backbone.conv1.stride = 2
    return Segmenter(backbone, (1, 2, 3, 4), Pyramid([width, 2 * width, 4 * width, 8 * width], classes))


def vit(classes: int, width: int, heads: int, depth: int, patch: int = 8) -> Segmenter:
    backbone = plain_vit(1, width, heads, depth, patch, SIZE)
    return Segmenter(backbone, (0, depth // 3, depth - 2, depth - 1), Patches(width, classes, patch))


TRAINED = {"blocks": (), "optimizer": torch.optim.AdamW, "lr": 8e-3, "weight_decay": 0.05}

networks = {
    "cnn": Network(lambda classes: cnn(classes, 32, 2), **TRAINED),
    "cnn_small": Network(lambda classes: cnn(classes, 16, 1), **TRAINED),
    "vit": Network(lambda classes: vit(classes, 192, 6, 6), **TRAINED),
    "vit_small": Network(lambda classes: vit(classes, 96, 3, 4), **TRAINED),
}
pairs = {"cnn_vit": ("cnn", "vit_small"), "vit_cnn": ("vit", "cnn_small")}
taught_by = {"vit": "cnn"}
methods = ("none", "kd", "cwd", "pkd", "fitnet_map", "rsd", "rsd_dense")
refused = ("dkd", "ofa", "sdd", "dist", "dist_rsd", "ofa_rsd", "rsd_logits")
grid = (12, 16)
defaults = {"epochs": 40, "batches": [16], "teacher_epochs": 60, "seeds": [0, 1, 2]}
results = "benchmarks/results/segment.csv"
pretrained = None


def source(text: str) -> str:
    """A folder with train/, val/ and test/, each with images/NAME.png and labels/NAME.png; 11 is no class."""
    for part in PARTS:
        images, labels = (
            {path.name for path in (Path(text) / part / kind).glob("*.png")} for kind in ("images", "labels")
        )
        if not images or images != labels:
            raise ValueError(f"{text} has no {part}/images and {part}/labels with PNG files of the same names")
    return text


def load(args: argparse.Namespace, device: torch.device) -> Images:
    splits = []
    for part in PARTS:
        paths = sorted((Path(args.data) / part / "images").glob("*.png"))
        images = stacked([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        pixels = [np.asarray(Image.open(path.parents[1] / "labels" / path.name)) for path in paths]
        labels = torch.from_numpy(np.stack(pixels)).long()
        labels[labels >= len(CLASSES)] = UNLABELLED
        splits.append(Split(images.to(device), labels.to(device)))
    return Images(*splits, len(CLASSES), args.views)


def outputs(model: nn.Module, network: Network, images: Tensor) -> Outputs:
    stages = model.stages(images)
    return Outputs(model.head(stages).float(), pool(stages[-1], channels_last=False), stages)


def score(predicted: Tensor, labels: Tensor) -> float:
    known = labels != UNLABELLED
    pairs = labels[known] * len(CLASSES) + predicted[known]
    confusion = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1).double()
    both = confusion.diagonal()
    return 100 * (both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean().item()
