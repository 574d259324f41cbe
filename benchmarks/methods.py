"""What the student is taught, beside its labels: each method is a function that makes one loss term.

A method gets a `Setup` and a list to which it appends the modules that are trained with the student and dropped
afterwards, and returns a function of (student's outputs, teacher's outputs, labels). The total loss is the same for
all: `cross_entropy + weight * term`, with the weight that METHODS names.
"""

import ast
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from rsd_loss import DecouplingProjector, RSDLoss, rsd_loss
from rsd_loss.features import dense_pairs, pool
from rsd_loss.reference import standardise


class Outputs(NamedTuple):
    """What a network makes of a batch; maps are (B, C, H, W), token grids (B, N, C)."""

    logits: Tensor  # (B, classes)
    embedding: Tensor  # (B, D), what the classifier sees
    stages: list[Tensor]  # four maps or token grids, first to last; of a cached teacher small maps in float16


class Setup(NamedTuple):
    """What a method may look at to build its modules."""

    student: Outputs  # of some batch, for the widths
    teacher: Outputs
    student_head: nn.Module  # the classifiers
    teacher_head: nn.Module
    kappa: float
    reduction: str


Criterion = Callable[[Tensor, Tensor], Tensor]  # of the projected student's and the teacher's embeddings
Term = Callable[[Outputs, Outputs, Tensor], Tensor]
Build = Callable[[Setup, nn.ModuleList], Term]


# Losses of logits


def kd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of softened logits (Hinton, Vinyals and Dean, 2015); the mean over pixels of maps."""
    if student.ndim == 4:
        student, teacher = (rearrange(x, "b k h w -> (b h w) k") for x in (student, teacher))
    log_s, log_t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def dkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Decoupled KD (Zhao et al., CVPR 2022): alpha * target against the rest + beta * the rest among themselves."""
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
    return temperature**2 * (alpha * tckd + beta * nckd)


def dist_loss(
    student: Tensor, teacher: Tensor, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0
) -> Tensor:
    """DIST (Huang et al., NeurIPS 2022): one minus Pearson's correlation, within samples and within classes."""
    s, t = (F.softmax(x / temperature, dim=1) for x in (student, teacher))

    def distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
        a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=dim).mean()

    return temperature**2 * (beta * distance(s, t, 1) + gamma * distance(s, t, 0))


def ofa_loss(student: Tensor, teacher: Tensor, labels: Tensor, gamma: float = 1.5) -> Tensor:
    """OFA (Hao et al., NeurIPS 2023): -((1 + p_t)^gamma - 1) log p_s of the label, -p_t^gamma log p_s of the others.

    The surer the teacher is of the label, the more it counts. The paper's formula has the label's own cross-entropy in
    it, which the authors' code leaves to the student's own logits alone, as here. 1.5 is the gamma of their example.
    """
    target = F.one_hot(labels, student.shape[1])
    weights = (F.softmax(teacher, dim=1) + target) ** gamma - target
    return -(weights * F.log_softmax(student, dim=1)).sum(dim=1).mean()


def sdd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, scales: tuple[int, ...] = (1, 2), beta: float = 2.0
) -> Tensor:
    """Scale decoupled distillation (Wei, Luo and Luo, CVPR 2024) of (B, classes, H, W) maps of logits, with DKD.

    The sum of the losses of all cells at all scales; a cell in which the teacher sees another class than in the whole
    image is complementary and counts beta-fold.
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
                    # dkd_loss is a mean; what is wanted is these images' part of the mean over the batch.
                    share = chosen.to(s.dtype).mean()
                    total = total + factor * share * dkd_loss(s[chosen], t[chosen], labels[chosen])
    return total


def cwd_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Channel-wise distillation (Shu et al., ICCV 2021): T^2 KL of each class's softmax over the positions of a map."""
    log_s, log_t = (F.log_softmax(x.flatten(2) / temperature, dim=2).flatten(0, 1) for x in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def pkd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """PKD (Cao et al., NeurIPS 2022) of (positions, channels): half the squared error of standardised channels.

    That is one minus Pearson's correlation, averaged over channels.
    """
    return F.mse_loss(standardise(student, 1e-5), standardise(teacher, 1e-5)) / 2


def debiased_loss(student: Tensor, teacher: Tensor, kappa: float, reduction: str = "sum") -> Tensor:
    """RSD whose decorrelation leaves out the products of a sample with itself, as unbiased HSIC and CKA do.

    They are what sum_ij P_ij^2 has left, about D^2 / B, where student and teacher are independent.
    """
    loss = rsd_loss(student, teacher, kappa=0.0, reduction=reduction)
    z_s, z_t = standardise(student, 1e-5), standardise(teacher, 1e-5)
    p = z_t.T @ z_s / len(z_s)
    own = (z_t.square().T @ z_s.square()) / len(z_s) ** 2
    return loss + kappa * _off_diagonal(p.square() - own, reduction)


def relative_loss(student: Tensor, teacher: Tensor, kappa: float, reduction: str = "sum") -> Tensor:
    """RSD whose off-diagonal is to be what the teacher's features have among themselves rather than zero.

    A student equal to its teacher then has a loss of zero at every kappa.
    """
    loss = rsd_loss(student, teacher, kappa=0.0, reduction=reduction)
    z_s, z_t = standardise(student, 1e-5), standardise(teacher, 1e-5)
    apart = z_t.T @ (z_s - z_t) / len(z_s)
    return loss + kappa * _off_diagonal(apart.square(), reduction)


def _off_diagonal(matrix: Tensor, reduction: str) -> Tensor:
    sums = matrix.sum(dim=0) - matrix.diagonal()
    return sums.mean() if reduction == "mean" else sums.sum()


# Methods


def none(setup: Setup, added: nn.ModuleList) -> Term:
    """The student alone."""
    return lambda s, t, y: s.logits.new_zeros(())


def kd(setup: Setup, added: nn.ModuleList) -> Term:
    """Knowledge distillation (Hinton, Vinyals and Dean, 2015), with the T = 4 that is common on CIFAR-100."""
    return lambda s, t, y: kd_loss(s.logits, t.logits)


def dkd(setup: Setup, added: nn.ModuleList) -> Term:
    """Decoupled KD (Zhao et al., CVPR 2022), with the paper's alpha = 1, beta = 8, T = 4."""
    return lambda s, t, y: dkd_loss(s.logits, t.logits, y)


def dist(setup: Setup, added: nn.ModuleList) -> Term:
    """DIST (Huang et al., NeurIPS 2022), with its settings for CIFAR-100: beta = gamma = 2, T = 4."""
    return lambda s, t, y: dist_loss(s.logits, t.logits)


def sdd(setup: Setup, added: nn.ModuleList) -> Term:
    """SD-DKD (Wei, Luo and Luo, CVPR 2024); scales 1 and 2, which the paper takes for similar architectures.

    It needs classifiers that are linear in the average of a map, for then the logits of a cell are those of its
    average. The teacher's map is that of the cache, which may be coarser than the network's own.
    """
    for outputs, head in ((setup.student, setup.student_head), (setup.teacher, setup.teacher_head)):
        last = outputs.stages[-1].float()
        if last.ndim != 4 or not torch.allclose(outputs.logits, head(pool(last)), atol=0.05):
            raise ValueError("sdd needs convolutional networks with global average pooling and a linear classifier")

    def logit_map(head: nn.Module, last: Tensor) -> Tensor:
        return head(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).float()

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        with torch.no_grad():
            target = logit_map(setup.teacher_head, t.stages[-1].float())
        return sdd_loss(logit_map(setup.student_head, s.stages[-1]), target, y)

    return term


def fitnet(setup: Setup, added: nn.ModuleList) -> Term:
    """FitNets' hint (Romero et al., ICLR 2015) on embeddings: squared error after a linear regressor."""
    regressor = nn.Linear(setup.student.embedding.shape[1], setup.teacher.embedding.shape[1])
    added.append(regressor)
    return lambda s, t, y: F.mse_loss(regressor(s.embedding).float(), t.embedding)


def cwd(setup: Setup, added: nn.ModuleList) -> Term:
    """Channel-wise distillation (Shu et al., ICCV 2021) of maps of logits, with the paper's T = 4."""
    return lambda s, t, y: cwd_loss(s.logits, t.logits)


def fitnet_map(setup: Setup, added: nn.ModuleList) -> Term:
    """FitNets' hint (Romero et al., ICLR 2015) on last maps: squared error after a convolution of 1 x 1."""
    return _of_positions(setup, added, F.mse_loss)


def pkd(setup: Setup, added: nn.ModuleList) -> Term:
    """PKD (Cao et al., NeurIPS 2022) on last maps, after a convolution of 1 x 1 where the channels differ."""
    return _of_positions(setup, added, pkd_loss)


def ofa(setup: Setup, added: nn.ModuleList) -> Term:
    """OFA-KD (Hao et al., NeurIPS 2023): the OFA loss on the logits and on those of all four stages' projectors."""
    projectors = _ofa_projectors(setup, added)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        branches = [projector(stage).float() for projector, stage in zip(projectors, s.stages, strict=True)]
        return torch.stack([ofa_loss(logits, t.logits, y) for logits in (*branches, s.logits)]).sum()

    return term


def rsd(setup: Setup, added: nn.ModuleList, criterion: Criterion | None = None, gather: bool = False) -> Term:
    """Redundancy suppression distillation (Zhang et al., ICCV 2025); with another criterion its variants.

    `gather` takes the statistics over the batches of all processes, which the authors do not.
    """
    return _projected(setup, added, _embedding, _embedding, criterion or _criterion(setup, gather))


def rsd_noproj(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD without the decoupling projector; where the widths differ, with the linear map that it then takes."""
    width, target = setup.student.embedding.shape[1], setup.teacher.embedding.shape[1]
    align = nn.Identity() if width == target else nn.Linear(width, target, bias=False)
    added.append(align)
    criterion = _criterion(setup)
    return lambda s, t, y: criterion(align(s.embedding), t.embedding)


def rsd_logits(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD between the logits, whose widths agree and which need no projector."""
    criterion = _criterion(setup)
    return lambda s, t, y: criterion(s.logits, t.logits)


def rsd_wide(setup: Setup, added: nn.ModuleList, width: int = 1024) -> Term:
    """RSD under a teacher whose embedding is spread over `width` features without a change in what it knows.

    A fixed random map takes the embedding to 64 features, a second one, which keeps lengths and angles, to `width`.
    So teachers of all widths see the same distances between samples.
    """
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(setup.teacher.embedding.shape[1], 64, generator=generator)
    up = torch.linalg.qr(torch.randn(width, 64, generator=generator)).Q.T
    spread = (down @ up).to(setup.teacher.embedding.device)
    return _projected(setup, added, _embedding, lambda x: x.embedding @ spread)


def rsd_stages(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD, and the mean of RSD over the pooled intermediate stages."""
    last = rsd(setup, added)
    terms = [
        _projected(setup, added, lambda x, i=i: pool(x.stages[i]), lambda x, i=i: pool(x.stages[i].float()))
        for i in range(len(setup.teacher.stages) - 1)
    ]
    return lambda s, t, y: last(s, t, y) + torch.stack([term(s, t, y) for term in terms]).mean()


def rsd_dense(
    setup: Setup,
    added: nn.ModuleList,
    pooled: float = 1.0,
    dense: float = 1.0,
    kappa: float | None = None,
    student_stage: int = 4,
    teacher_stage: int = 4,
    side: int = 16,
    share: float = 1.0,
    centred: bool = False,
) -> Term:
    """RSD, and RSD with every position of a map as a sample.

    Args:
        setup: See `Setup`.
        added: The projectors are appended.
        pooled: Factor of the term on embeddings.
        dense: Factor of the term on positions.
        kappa: Of the term on positions; None stands for that of the other.
        student_stage: 1 to 4.
        teacher_stage: 1 to 4.
        side: Maps larger than side x side are averaged down to it.
        share: Of the positions that are taken, at random in each step.
        centred: Takes from the teacher's every position its mean over the batch, which is all that a position alone
            tells.
    """
    last = rsd(setup, added)

    def rows(s: Outputs, t: Outputs) -> tuple[Tensor, Tensor]:
        student, teacher = as_map(s.stages[student_stage - 1]), as_map(t.stages[teacher_stage - 1]).float()
        if centred:
            teacher = teacher - teacher.mean(dim=0)
        return dense_pairs(*(down_to(x, (side, side)) for x in (student, teacher)), channels_last=False)

    student, teacher = rows(setup.student, setup.teacher)
    projector = DecouplingProjector(student.shape[1], teacher.shape[1])
    added.append(projector)
    criterion = RSDLoss(setup.kappa if kappa is None else kappa, reduction=setup.reduction)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        student, teacher = rows(s, t)
        if share < 1:
            taken = torch.randperm(len(student))[: round(share * len(student))].to(student.device)
            student, teacher = student[taken], teacher[taken]
        return pooled * last(s, t, y) + dense * criterion(projector(student), teacher)

    return term


def rsd_debiased(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD with the debiased decorrelation."""
    return rsd(setup, added, partial(debiased_loss, kappa=setup.kappa, reduction=setup.reduction))


def rsd_relative(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD with a decorrelation towards the teacher's own correlation."""
    return rsd(setup, added, partial(relative_loss, kappa=setup.kappa, reduction=setup.reduction))


def rsd_balanced(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD scaled in every step so that its gradient at the embedding is as long as that of the cross-entropy."""
    term = rsd(setup, added)

    def balanced(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        loss = term(s, t, y)
        ours, theirs = (
            torch.autograd.grad(x, s.embedding, retain_graph=True)[0].float().norm()
            for x in (loss, F.cross_entropy(s.logits, y))
        )
        return loss * (theirs / ours)

    return balanced


def ofa_rsd(setup: Setup, added: nn.ModuleList) -> Term:
    """OFA's framework with RSD for its losses: RSD between the teacher's logits and those of stages and student."""
    projectors, criterion = _ofa_projectors(setup, added), _criterion(setup)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        branches = [projector(stage).float() for projector, stage in zip(projectors, s.stages, strict=True)]
        return torch.stack([criterion(logits, t.logits) for logits in (*branches, s.logits)]).sum()

    return term


def cwd_rsd_dense(
    setup: Setup,
    added: nn.ModuleList,
    cwd: float = 3.0,
    dense: float = 0.3,
    student_stage: int = 4,
    teacher_stage: int = 3,
) -> Term:
    """CWD, and RSD of positions alone, with the factors `cwd` and `dense`."""
    ours = f"rsd_dense:pooled=0.0,student_stage={student_stage},teacher_stage={teacher_stage}"
    return together(setup, added, {"cwd": cwd, ours: dense})


def together(setup: Setup, added: nn.ModuleList, weights: dict[str, float]) -> Term:
    """The terms of several methods, of which `weights` has the names, with settings, and the weights."""
    terms = [(weight, method_named(name).build(setup, added)) for name, weight in weights.items()]
    return lambda s, t, y: torch.stack([weight * term(s, t, y) for weight, term in terms]).sum()


def _criterion(setup: Setup, gather: bool = False) -> RSDLoss:
    return RSDLoss(setup.kappa, reduction=setup.reduction, gather_distributed=gather)


def _projected(
    setup: Setup,
    added: nn.ModuleList,
    of_student: Callable[[Outputs], Tensor],
    of_teacher: Callable[[Outputs], Tensor],
    criterion: Criterion | None = None,
) -> Term:
    """RSD, or another criterion, of one pair of embeddings behind a decoupling projector."""
    widths = of_student(setup.student).shape[1], of_teacher(setup.teacher).shape[1]
    projector, criterion = DecouplingProjector(*widths), criterion or _criterion(setup)
    added.append(projector)
    return lambda s, t, y: criterion(projector(of_student(s)), of_teacher(t))


def _of_positions(setup: Setup, added: nn.ModuleList, loss: Criterion) -> Term:
    """A loss of all positions of both last maps, behind a linear map of the student's features."""

    def rows(s: Outputs, t: Outputs) -> tuple[Tensor, Tensor]:
        return dense_pairs(as_map(s.stages[-1]), as_map(t.stages[-1]).float(), channels_last=False)

    student, teacher = rows(setup.student, setup.teacher)
    regressor = nn.Linear(student.shape[1], teacher.shape[1])
    added.append(regressor)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        student, teacher = rows(s, t)
        return loss(regressor(student).float(), teacher)

    return term


def _embedding(x: Outputs) -> Tensor:
    return x.embedding


def as_map(x: Tensor) -> Tensor:
    """(B, C, H, W) of a map as it is, or of tokens in a square."""
    return x if x.ndim == 4 else rearrange(x, "b (h w) c -> b c h w", h=math.isqrt(x.shape[1]))


def down_to(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map averaged down to a grid where it is larger."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], grid[0]), min(x.shape[3], grid[1])))


# OFA's stage projectors


def _ofa_projectors(setup: Setup, added: nn.ModuleList) -> list[nn.Module]:
    first, last = (x.shape[2] if x.ndim == 4 else math.isqrt(x.shape[1]) for x in setup.student.stages[::3])
    side = last if first > last else max(1, last // 2)  # a network that keeps its grid gives half of it
    widths = (setup.student.embedding.shape[1], setup.teacher.embedding.shape[1])
    projectors = [
        ofa_projector(stage.shape[1:], i, widths, setup.student.logits.shape[1], side)
        for i, stage in enumerate(setup.student.stages)
    ]
    added.extend(projectors)
    return projectors


def ofa_projector(
    shape: tuple[int, ...], stage: int, widths: tuple[int, int], classes: int, side: int, heads: int = 4
) -> nn.Module:
    """From one stage of the student to logits; as the paper has it, of separable convolutions or attention.

    Args:
        shape: (C, H, W) of a map, (N, C) of tokens.
        stage: 0 to 3; a later stage needs fewer blocks.
        widths: Of the student's and the teacher's embedding.
        classes: Width of the logits.
        side: Side of the grid down to which a projector halves its input; 7 for images of 224 x 224.
        heads: Of the attention.
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
            layers.append(MergePatches(width, widths[0]))
            width, grid = widths[0], grid // 2
        layers += [Block(width, heads) for _ in range(max(3 - stage, 1))]
        layers.append(MeanOfTokens())
    return nn.Sequential(*layers, nn.Linear(width, classes))


def _separable(width: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
        nn.Conv2d(width, out, 1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )


class MergePatches(nn.Module):
    """Four neighbouring tokens of a square grid into one."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, out, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        side = math.isqrt(tokens.shape[1])
        merged = rearrange(tokens, "b (h y w x) c -> b (h w) (y x c)", h=side // 2, w=side // 2, y=2, x=2)
        return self.reduction(self.norm(merged))


class MeanOfTokens(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens.mean(dim=1)


class Method(NamedTuple):
    build: Build
    weight: float
    warmup: float = 0.0  # share of the run over which the weight grows linearly to its value
    kappa: float | None = None  # 0 stays 0


def method_named(text: str) -> Method:
    """Of a name, or of a name with settings of its own: `rsd_dense:side=4,kappa=0.0`.

    Raises:
        ValueError: There is no such method, or it has no such setting.
    """
    name, _, settings = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    found = METHODS[name]
    known = [key for key in inspect.signature(found.build).parameters if key not in ("setup", "added", "criterion")]
    chosen = {}
    for setting in settings.split(",") if settings else ():
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}: it has {', '.join(known) or 'none'}")
        try:
            chosen[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{name} has no value for {key!r} in {value!r}: write a number") from error
    return found._replace(build=partial(found.build, **chosen))


# The papers' weights, for a cross-entropy of weight 1. KD's is its usual 0.9 to 0.1; FitNets' that of the usual
# comparisons on CIFAR-100. A warm-up is as long in proportion as in the paper's 240 epochs.
METHODS = {
    "none": Method(none, 0.0),
    "kd": Method(kd, 9.0),
    "dkd": Method(dkd, 1.0, warmup=20 / 240),
    "dist": Method(dist, 1.0),
    "cwd": Method(cwd, 3.0),
    "fitnet": Method(fitnet, 100.0),
    "fitnet_map": Method(fitnet_map, 1.0),
    "pkd": Method(pkd, 10.0),
    "ofa": Method(ofa, 1.0),
    "rsd": Method(rsd, 0.1, kappa=0.01),
    "rsd_kappa0": Method(rsd, 0.1, kappa=0.0),
    "rsd_noproj": Method(rsd_noproj, 0.1, kappa=0.01),
    "rsd_logits": Method(rsd_logits, 0.1, kappa=0.01),
    "rsd_stages": Method(rsd_stages, 0.1, kappa=0.01),
    "rsd_dense": Method(rsd_dense, 0.1, kappa=0.01),
    "rsd_wide": Method(rsd_wide, 0.1, kappa=0.01),
    "rsd_debiased": Method(rsd_debiased, 0.1, kappa=0.01),
    "rsd_relative": Method(rsd_relative, 0.1, kappa=0.01),
    "rsd_balanced": Method(rsd_balanced, 1.0, kappa=0.01),
    "kd_rsd": Method(partial(together, weights={"kd": 9.0, "rsd": 0.1}), 1.0, kappa=0.01),
    "dist_rsd": Method(partial(together, weights={"dist": 1.0, "rsd": 0.1}), 1.0, kappa=0.01),
    "cwd_rsd_dense": Method(cwd_rsd_dense, 1.0, kappa=0.01),
    "ofa_rsd": Method(ofa_rsd, 0.1, kappa=0.01),
    "sdd": Method(sdd, 1.0, warmup=30 / 240),
}
