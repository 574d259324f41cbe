"""The losses of the other methods, each a function of a student's and a teacher's outputs."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from rsd_loss.reference import standardise


def kd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of softened logits (Hinton, Vinyals and Dean, 2015); the mean over pixels of maps."""
    if student.ndim == 4:
        student, teacher = (rearrange(x, "b k h w -> (b h w) k") for x in (student, teacher))
    log_s, log_t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 4.0) -> Tensor:
    """Decoupled KD (Zhao et al., CVPR 2022): the target against the rest + 8 * the rest among themselves."""
    target = F.one_hot(labels, student.shape[1]).bool()

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax(logits / temperature, dim=1)
        rest = log_p.masked_fill(target, -math.inf).logsumexp(dim=1)
        binary = torch.stack((log_p[target], rest), dim=1)
        others = log_p[~target].view(len(log_p), -1)
        return binary, others.log_softmax(dim=1)

    (binary_s, others_s), (binary_t, others_t) = split(student), split(teacher)
    tckd = F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True)
    nckd = F.kl_div(others_s, others_t, reduction="batchmean", log_target=True)
    return temperature**2 * (tckd + 8 * nckd)


def dist(student: Tensor, teacher: Tensor, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0) -> Tensor:
    """DIST (Huang et al., NeurIPS 2022): one minus Pearson's correlation, within samples and within classes."""
    s, t = (F.softmax(x / temperature, dim=1) for x in (student, teacher))

    def distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=dim).mean()

    return temperature**2 * (beta * distance(s, t, 1) + gamma * distance(s, t, 0))


def ofa(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.5) -> Tensor:
    """OFA (Hao et al., NeurIPS 2023): -((1 + p_t)^gamma - 1) log p_s of the label, -p_t^gamma log p_s of the others.

    The surer the teacher is of the label, the more the label counts. The paper's formula also contains the label's
    cross-entropy. The authors' code adds that to the student's own logits only, and so do we. 1.5 is their example's.
    """
    target = F.one_hot(labels, student.shape[1])
    weights = (F.softmax(teacher, dim=1) + target) ** gamma - target
    return -(weights * F.log_softmax(student, dim=1)).sum(dim=1).mean()


def sdd(
    student: Tensor, teacher: Tensor, labels: Tensor, scales: tuple[int, ...] = (1, 2), beta: float = 2.0
) -> Tensor:
    """Scale decoupled distillation (Wei, Luo and Luo, CVPR 2024) of (B, classes, H, W) maps of logits, with DKD.

    Adds up the losses of all cells at all scales. A cell counts beta-fold if the teacher's class there differs from its
    class for the whole image.
    """
    whole = teacher.mean(dim=(2, 3)).argmax(dim=1)
    total = student.new_zeros(())
    for scale in scales:
        cells_s, cells_t = (
            rearrange(F.adaptive_avg_pool2d(x, scale), "b k h w -> (h w) b k") for x in (student, teacher)
        )
        for s, t in zip(cells_s, cells_t, strict=True):
            other = t.argmax(dim=1) != whole
            for chosen, factor in ((~other, 1.0), (other, beta)):
                if chosen.any():
                    # dkd averages over the images it gets: this is their part of the average over the batch.
                    share = chosen.to(s.dtype).mean()
                    total = total + factor * share * dkd(s[chosen], t[chosen], labels[chosen])
    return total


def cwd(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation (Shu et al., ICCV 2021): T^2 KL of each class's softmax over the positions of a map."""
    log_s, log_t = (F.log_softmax(x.flatten(2) / temperature, dim=2).flatten(0, 1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """PKD (Cao et al., NeurIPS 2022) of (positions, channels): one minus Pearson's correlation, mean of channels."""
    return F.mse_loss(standardise(student, 1e-5), standardise(teacher, 1e-5)) / 2
