"""The papers' own pairs at their own scale.

RSD and OFA compare methods on 27 pairs of networks at 224 x 224 pixels, twelve on CIFAR-100 and fifteen on ImageNet.
These are trained by their public settings, which docs/reproducing.md lists.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.transforms import v2

from benchmarks.accuracy.cache import rank_and_world
from benchmarks.accuracy.classification import folders, score
from benchmarks.accuracy.data import Split, fingerprint
from benchmarks.accuracy.networks import Network, cosine, outputs, sgd
from benchmarks.accuracy.runs import Run
from benchmarks.records import refuse

# timm's names with their weights, and the blocks that end the four stages; of twelve equal blocks four.
MAPS, GRIDS, EQUAL = (1, 2, 3, 4), (0, 1, 2, 3), (1, 3, 9, 11)
NETWORKS = {
    "ResNet18": ("resnet18", MAPS),
    "ResNet50": ("resnet50.a1_in1k", MAPS),
    "MobileNetV2": ("mobilenetv2_100", MAPS),
    "ConvNeXt-T": ("convnext_tiny.fb_in1k", GRIDS),
    "Swin-T": ("swin_tiny_patch4_window7_224.ms_in1k", GRIDS),
    "Swin-N": (64, GRIDS),  # these two are the papers' own: the width of the first stage, and two blocks in each
    "Swin-P": (48, GRIDS),
    "DeiT-T": ("deit_tiny_patch16_224.fb_in1k", EQUAL),
    "ViT-S": ("vit_small_patch16_224.augreg_in21k_ft_in1k", EQUAL),
    "Mixer-B/16": ("mixer_b16_224.goog_in21k_ft_in1k", EQUAL),
    "ResMLP-S12": ("resmlp_12_224", EQUAL),
}
PAIRS = {  # classes: student -> teachers
    1000: {
        "ResNet18": ("DeiT-T", "Swin-T", "Mixer-B/16"),
        "MobileNetV2": ("DeiT-T", "Swin-T", "Mixer-B/16"),
        "DeiT-T": ("ResNet50", "ConvNeXt-T", "Mixer-B/16"),
        "Swin-N": ("ResNet50", "ConvNeXt-T", "Mixer-B/16"),
        "ResMLP-S12": ("ResNet50", "ConvNeXt-T", "Swin-T"),
    },
    100: {
        "ResNet18": ("Swin-T", "ViT-S", "Mixer-B/16"),
        "MobileNetV2": ("Swin-T", "ViT-S", "Mixer-B/16"),
        "DeiT-T": ("ConvNeXt-T", "Mixer-B/16"),
        "Swin-P": ("ConvNeXt-T", "Mixer-B/16"),
        "ResMLP-S12": ("ConvNeXt-T", "Swin-T"),
    },
}
CONVOLUTIONAL = ("ResNet18", "MobileNetV2")  # students
SIDE = 224
# The public code normalises CIFAR-100 by its own mean and standard deviation, everything else by ImageNet's.
STATISTICS = {32: {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}, SIDE: {}}


def build(name: str, classes: int) -> nn.Module:
    source = NETWORKS[name][0]
    if isinstance(source, str):
        return timm.create_model(source, num_classes=classes)
    shape = {"embed_dim": source, "depths": (2,) * 4, "num_heads": (2, 4, 8, 16)}
    return SwinTransformer(num_classes=classes, drop_path_rate=0.1 if classes == 100 else 0.0, **shape)


def key(name: str) -> str:
    return name.lower().replace("/", "")


def cells(classes: int) -> Iterator[tuple[str, str, str]]:
    """The name of a pair on the command line, its teacher and its student."""
    for student, teachers in PAIRS[classes].items():
        for teacher in teachers:
            yield f"{key(teacher)}_{key(student)}", teacher, student


# How they are trained


def stairs(steps: int) -> Callable[[int], float]:
    """Of 100 epochs, the first three climb to the full rate. Each 30 end with a tenth of it."""
    return lambda i: min(1.0, (i + 1) / max(1, 0.03 * steps)) * 0.1 ** int(i / (0.3 * steps))


def undecayed_vectors(make: type, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> object:
    """Biases and norms have no weight decay, as in timm."""
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]
    groups[1]["weight_decay"] = 0.0
    return make(groups, lr=lr, weight_decay=weight_decay)


CNN = {"optimizer": partial(undecayed_vectors, sgd), "clip": math.inf}
TEACHER = {"optimizer": partial(undecayed_vectors, torch.optim.AdamW), "weight_decay": 0.05, "lr": 1e-4}
OTHER = TEACHER | {"strong": True}
PRESETS = {  # classes: for convolutional students, and for others
    100: (
        CNN | {"lr": 0.05, "weight_decay": 2e-3, "schedule": partial(cosine, up=3 / 300, floor=0.02)},
        OTHER | {"lr": 5e-4, "schedule": partial(cosine, up=20 / 300, floor=0.02)},
    ),
    1000: (  # 0.1 at a batch of 8 x 64, and 1e-3 at 8 x 128
        CNN | {"lr": 0.1 / 4, "weight_decay": 1e-4, "schedule": stairs},
        OTHER | {"lr": 1e-3 / 8, "schedule": partial(cosine, up=20 / 300, floor=0.001)},
    ),
}


def networks(classes: int) -> dict[str, Network]:
    found = {}
    for _, teacher, student in cells(classes):
        of_student = PRESETS[classes][student not in CONVOLUTIONAL]
        for name, label, preset in ((student, "", of_student), (teacher, "teacher-", TEACHER)):
            found[label + key(name)] = Network(partial(build, name), NETWORKS[name][1], smoothing=0.1, **preset)
    return found


# Images


class Files:
    """Images loaded from disk. Every view is fresh, and small images are enlarged on the device."""

    views = None
    validation = Split([], torch.empty(0))  # all other images are trained on

    def __init__(self, sets: list[Dataset], size: int, args: argparse.Namespace, device: torch.device) -> None:
        self.train, self.test = (Split(images, torch.tensor(images.targets)) for images in sets)
        self.classes, self.size, self.workers, self.device = len(sets[0].classes), size, args.workers, device
        names = args.data + "".join(path[len(args.data) :] for path, _ in getattr(sets[0], "samples", ()))
        self.fingerprint = fingerprint(
            self.train.labels, torch.frombuffer(bytearray(names.encode()), dtype=torch.uint8)
        )

    def enlarged(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        if self.size != SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="bicubic")
        return images.contiguous(memory_format=torch.channels_last)

    def epoch(
        self, run: Run, network: Network, draw: torch.Generator, fixed: bool
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields labels in place of places in a cache, images and labels, which may be mixed."""
        rank, world = rank_and_world()
        strong = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
        kind = STATISTICS[self.size] | (strong if network.strong else {"color_jitter": None})
        seen, classes = self.train.images, {"num_classes": self.classes}
        seen.transform = create_transform(self.size, is_training=True, interpolation="random", **kind)
        share = len(seen) // world
        if share < run.batch:
            refuse(f"a process has {share} images and a batch of {run.batch}: give smaller --batches")
        order = torch.randperm(len(seen), generator=draw)[rank : share * world : world]
        seed = int(torch.randint(2**62, (), generator=draw)) + rank  # each process has its own crops and mixtures
        torch.manual_seed(seed)
        options = {"num_workers": self.workers, "pin_memory": self.device.type == "cuda"}
        options["generator"] = torch.Generator().manual_seed(seed)
        mix = v2.RandomChoice([v2.MixUp(alpha=0.8, **classes), v2.CutMix(alpha=1.0, **classes)])
        for images, y in DataLoader(seen, run.batch, sampler=order.tolist(), drop_last=True, **options):
            images, y = self.enlarged(images), y.to(self.device)
            yield y, *(mix(images, y) if network.strong else (images, y))

    def shown(self, split: Split) -> Iterator[Tensor]:
        crop = 0.875 if self.size == SIDE else 1.0
        kind = {"interpolation": "bicubic", "crop_pct": crop, **STATISTICS[self.size]}
        split.images.transform = create_transform(self.size, **kind)
        for images, _ in DataLoader(split.images, 100, num_workers=self.workers):
            yield self.enlarged(images)


class Paper:
    """Any of the paper's pairs on CIFAR-100 or ImageNet. It takes a GPU, or several.

    For several, put `torchrun --nproc-per-node N -m` for `python -m`: each process has a batch of --batches. All
    training images are trained on. So there is no validation, and these runs are not for choosing settings.
    """

    methods = ("none", "rsd")
    refused = ("cwd", "cwd_rsd_dense", "sdd")
    results = "benchmarks/results/paper.csv"
    outputs, score = staticmethod(outputs), staticmethod(score)

    def __init__(self, classes: int) -> None:
        self.classes, self.networks, self.taught_by = classes, networks(classes), {}
        self.pairs = {name: (f"teacher-{key(teacher)}", key(student)) for name, teacher, student in cells(classes)}
        self.defaults = {"epochs": 300, "batches": [128], "teacher_epochs": 20 if classes == 100 else 0, "seeds": [0]}

    def source(self, text: str) -> str:
        """A folder with train/ and test/ (ImageNet: val/), a folder for each class in each; or "cifar100"."""
        if self.classes == 100:
            return text if text == "cifar100" else folders(text, "train", "test")
        return folders(text, "train", "val")

    def load(self, args: argparse.Namespace, device: torch.device) -> Files:
        if args.data == "cifar100":
            sets = [CIFAR100(str(args.cache), train, download=True) for train in (True, False)]
        else:
            parts = ("train", "test" if self.classes == 100 else "val")
            sets = [ImageFolder(str(Path(args.data) / part)) for part in parts]
        return Files(sets, 32 if self.classes == 100 else SIDE, args, device)

    def pretrained(self, model: nn.Module, args: argparse.Namespace) -> None:
        """Loads a teacher's weights: those of the file, else timm's."""
        renamed = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # from older timm
        if not args.teacher:
            if not args.teacher_epochs and model.num_classes != 1000:
                refuse("the teacher's classifier would be random: give --teacher-epochs or --teacher")
            timm.models.load_pretrained(model, num_classes=model.num_classes, filter_fn=renamed)
        else:
            timm.models.load_checkpoint(model, args.teacher, filter_fn=renamed, weights_only=True)
