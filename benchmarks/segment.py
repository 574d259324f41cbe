"""Does it distil where position matters: `python -m benchmarks.segment --data DIR`.

Semantic segmentation of road scenes, between a network of one family and a teacher of another. DIR holds train/, val/
and test/, each with images/NAME.png and labels/NAME.png, whose pixels are the class, 11 for none. Scores are the mean
over classes of intersection over union, in percent, of all pixels of a split. Choose by that of validation; the test
scenes are looked at once, when a run is over. Otherwise as benchmarks.distill. `--picture FILE`, with one pair, one
seed and two methods, draws one scene instead, with its labels and what the two students make of it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.progress import Progress
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from benchmarks import distill, report
from benchmarks.distill import UNLABELLED, Data, Network, Split, Task, fingerprint, normalise, resnet, shift, stacked
from benchmarks.methods import Outputs
from rsd_loss.features import pool

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "cyclist")
SIZE = (96, 128)


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
    """Logits at half the resolution, of which a token makes all that lie in its patch."""

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
    blocks = (0, depth // 3, depth - 2, depth - 1)
    backbone = distill.vit(1, width, heads, depth, patch, SIZE)
    return Segmenter(backbone, blocks, Patches(width, classes, patch))


# Learning rates are those of a batch of 128; one of 16 has an eighth.
NETWORKS = {
    "cnn": Network(lambda classes: cnn(classes, 32, 2), (), torch.optim.AdamW, 8e-3, 0.05),
    "cnn_small": Network(lambda classes: cnn(classes, 16, 1), (), torch.optim.AdamW, 8e-3, 0.05),
    "vit": Network(lambda classes: vit(classes, 192, 6, 6), (), torch.optim.AdamW, 8e-3, 0.05),
    "vit_small": Network(lambda classes: vit(classes, 96, 3, 4), (), torch.optim.AdamW, 8e-3, 0.05),
}
PAIRS = {"cnn_vit": ("cnn", "vit_small"), "vit_cnn": ("vit", "cnn_small")}  # teacher, student


def outputs(model: nn.Module, network: Network, images: Tensor) -> Outputs:
    stages = model.stages(images)
    return Outputs(model.head(stages).float(), pool(stages[-1], channels_last=False), stages)


def source(text: str) -> str:
    """A folder with train/, val/ and test/, each with images/ and labels/ of the same names."""
    for part in ("train", "val", "test"):
        names = [
            sorted(path.name for path in (Path(text) / part / kind).glob("*.png")) for kind in ("images", "labels")
        ]
        if not names[0] or names[0] != names[1]:
            raise argparse.ArgumentTypeError(
                f"{text} has no {part}/images and {part}/labels with PNG files of the same names"
            )
    return text


def load(source: str, cache: Path, device: torch.device) -> Data:
    splits = []
    for part in ("train", "val", "test"):
        paths = sorted((Path(source) / part / "images").glob("*.png"))
        images = stacked([np.asarray(Image.open(path).convert("RGB")) for path in paths])
        pixels = [np.asarray(Image.open(Path(source) / part / "labels" / path.name)) for path in paths]
        labels = torch.from_numpy(np.stack(pixels)).long()
        labels[labels >= len(CLASSES)] = UNLABELLED
        splits.append(Split(images.to(device), labels.to(device)))
    return Data(*splits, len(CLASSES), fingerprint(splits[0].images.cpu(), splits[0].labels.cpu()))


def in_views(split: Split, rows: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
    labels = shift(split.labels[rows][:, None], views, UNLABELLED)[:, 0]
    return normalise(shift(split.images[rows], views)), labels.contiguous()


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    known = labels != UNLABELLED
    pairs = labels[known] * len(CLASSES) + predicted[known]
    confusion = torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1).double()
    both = confusion.diagonal()
    return 100 * (both / (confusion.sum(0) + confusion.sum(1) - both).clamp(min=1)).mean().item()


SEGMENTATION = Task(
    module="benchmarks.segment",
    source=source,
    description=__doc__.partition("\n\n")[2],
    networks=NETWORKS,
    pairs=PAIRS,
    taught_by={"vit": "cnn"},
    methods=("none", "kd", "cwd", "pkd", "fitnet_map", "rsd", "rsd_dense"),
    not_for=(*distill.NEED_LABELS, "dist", "dist_rsd", "ofa_rsd", "rsd_balanced", "rsd_logits"),
    load=load,
    outputs=outputs,
    in_views=in_views,
    score=mean_iou,
    grid=(12, 16),
    defaults={"epochs": 40, "batches": [16], "teacher_epochs": 60, "csv": "benchmarks/results/segment.csv"},
)


def picture(args: argparse.Namespace, path: Path) -> None:
    """A validation scene, its labels, and what the students of the two planned runs make of it."""
    bench = distill.Bench(SEGMENTATION, args, Progress())
    scene, labels = (x[len(x) // 2] for x in bench.data.validation)
    panels = {"scene": scene.permute(1, 2, 0).cpu().numpy(), "labels": labels}
    for run in distill.planned(args):
        bench.distil(run)
        with torch.no_grad():
            predicted = bench.student(normalise(scene[None])).argmax(1)[0]
        panels[run.method.replace(":", ":\n") + f"\n{run.validation:.1f} %"] = predicted
    figure = Figure(figsize=(5, 4.4), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        if isinstance(panel, Tensor):
            panel = np.ma.masked_equal(panel.cpu().numpy(), UNLABELLED)
        axes.imshow(panel, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    first = argparse.ArgumentParser(prog="python -m benchmarks.segment", add_help=False)
    first.add_argument("--picture", type=report.output)
    found, rest = first.parse_known_args(argv)
    if not found.picture:
        distill.main(argv, SEGMENTATION)
        return
    args = distill.parse(rest, SEGMENTATION)
    if (count := len(distill.planned(args))) != 2:
        first.error(f"--picture shows two runs, and this plans {count}: give --pairs, --seeds and two --methods")
    picture(args, found.picture)


if __name__ == "__main__":
    main()
