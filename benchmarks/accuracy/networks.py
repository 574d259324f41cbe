"""What a network is to these benchmarks, and the small ones for images of 32 x 32 pixels."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIDE = 32


class Outputs(NamedTuple):
    """What a network makes of a batch; maps are (B, C, H, W), token grids (B, N, C)."""

    logits: Tensor  # (B, classes)
    embedding: Tensor  # (B, D), the classifier's input
    stages: list[Tensor]  # four maps or token grids, first to last; small maps in float16 if a teacher is cached


def as_map(x: Tensor) -> Tensor:
    """(B, C, H, W) from a map or from a square grid of tokens."""
    return x if x.ndim == 4 else rearrange(x, "b (h w) c -> b c h w", h=math.isqrt(x.shape[1]))


def down_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map, averaged down to the grid where it is larger."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], grid[0]), min(x.shape[3], grid[1])))


def cosine(steps: int, up: float = 0.05, floor: float = 0.0) -> Callable[[int], float]:
    """Factors of the learning rate: a linear rise over a share of the steps, then half a cosine."""
    first = max(1, int(up * steps))

    def factor(i: int) -> float:
        done = max(0, i - first) / max(1, steps - first)
        return min((i + 1) / first, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))

    return factor


def sgd(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True)


class Network(NamedTuple):
    """A model and how it is trained."""

    build: Callable[[int], nn.Module]
    blocks: tuple[int, ...]  # the ends of its four stages, as timm's forward_intermediates counts
    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float  # for 128 images a step in all processes together, and in proportion for others
    weight_decay: float
    schedule: Callable[[int], Callable[[int], float]] = cosine
    clip: float = 5.0
    smoothing: float = 0.0  # of labels
    strong: bool = False  # augmentation, where the task has two


def resnet(classes: int, width: int, depth: int) -> ResNet:
    channels = (width, 2 * width, 4 * width, 8 * width)
    # The "deep" stem sets the width. A single 3 x 3 convolution without pooling then takes its place.
    model = ResNet(BasicBlock, (depth,) * 4, classes, channels=channels, stem_type="deep", stem_width=width // 2)
    model.conv1, model.maxpool = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.Identity()
    return model


def vit(
    classes: int, width: int, heads: int, depth: int = 6, patch: int = 4, size: int | tuple[int, int] = SIDE
) -> VisionTransformer:
    shape = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    return VisionTransformer(num_classes=classes, class_token=False, global_pool="avg", mlp_ratio=2, **shape)


def resmlp(classes: int, width: int, depth: int = 6, patch: int = 4) -> MlpMixer:
    shape = {"img_size": SIDE, "patch_size": patch, "embed_dim": width, "num_blocks": depth, "mlp_ratio": 4}
    return MlpMixer(num_classes=classes, block_layer=ResBlock, norm_layer=Affine, **shape)


def outputs(model: nn.Module, network: Network, images: Tensor) -> Outputs:
    """Of timm's classifiers. Swin's stages become tokens, like those of the other transformers."""
    layout = "NLC" if isinstance(model, (VisionTransformer, MlpMixer)) else "NCHW"
    last, stages = model.forward_intermediates(images, indices=network.blocks, output_fmt=layout)
    if isinstance(model, SwinTransformer):
        stages = [stage.flatten(2).transpose(1, 2) for stage in stages]
    embedding = model.forward_head(last, pre_logits=True)
    return Outputs(model.get_classifier()(embedding).float(), embedding, stages)
