"""From feature maps and token grids to the (batch, features) embeddings that the loss takes."""

import math
from typing import Any

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from rsd_loss._common import check_integer, check_tensor

Grid = tuple[int, int]


def pool(x: Tensor, *, prefix_tokens: int = 0, channels_last: bool | None = None) -> Tensor:
    """Averages a feature map or the patch tokens of a sequence over space.

    Args:
        x: (B, C, H, W) map, (B, H, W, C) map with ``channels_last=True``, or (B, N, C) tokens; any floating dtype.
        prefix_tokens: How many tokens ahead of the patches (class, register, distillation) to leave out; maps have
            none.
        channels_last: Whether the shape of a map ends with its channels, as that of timm's Swin does. None means
            False, but raises for a map that looks as if its channels were last. Only the order of the dimensions
            matters, not the memory format.

    Returns:
        (B, C) embeddings.

    Raises:
        TypeError: x is not a floating-point tensor, prefix_tokens not an integer, or channels_last not a bool.
        ValueError: x has another layout, or no token is left after ``prefix_tokens`` of them.

    Examples:
        >>> pool(torch.randn(8, 197, 384), prefix_tokens=1).shape
        torch.Size([8, 384])
    """
    x = _channels_first("x", x, prefix_tokens, channels_last)
    return reduce(x, "b c h w -> b c" if x.ndim == 4 else "b n c -> b c", "mean")


def dense_pairs(
    student: Tensor,
    teacher: Tensor,
    *,
    prefix_tokens: int | tuple[int, int] = 0,
    grid: Grid | tuple[Grid | None, Grid | None] | None = None,
    channels_last: bool | tuple[bool | None, bool | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Every spatial position as a sample of its own, for the loss on 2-D features.

    Both sides are averaged onto a common grid, which has the smaller of the two row counts and the smaller of the two
    column counts. Neither is interpolated up, which would only repeat samples. Then positions become rows.

    Args:
        student: (B, C_student, H, W) map, (B, H, W, C_student) map with ``channels_last``, or (B, N, C_student) tokens.
        teacher: A map or tokens of the same images; its layout, grid and width may differ from the student's.
        prefix_tokens: Tokens ahead of the patches to leave out; a (student, teacher) pair, or one number for every
            input that is tokens.
        grid: Of token inputs whose patches do not form a square, as (rows, columns); for both sides, or a
            (student, teacher) pair of grids in which None stands for a square. Maps need none.
        channels_last: As in ``pool``; one value, or a (student, teacher) pair.

    Returns:
        (B * h * w, C_student) and (B * h * w, C_teacher), row for row the same place of the same image.

    Raises:
        TypeError: An input is not a floating-point tensor, or an argument of another type than it should be.
        ValueError: An input has another layout, the batches differ, the patches do not fill the grid, or the common
            grid is a single position.

    Examples:
        >>> s, t = dense_pairs(torch.randn(8, 256, 14, 14), torch.randn(8, 50, 768), prefix_tokens=(0, 1))
        >>> s.shape, t.shape
        (torch.Size([392, 256]), torch.Size([392, 768]))
    """
    if not isinstance(prefix_tokens, (tuple, list)):
        are_maps = [isinstance(x, Tensor) and x.ndim == 4 for x in (student, teacher)]
        prefix_tokens = [0 if is_map and not all(are_maps) else prefix_tokens for is_map in are_maps]  # type: ignore[assignment]
    prefix, last = _pair("prefix_tokens", prefix_tokens), _pair("channels_last", channels_last)
    grids: Any = (grid, grid) if _is_grid(grid) else _pair("grid", grid)
    s, t = map(_as_map, ("student", "teacher"), (student, teacher), prefix, last, grids)
    if s.shape[0] != t.shape[0]:
        raise ValueError(f"student has a batch of {s.shape[0]} and teacher of {t.shape[0]}: pass the same images")
    common = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    if common == (1, 1):
        raise ValueError(
            f"student has a grid of {s.shape[2]} x {s.shape[3]} and teacher {t.shape[2]} x {t.shape[3]}, whose pairs "
            "would be those of pool: take an earlier stage's map, as timm's model.forward_intermediates gives it"
        )
    maps = [x if x.shape[2:] == common else F.adaptive_avg_pool2d(x, common) for x in (s, t)]
    return rearrange(maps[0], "b c h w -> (b h w) c"), rearrange(maps[1], "b c h w -> (b h w) c")


def _pair(name: str, value: Any) -> Any:
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name} must be one value or a (student, teacher) pair, got {value!r}")
    return value


def _is_grid(grid: Any) -> bool:
    sizes = grid if isinstance(grid, (tuple, list)) else ()
    return len(sizes) == 2 and all(isinstance(n, int) or hasattr(n, "__index__") for n in sizes)


def _as_map(name: str, x: Tensor, prefix_tokens: int, channels_last: bool | None, grid: Grid | None) -> Tensor:
    x = _channels_first(name, x, prefix_tokens, channels_last)
    if x.ndim == 4:
        return x
    if grid is None:
        grid = (math.isqrt(x.shape[1]),) * 2
    elif not _is_grid(grid):
        raise TypeError(f"grid must be (rows, columns), or a (student, teacher) pair of such, got {grid!r} for {name}")
    height, width = (check_integer("grid", n) for n in grid)
    if height * width != x.shape[1]:
        raise ValueError(
            f"{name} has {x.shape[1]} patch tokens (of {x.shape[1] + prefix_tokens}, less {prefix_tokens} prefix "
            f"tokens), which do not fill a {height} x {width} grid: "
            "pass grid=(rows, columns), or prefix_tokens if some tokens are not patches"
        )
    return rearrange(x, "b (h w) c -> b c h w", h=height, w=width)


def _channels_first(name: str, x: Tensor, prefix_tokens: int, channels_last: bool | None) -> Tensor:
    """After checks, a (B, C, H, W) map, or (B, N, C) tokens without those of the prefix."""
    check_tensor(name, x)
    prefix_tokens = check_integer("prefix_tokens", prefix_tokens, least=0)
    if channels_last is not None and not isinstance(channels_last, bool):
        raise TypeError(f"channels_last must be True, False or None, got {channels_last!r}")
    if x.ndim not in (3, 4):
        way_out = "it is pooled already" if x.ndim == 2 else "rearrange it"
        raise ValueError(
            f"{name} must be a (B, C, H, W) map or (B, N, C) tokens, got shape {tuple(x.shape)}: {way_out}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if x.ndim == 3:
        if prefix_tokens >= x.shape[1]:
            raise ValueError(
                f"prefix_tokens must leave at least one of {name}'s {x.shape[1]} tokens (B, N, C), got {prefix_tokens}"
            )
        return x[:, prefix_tokens:]
    if prefix_tokens:
        raise ValueError(
            f"{name} is a map, with shape {tuple(x.shape)}, and has no prefix tokens, got {prefix_tokens}: "
            "leave prefix_tokens out, or pass (B, N, C) tokens"
        )
    if channels_last is None and x.shape[1] == x.shape[2] < x.shape[3]:
        raise ValueError(
            f"{name} looks like a (B, H, W, C) map, with shape {tuple(x.shape)}: "
            "pass channels_last=True, or False if it is (B, C, H, W) indeed"
        )
    return rearrange(x, "b h w c -> b c h w") if channels_last else x
