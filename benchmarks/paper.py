"""The papers' own pairs at their own scale: `python -m benchmarks.paper --data cifar100 --pairs swin-t_resnet18`.

RSD and OFA compare methods on 27 pairs of networks at 224 x 224 pixels: twelve on CIFAR-100, fifteen on ImageNet. Any
of them is trained here as by their public settings, which docs/reproducing.md lists, beside a student alone or under
any other method. --data is "cifar100", which is downloaded; a folder of small images with train/ and test/, which is
treated alike; or ImageNet's folder, with train/ and val/. All training images are trained on, so there is no
validation, and nothing should be chosen by these runs. It takes a GPU, or several: put `torchrun --nproc-per-node N -m`
for `python -m`, with a batch of --batches in each process. A run that is stopped goes on from its last epoch.
"""

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from timm.models import ConvNeXt, EfficientNet, ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR100, ImageFolder
from torchvision.transforms import v2

from benchmarks import distill, report
from benchmarks.distill import Bench, Data, Network, Run, Split, Task, accuracy, cosine, fingerprint, folders, sgd
from benchmarks.methods import Outputs

# timm's names, with the weights that are meant, and the blocks after which the four stages end; of twelve equal blocks
# the 2nd, 4th, 10th and 12th.
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
CONVOLUTIONAL = ("ResNet18", "MobileNetV2")  # of the students
# The student alone, under OFA and under RSD, as far as a public summary of the paper quotes its two tables.
PUBLISHED = {
    (100, "Swin-T", "ResNet18"): (74.01, 80.54, 83.92),
    (100, "ViT-S", "MobileNetV2"): (73.68, 78.45, 81.68),
    (100, "ConvNeXt-T", "DeiT-T"): (68.00, 75.76, 82.46),
    (100, "ConvNeXt-T", "ResMLP-S12"): (66.56, 81.22, 84.21),
    (1000, "Swin-T", "ResNet18"): (69.75, 71.85, 72.13),
    (1000, "ConvNeXt-T", "Swin-N"): (75.53, 77.50, 77.70),
    (1000, "ConvNeXt-T", "ResMLP-S12"): (76.65, 77.53, 78.41),
}
SIDE = 224
# The public code normalises CIFAR-100 by its own mean and deviation, everything else by ImageNet's.
STATISTICS = {32: {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}, SIDE: {}}


def build(name: str, classes: int) -> nn.Module:
    source = NETWORKS[name][0]
    if isinstance(source, str):
        return timm.create_model(source, num_classes=classes)
    shape = {"embed_dim": source, "depths": (2,) * 4, "num_heads": (2, 4, 8, 16)}
    shape["drop_path_rate"] = 0.1 if classes == 100 else 0.0
    return SwinTransformer(num_classes=classes, **shape)


def outputs(model: nn.Module, network: Network, images: Tensor) -> Outputs:
    last, stages = model.forward_intermediates(images, indices=network.blocks)
    if not isinstance(model, (ResNet, EfficientNet, ConvNeXt)):
        stages = [stage.flatten(2).transpose(1, 2) for stage in stages]
    embedding = model.forward_head(last, pre_logits=True)
    return Outputs(model.get_classifier()(embedding).float(), embedding, stages)


def pretrained(model: nn.Module, file: Path | None) -> None:
    renamed = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # from older versions of timm
    if file is None:
        timm.models.load_pretrained(model, num_classes=model.num_classes, filter_fn=renamed)
        return
    try:
        timm.models.load_checkpoint(model, str(file), filter_fn=renamed, weights_only=True)
    except Exception as error:  # of many kinds, by what else it is
        what = str(error).strip().partition("\n")[0]
        report.refuse(f"--teacher {file} has no weights of this {type(model).__name__}: {what}")


# How they are trained


def stairs(steps: int) -> Callable[[int], float]:
    """A tenth of the rate after each 30 of 100 epochs; the first three climb to it."""
    return lambda i: min(1.0, (i + 1) / max(1, 0.03 * steps)) * 0.1 ** int(i / (0.3 * steps))


def undecayed_vectors(make: type, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> object:
    """Biases and the weights of norms have no weight decay, as in timm."""
    groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": [p for p in parameters if p.ndim < 2]}]
    groups[1]["weight_decay"] = 0.0
    return make(groups, lr=lr, weight_decay=weight_decay)


CNN = {"optimizer": partial(undecayed_vectors, sgd), "clip": math.inf}
TEACHER = {"optimizer": partial(undecayed_vectors, torch.optim.AdamW), "weight_decay": 0.05, "lr": 1e-4}
OTHER = TEACHER | {"strong": True}
PRESETS = {  # by classes: of students that are convolutional, and of others
    100: (
        CNN | {"lr": 0.05, "weight_decay": 2e-3, "schedule": partial(cosine, up=3 / 300, floor=0.02)},
        OTHER | {"lr": 5e-4, "schedule": partial(cosine, up=20 / 300, floor=0.02)},
    ),
    1000: (  # 0.1 at a batch of 8 x 64, and 1e-3 at 8 x 128
        CNN | {"lr": 0.1 / 4, "weight_decay": 1e-4, "schedule": stairs},
        OTHER | {"lr": 1e-3 / 8, "schedule": partial(cosine, up=20 / 300, floor=0.001)},
    ),
}


def key(name: str) -> str:
    return name.lower().replace("/", "")


def cells(classes: int) -> Iterator[tuple[str, str, str]]:
    """The name of a pair on the command line, its teacher and its student."""
    for student, teachers in PAIRS[classes].items():
        for teacher in teachers:
            yield f"{key(teacher)}_{key(student)}", teacher, student


def networks(classes: int) -> dict[str, Network]:
    found = {}
    for _, teacher, student in cells(classes):
        of_student = PRESETS[classes][student not in CONVOLUTIONAL]
        for name, label, preset in ((student, "", of_student), (teacher, "teacher-", TEACHER)):
            found[label + key(name)] = Network(partial(build, name), NETWORKS[name][1], smoothing=0.1, **preset)
    return found


# Images


class Seen(Dataset):
    """A dataset through a transform."""

    def __init__(self, images: Dataset, transform: object) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = self.images[i]
        return self.transform(image.convert("RGB")), label


def source(part: str, text: str) -> str:
    """The word "cifar100"; a folder of 32 x 32 images with train/ and test/; or ImageNet's, with train/ and val/."""
    return text if text == "cifar100" else folders(text, "train", part)


def load(part: str, source: str, cache: Path, device: torch.device) -> Data:
    if source == "cifar100":
        sets = [CIFAR100(str(cache), train, download=True) for train in (True, False)]
    else:
        sets = [ImageFolder(str(Path(source) / name)) for name in ("train", part)]
    train, test = (Split(images, torch.tensor(images.targets)) for images in sets)
    names = "".join(path[len(source) :] for path, _ in getattr(sets[0], "samples", ()))
    digest = fingerprint(train.labels, torch.frombuffer(bytearray(source.encode() + names.encode()), dtype=torch.uint8))
    return Data(train, Split([], torch.empty(0)), test, len(sets[0].classes), digest)


def enlarged(images: Tensor) -> Tensor:
    if images.shape[-1] != SIDE:
        images = F.interpolate(images, (SIDE, SIDE), mode="bicubic")
    return images.contiguous(memory_format=torch.channels_last)


def loaded(size: int, bench: Bench, network: Network, run: Run, draw: torch.Generator, fixed: bool) -> Iterator:
    """An epoch of places, which nobody needs, images and labels; small images are enlarged on the device."""
    strong = {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"}
    kind = STATISTICS[size] | (strong if network.strong else {"color_jitter": None})
    transform = create_transform(size, is_training=True, interpolation="random", **kind)
    seen, classes = Seen(bench.data.train.images, transform), {"num_classes": bench.data.classes}
    share = len(seen) // bench.world
    if share < run.batch:
        report.refuse(f"a process has {share} images and a batch of {run.batch}: give smaller --batches")
    order = torch.randperm(len(seen), generator=draw)[bench.rank : share * bench.world : bench.world]
    seed = int(torch.randint(2**62, (), generator=draw)) + bench.rank  # each process has its own crops and mixtures
    torch.manual_seed(seed)
    options = {"num_workers": bench.args.workers, "pin_memory": bench.device.type == "cuda"}
    options["generator"] = torch.Generator().manual_seed(seed)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, **classes), v2.CutMix(alpha=1.0, **classes)])
    for images, y in DataLoader(seen, run.batch, sampler=order.tolist(), drop_last=True, **options):
        images, y = enlarged(images.to(bench.device, non_blocking=True)), y.to(bench.device)
        yield y, *(mix(images, y) if network.strong else (images, y))


def shown(size: int, bench: Bench, split: Split) -> Iterator[Tensor]:
    transform = create_transform(
        size, interpolation="bicubic", crop_pct=0.875 if size == SIDE else 1.0, **STATISTICS[size]
    )
    for images, _ in DataLoader(Seen(split.images, transform), 100, num_workers=bench.args.workers):
        yield enlarged(images.to(bench.device))


def task(classes: int, size: int, part: str, **defaults: object) -> Task:
    return Task(
        module="benchmarks.paper",
        source=partial(source, part),
        description=__doc__.partition("\n\n")[2],
        networks=networks(classes),
        pairs={name: (f"teacher-{key(teacher)}", key(student)) for name, teacher, student in cells(classes)},
        taught_by={},
        methods=("none", "rsd"),
        not_for=(*distill.OF_MAPS, "sdd"),
        load=partial(load, part),
        outputs=outputs,
        score=accuracy,
        defaults={"seeds": [0], "csv": "benchmarks/results/paper.csv", "views": 0, **defaults},
        pretrained=pretrained,
        batches=partial(loaded, size),
        shown=partial(shown, size),
    )


TASKS = {
    100: task(100, 32, "test", epochs=300, batches=[128], teacher_epochs=20),
    1000: task(1000, SIDE, "val", epochs=300, batches=[128], teacher_epochs=0),
}


# The page


def markdown(classes: int, overhead: Path) -> str:
    """A table of the pairs with what the papers report, and the command of each; operations are those of the file."""
    with overhead.open(newline="") as file:
        found = [line for line in csv.DictReader(file) if line["classes"] == str(classes)]
    lines = ["| teacher | student | alone | OFA | RSD | RSD, run by us | hours on one H100 |", "|---" * 7 + "|"]
    commands = []
    for (pair, teacher, student), line in zip(cells(classes), found, strict=True):
        if classes == 100:
            call, epochs, images = "python -m benchmarks.paper --data cifar100", 300, 50_000
        else:
            call, epochs, images = "torchrun --nproc-per-node 8 -m benchmarks.paper --data imagenet", 300, 1_281_167
            if student in CONVOLUTIONAL:
                call, epochs = f"{call} --epochs 100 --batches 64", 100
        commands.append(f"{call} --device cuda --bfloat16 --pairs {pair}")
        total = epochs * images * (3 * int(line["student_operations"]) + int(line["teacher_operations"]))
        published = [f"{x:.2f}" for x in PUBLISHED.get((classes, teacher, student), ())] or ["-"] * 3
        hours = total / (0.1 * 989e12) / 3600
        lines.append(f"| {' | '.join([teacher, student, *published, 'not run', f'{hours:.2g}'])} |")
    return "\n".join([*lines, "", "<!-- not run: hours on a GPU -->", "```", *commands, "```"])


def main(argv: Sequence[str] | None = None) -> None:
    words = argparse.ArgumentParser(add_help=False)
    words.add_argument("--data", default="")
    data = words.parse_known_args(argv)[0].data
    distill.main(argv, TASKS[1000 if (Path(data) / "val").is_dir() else 100])


if __name__ == "__main__":
    main()
