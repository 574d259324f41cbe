"""From feature maps and token grids to the (batch, features) embeddings that the loss takes."""

import math

import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from rsd_loss._common import check_tensor

Grid = tuple[int, int]


def pool(x: Tensor, *, prefix_tokens: int = 0) -> Tensor:
    """Averages a feature map or the patch tokens of a sequence over space.

    Args:
        x: (B, C, H, W) map, channels first by its shape (in memory either way), or (B, N, C) tokens; any floating
            dtype. A (B, H, W, C) map, as timm's Swin has it, looks the same and must be permuted.
        prefix_tokens: How many tokens ahead of the patches (class, register, distillation) to leave out.

    Returns:
        (B, C) embeddings.

    Raises:
        TypeError: x is not a tensor.
        ValueError: x has another layout, or not more than ``prefix_tokens`` tokens.

    Example:
        >>> pool(torch.randn(8, 197, 384), prefix_tokens=1).shape
        torch.Size([8, 384])
    """
    _check_layout("x", x, prefix_tokens)
    if x.ndim == 4:
        return reduce(x, "b c h w -> b c", "mean")
    return reduce(x[:, prefix_tokens:], "b n c -> b c", "mean")


def dense_pairs(
    student: Tensor,
    teacher: Tensor,
    *,
    prefix_tokens: int | tuple[int, int] = 0,
    grid: Grid | tuple[Grid | None, Grid | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Every spatial position as a sample of its own, for the loss on 2-D features.

    Both sides are averaged (never interpolated up, which would only repeat samples) onto the finest grid that
    neither exceeds, row and column counts taken apart; then positions become rows.

    Args:
        student: (B, C_student, H, W) map, channels first by its shape, or (B, N, C_student) tokens.
        teacher: (B, C_teacher, H, W) map or (B, N, C_teacher) tokens of the same images; the grid may differ.
        prefix_tokens: Tokens ahead of the patches to leave out of token inputs; one number, or a
            (student, teacher) pair.
        grid: (rows, columns) of token inputs whose patches do not form a square; one grid, or a
            (student, teacher) pair in which None stands for a square. Maps need none.

    Returns:
        (B * h * w, C_student) and (B * h * w, C_teacher), row for row the same place of the same image.

    Raises:
        TypeError: An input is not a tensor.
        ValueError: An input has another layout, the batches differ, or the patches do not fill the grid.

    Example:
        >>> s, t = dense_pairs(torch.randn(8, 256, 14, 14), torch.randn(8, 50, 768), prefix_tokens=(0, 1))
        >>> s.shape, t.shape
        (torch.Size([392, 256]), torch.Size([392, 768]))
    """
    student_prefix, teacher_prefix = prefix_tokens if isinstance(prefix_tokens, tuple) else (prefix_tokens,) * 2
    student_grid, teacher_grid = _grid_of_each(grid)
    s = _as_map("student", student, student_prefix, student_grid)
    t = _as_map("teacher", teacher, teacher_prefix, teacher_grid)
    if s.shape[0] != t.shape[0]:
        raise ValueError(f"student has a batch of {s.shape[0]} and teacher of {t.shape[0]}: pass the same images")
    common = (min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3]))
    rows = [rearrange(F.adaptive_avg_pool2d(x, common), "b c h w -> (b h w) c") for x in (s, t)]
    return rows[0], rows[1]


def _as_map(name: str, x: Tensor, prefix_tokens: int, grid: Grid | None) -> Tensor:
    _check_layout(name, x, prefix_tokens)
    if x.ndim == 4:
        return x
    patches = x.shape[1] - prefix_tokens
    side = math.isqrt(patches)
    height, width = grid or (side, side)
    if height * width != patches:
        way_out = "pass grid=(rows, columns), or prefix_tokens if some tokens are not patches"
        raise ValueError(
            f"{name} has {patches} patch tokens (of {x.shape[1]}, less {prefix_tokens} prefix tokens), "
            f"which do not fill a {height} x {width} grid: {way_out}"
        )
    return rearrange(x[:, prefix_tokens:], "b (h w) c -> b c h w", h=height, w=width)


def _check_layout(name: str, x: Tensor, prefix_tokens: int) -> None:
    check_tensor(name, x)
    if x.ndim not in (3, 4):
        way_out = "it is pooled already" if x.ndim == 2 else "rearrange it"
        raise ValueError(
            f"{name} must be a (B, C, H, W) map or (B, N, C) tokens, got shape {tuple(x.shape)}: {way_out}"
        )
    if 0 in x.shape:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if x.ndim == 3 and not 0 <= prefix_tokens < x.shape[1]:
        raise ValueError(
            f"prefix_tokens must leave at least one of {name}'s {x.shape[1]} tokens (B, N, C), got {prefix_tokens}"
        )


def _grid_of_each(grid: Grid | tuple[Grid | None, Grid | None] | None) -> tuple[Grid | None, Grid | None]:
    if grid is None or isinstance(grid[0], int):
        return grid, grid
    return grid
