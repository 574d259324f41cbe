"""Small images: a teacher of one family, a student of another, by default on twenty classes of CIFAR-100.

A tenth of the training images is held out for validation, the same tenth in every run: choose by `validation`. The test
images are looked at once, when a run is over. Every training image has a fixed set of augmented views, and a teacher's
outputs for them are computed once and kept. Within a seed all methods start from the same weights and see the same
images in the same order.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR100, ImageFolder

from benchmarks.accuracy.data import Images, Split, first_classes, stacked
from benchmarks.accuracy.networks import SIDE, Network, resmlp, resnet, sgd, vit
from benchmarks.accuracy.networks import outputs as outputs  # a part of the task

ADAMW = {"optimizer": torch.optim.AdamW, "lr": 1e-3, "weight_decay": 0.05}
SGD = {"optimizer": sgd, "lr": 0.1, "weight_decay": 5e-4}
MAPS, EQUAL = (1, 2, 3, 4), (0, 1, 4, 5)

networks = {
    "resnet": Network(lambda classes: resnet(classes, 32, 2), MAPS, **SGD),
    "resnet_small": Network(lambda classes: resnet(classes, 16, 1), MAPS, **SGD),
    "resnet_wide": Network(lambda classes: resnet(classes, 64, 1), MAPS, **SGD),
    "vit": Network(lambda classes: vit(classes, 192, 6), EQUAL, **ADAMW),
    "vit_small": Network(lambda classes: vit(classes, 96, 3), EQUAL, **ADAMW),
    "vit_coarse": Network(lambda classes: vit(classes, 96, 3, patch=8), EQUAL, **ADAMW),
    "resmlp_small": Network(lambda classes: resmlp(classes, 96), EQUAL, **ADAMW),
    "resmlp_coarse": Network(lambda classes: resmlp(classes, 96, patch=8), EQUAL, **ADAMW),
}
pairs = {  # teacher, student
    "cnn_vit": ("resnet", "vit_small"),
    "cnn_mlp": ("resnet", "resmlp_small"),
    "vit_cnn": ("vit", "resnet_small"),
    "cnn_cnn": ("resnet", "resnet_small"),
    # For grids of settings: a student at a quarter of the cost, under teachers of 256 and of 128 features.
    "cnn_coarse": ("resnet", "vit_coarse"),
    "small_cnn_coarse": ("resnet_small", "vit_coarse"),
    "small_cnn_vit": ("resnet_small", "vit_small"),  # both have 8 x 8 positions: the teacher at its third stage
}
# With ten thousand images a transformer alone stays behind a small CNN. So a CNN teaches it, as it did DeiT.
taught_by = {"vit": "resnet"}
methods = ("none", "kd", "dkd", "dist", "fitnet", "ofa", "rsd", "rsd_dense")  # by default
refused = ("cwd", "cwd_rsd_dense")
grid = (8, 8)  # the cache has a teacher's maps averaged down to it
defaults = {"epochs": 20, "batches": [128], "teacher_epochs": 30, "seeds": [0, 1, 2]}
results = "benchmarks/results/distill.csv"
pretrained = None


def source(text: str) -> str:
    """A folder with train/ and test/, one folder per class in each; "cifar100" or its first 20, "cifar100-20"."""
    return text if text in ("cifar100", "cifar100-20") else folders(text, "train", "test")


def load(args: argparse.Namespace, device: torch.device) -> Images:
    parts = ("train", "test")
    if Path(args.data).is_dir():
        sets = [ImageFolder(str(Path(args.data) / part)) for part in parts]
        classes = len(sets[0].classes)
        splits = [(stacked([small(image) for image, _ in images]), torch.tensor(images.targets)) for images in sets]
    else:
        for part in parts:
            CIFAR100(str(args.cache), part == "train", download=True)
        classes = 20 if args.data == "cifar100-20" else 100
        splits = [first_classes(args.cache / "cifar-100-python" / part, classes) for part in parts]
    (images, labels), test = splits
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    pairs = ((images[rest], labels[rest]), (images[held_out], labels[held_out]), test)
    return Images(*(Split(*(x.contiguous().to(device) for x in pair)) for pair in pairs), classes, args.views)


def score(predicted: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    return 100 * (predicted == labels).float().mean().item()


def folders(text: str, *parts: str) -> str:
    classes = [sorted(path.name for path in (Path(text) / part).glob("*/")) for part in parts]
    if not classes[0] or classes[0] != classes[1]:
        raise ValueError(f"{text} has no {'/ and '.join(parts)}/ with a folder for each class, the same in both")
    return text


def small(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
