"""OFA's projectors (Hao et al., NeurIPS 2023): from each stage of the student to logits."""

import math

from einops.layers.torch import Rearrange, Reduce
from timm.models.vision_transformer import Block
from torch import nn

from benchmarks.accuracy.networks import Outputs


def projectors(student: Outputs, teacher: Outputs) -> list[nn.Module]:
    """One for each stage, from outputs that show the widths."""
    first, last = (x.shape[2] if x.ndim == 4 else math.isqrt(x.shape[1]) for x in student.stages[::3])
    side = last if first > last else max(1, last // 2)  # half the grid where all stages have the same
    widths = (student.embedding.shape[1], teacher.embedding.shape[1])
    return [projector(x.shape[1:], i, widths, student.logits.shape[1], side) for i, x in enumerate(student.stages)]


def projector(shape: tuple[int, ...], stage: int, widths: tuple[int, int], classes: int, side: int) -> nn.Module:
    """As in the paper: separable convolutions for maps, attention for tokens.

    Args:
        shape: (C, H, W) of a map, (N, C) of tokens.
        stage: 0 to 3; a later stage needs fewer blocks.
        widths: Of the student's and the teacher's embedding.
        classes: Width of the logits.
        side: The grid is halved until it has this side; 7 for images of 224 x 224.
    """
    layers: list[nn.Module] = []
    if len(shape) == 3:
        width, grid = shape[0], shape[1]
        while grid > side:
            grid = math.ceil(grid / 2)
            out = 2 * width if grid > side else max(widths)
            layers += [_separable(width, width, stride=2), _separable(width, out, stride=1)]
            width = out
        if not layers:
            layers.append(nn.Conv2d(width, max(widths), 1))
            width = max(widths)
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        width, grid = shape[1], math.isqrt(shape[0])
        while grid // 2 >= side:
            layers.append(_merge_patches(width, widths[0], grid))
            width, grid = widths[0], grid // 2
        layers += [Block(width, num_heads=4) for _ in range(max(3 - stage, 1))]
        layers.append(Reduce("b n c -> b c", "mean"))
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _separable(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
        nn.Conv2d(width, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


def _merge_patches(width: int, out: int, side: int) -> nn.Sequential:
    """Four neighbouring tokens of a square grid become one."""
    merge = Rearrange("b (h y w x) c -> b (h w) (y x c)", h=side // 2, w=side // 2, y=2, x=2)
    return nn.Sequential(merge, nn.LayerNorm(4 * width), nn.Linear(4 * width, out, bias=False))
