"""What to log, and to look at, every so many steps: is the student's embedding becoming the teacher's?"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from rsd_loss._common import check_embeddings, check_number, statistics_dtype
from rsd_loss.reference import cross_correlation, standardise

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Summary(NamedTuple):
    """Scalars on the embeddings' device, detached.

    Attributes:
        mean_diagonal: Mean of P_ii, in [-1, 1]: 1 when every student feature follows its teacher feature.
        off_diagonal_rms: Root mean square of P_ij, i != j, in [0, 1]. For unrelated features it is about 1 / sqrt(B),
            from sampling alone; 0 if there is a single feature.
        effective_rank: Of the standardised student, from 1 to min(B - 1, D): the exponential of the entropy of its
            singular values (Roy and Vetterli, 2007). It falls when features become redundant.
        linear_cka: Linear centred kernel alignment of the two embeddings, in [0, 1] (Kornblith et al., 2019). Unlike
            the diagonal it does not ask that features match one by one.
    """

    mean_diagonal: Tensor
    off_diagonal_rms: Tensor
    effective_rank: Tensor
    linear_cka: Tensor


@torch.no_grad()
def summary(student: Tensor, teacher: Tensor, *, eps: float = 1e-5) -> Summary:
    """Four numbers about a batch, each through the smaller of a (B, B) and a (D, D) matrix.

    Meant for every hundredth step or so: the singular values make a GPU wait.

    Args:
        student: (B, D) projected student embeddings, as the loss gets them; float16, bfloat16, float32 or float64.
        teacher: (B, D) teacher embeddings of the same samples in the same order.
        eps: Added to the standard deviation, as in ``rsd_loss.rsd_loss``.

    Returns:
        A ``Summary`` in float32, or float64 for float64 embeddings.

    Raises:
        TypeError: An embedding is not a floating-point tensor.
        ValueError: Shapes or devices do not fit; the message says which and what to do.
    """
    check_number("eps", eps)
    check_embeddings(student, teacher, same_width=True)
    (rows, features), dtype = student.shape, statistics_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    z_s, z_t = (standardise(x, eps) / rows**0.5 for x in (student, teacher))
    with torch.autocast(student.device.type, enabled=False):
        d = (z_s * z_t).sum(dim=0)
        gram = _gram(z_s)
        # What is not finite goes on as nan, and must not stop a training run in the search for eigenvalues.
        finite = gram.isfinite().all()
        singular = torch.linalg.eigvalsh(gram.masked_fill(~finite, 0)).clamp_min(0).sqrt()
        singular = singular.masked_fill(~finite, torch.nan)
        p = singular / singular.sum().clamp_min(torch.finfo(dtype).tiny)
        tiny = torch.finfo(dtype).tiny
        centred = [x - x[0] - (x - x[0]).mean(dim=0) for x in (student, teacher)]
        centred = [x / x.abs().amax().clamp_min(tiny) for x in centred]  # fourth powers would leave the range
        own = [_gram(x).square().sum().sqrt() for x in centred]
        alignment = _cross_squares(*centred) / (own[0] * own[1]).clamp_min(tiny)
        off_diagonal = _cross_squares(z_s, z_t) - d.square().sum()
    return Summary(
        d.mean(),
        (off_diagonal.clamp_min(0) / max(1, features * (features - 1))).sqrt(),
        torch.special.entr(p).sum().exp(),
        alignment,
    )


def plot_cross_correlation(
    student: Tensor, teacher: Tensor, *, eps: float = 1e-5, ax: "Axes | None" = None, **imshow: Any
) -> "Axes":
    """Draws the cross-correlation matrix: red where features agree, blue where they oppose each other.

    Args:
        student: (B, D_student) embeddings.
        teacher: (B, D_teacher) embeddings of the same samples in the same order.
        eps: Added to the standard deviation, as in ``rsd_loss.cross_correlation``.
        ax: Where to draw; by default in a new figure, which is not displayed: save it with ``ax.figure.savefig``.
        **imshow: For ``Axes.imshow``.

    Returns:
        The axes drawn in.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: An embedding is not a floating-point tensor.
        ValueError: Shapes or devices do not fit; the message says which and what to do.
    """
    check_number("eps", eps)
    check_embeddings(student, teacher)
    matrix = cross_correlation(student.detach(), teacher.detach(), eps).float().cpu()
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_cross_correlation needs matplotlib: pip install matplotlib") from error
    if ax is None:
        ax = Figure(layout="constrained").add_subplot()
    settings: dict[str, Any] = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1, "interpolation": "nearest"} | imshow
    image = ax.imshow(matrix.numpy(), **settings)
    ax.set(xlabel="student feature", ylabel="teacher feature")
    ax.figure.colorbar(image, ax=ax, label="correlation")
    return ax


def _gram(x: Tensor) -> Tensor:
    """The smaller of X X' and X' X, which have the same eigenvalues but for zeros."""
    return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x


def _cross_squares(x: Tensor, y: Tensor) -> Tensor:
    """||Y' X||^2, which is also <X X', Y Y'>."""
    return ((x @ x.T) * (y @ y.T)).sum() if x.shape[0] < x.shape[1] else (y.T @ x).square().sum()
