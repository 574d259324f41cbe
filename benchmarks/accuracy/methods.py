"""What the student is taught beside its labels. Each method is a function that builds one loss term.

A method gets a `Setup` and a list. It appends the modules to train with the student and to drop afterwards, and returns
a function of (student's outputs, teacher's outputs, labels). The total loss is the same for all methods:
`cross_entropy + weight * term`, with the weight from METHODS.
"""

import ast
import inspect
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy import losses, ofa
from benchmarks.accuracy.networks import Outputs, as_map, down_to
from rsd_loss import DecouplingProjector, RSDLoss
from rsd_loss.features import dense_pairs, pool


class Setup(NamedTuple):
    """What a method may look at to build its modules."""

    student: Outputs  # of some batch, for the widths
    teacher: Outputs
    student_head: nn.Module  # the classifiers
    teacher_head: nn.Module
    kappa: float
    reduction: str


Term = Callable[[Outputs, Outputs, Tensor], Tensor]
Build = Callable[[Setup, nn.ModuleList], Term]


# On logits


def none(setup: Setup, added: nn.ModuleList) -> Term:
    """The student alone."""
    return lambda s, t, y: s.logits.new_zeros(())


def kd(setup: Setup, added: nn.ModuleList) -> Term:
    """Knowledge distillation, with the T = 4 that is common on CIFAR-100."""
    return lambda s, t, y: losses.kd(s.logits, t.logits)


def dkd(setup: Setup, added: nn.ModuleList) -> Term:
    """Decoupled KD, with the paper's alpha = 1, beta = 8, T = 4."""
    return lambda s, t, y: losses.dkd(s.logits, t.logits, y)


def dist(setup: Setup, added: nn.ModuleList) -> Term:
    """DIST, with its settings for CIFAR-100: beta = gamma = 2, T = 4."""
    return lambda s, t, y: losses.dist(s.logits, t.logits)


def cwd(setup: Setup, added: nn.ModuleList) -> Term:
    """Channel-wise distillation of maps of logits, with the paper's T = 4."""
    return lambda s, t, y: losses.cwd(s.logits, t.logits)


def sdd(setup: Setup, added: nn.ModuleList) -> Term:
    """SD-DKD at scales 1 and 2, which the paper takes for similar architectures.

    The logits of a cell are those of its average, so the classifiers must be linear in the average of a map. The
    teacher's map comes from the cache and may be coarser than the network's own.
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
        return losses.sdd(logit_map(setup.student_head, s.stages[-1]), target, y)

    return term


def rsd_logits(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD between the logits. Their widths agree, so they need no projector."""
    criterion = _criterion(setup)
    return lambda s, t, y: criterion(s.logits, t.logits)


# On embeddings


def fitnet(setup: Setup, added: nn.ModuleList) -> Term:
    """FitNets' hint (Romero et al., ICLR 2015): squared error after a linear regressor."""
    regressor = nn.Linear(setup.student.embedding.shape[1], setup.teacher.embedding.shape[1])
    added.append(regressor)
    return lambda s, t, y: F.mse_loss(regressor(s.embedding).float(), t.embedding)


def rsd(setup: Setup, added: nn.ModuleList, gather: bool = False) -> Term:
    """Redundancy suppression distillation (Zhang et al., ICCV 2025).

    `gather` takes the statistics over the batches of all processes. The authors do not.
    """
    return _projected(setup, added, _embedding, _embedding, gather)


def rsd_noproj(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD without the decoupling projector: a linear map where the widths differ, else nothing."""
    width, target = setup.student.embedding.shape[1], setup.teacher.embedding.shape[1]
    align = nn.Identity() if width == target else nn.Linear(width, target, bias=False)
    added.append(align)
    criterion = _criterion(setup)
    return lambda s, t, y: criterion(align(s.embedding), t.embedding)


def rsd_wide(setup: Setup, added: nn.ModuleList, width: int = 1024) -> Term:
    """RSD under a teacher with the same information in `width` features.

    A fixed random map takes the embedding to 64 features. A second one, which keeps lengths and angles, takes these to
    `width`. So all widths have the same distances between samples.
    """
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(setup.teacher.embedding.shape[1], 64, generator=generator)
    up = torch.linalg.qr(torch.randn(width, 64, generator=generator)).Q.T
    spread = (down @ up).to(setup.teacher.embedding.device)
    return _projected(setup, added, _embedding, lambda x: x.embedding @ spread)


# On stages and positions


def rsd_stages(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD, and the mean of RSD over the pooled intermediate stages."""
    last = rsd(setup, added)
    terms = [
        _projected(setup, added, lambda x, i=i: pool(x.stages[i]), lambda x, i=i: pool(x.stages[i].float()))
        for i in range(len(setup.teacher.stages) - 1)
    ]
    return lambda s, t, y: last(s, t, y) + torch.stack([term(s, t, y) for term in terms]).mean()


def rsd_dense(
    setup: Setup, added: nn.ModuleList, pooled: float = 1.0, student_stage: int = 4, teacher_stage: int = 4
) -> Term:
    """RSD times `pooled`, and RSD with every position of a stage (1 to 4) as a sample, on 16 x 16 positions at most."""
    last = rsd(setup, added)

    def rows(s: Outputs, t: Outputs) -> tuple[Tensor, Tensor]:
        return _positions(s.stages[student_stage - 1], t.stages[teacher_stage - 1], (16, 16))

    student, teacher = rows(setup.student, setup.teacher)
    projector, criterion = DecouplingProjector(student.shape[1], teacher.shape[1]), _criterion(setup)
    added.append(projector)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        student, teacher = rows(s, t)
        return pooled * last(s, t, y) + criterion(projector(student), teacher)

    return term


def fitnet_map(setup: Setup, added: nn.ModuleList) -> Term:
    """FitNets' hint on last maps: squared error after a convolution of 1 x 1."""
    return _regressed(setup, added, F.mse_loss)


def pkd(setup: Setup, added: nn.ModuleList) -> Term:
    """PKD on last maps, after a convolution of 1 x 1."""
    return _regressed(setup, added, losses.pkd)


# OFA, and sums


def ofa_kd(setup: Setup, added: nn.ModuleList) -> Term:
    """OFA-KD (Hao et al., NeurIPS 2023): the OFA loss on the logits and on those of all four stages' projectors."""
    return _on_branches(setup, added, losses.ofa)


def ofa_rsd(setup: Setup, added: nn.ModuleList) -> Term:
    """OFA's framework with RSD for its losses: RSD between the teacher's logits and those of stages and student."""
    criterion = _criterion(setup)
    return _on_branches(setup, added, lambda s, t, y: criterion(s, t))


def cwd_rsd_dense(
    setup: Setup,
    added: nn.ModuleList,
    cwd: float = 3.0,
    dense: float = 0.3,
    student_stage: int = 4,
    teacher_stage: int = 3,
) -> Term:
    """CWD and the dense term alone, with the factors `cwd` and `dense`."""
    ours = f"rsd_dense:pooled=0.0,student_stage={student_stage},teacher_stage={teacher_stage}"
    return together(setup, added, {"cwd": cwd, ours: dense})


def together(setup: Setup, added: nn.ModuleList, weights: dict[str, float]) -> Term:
    """The weighted sum of several methods."""
    terms = [(weight, method_named(name).build(setup, added)) for name, weight in weights.items()]
    return lambda s, t, y: torch.stack([weight * term(s, t, y) for weight, term in terms]).sum()


def _criterion(setup: Setup, gather: bool = False) -> RSDLoss:
    return RSDLoss(kappa=setup.kappa, reduction=setup.reduction, gather_distributed=gather)


def _embedding(x: Outputs) -> Tensor:
    return x.embedding


def _projected(
    setup: Setup,
    added: nn.ModuleList,
    of_student: Callable[[Outputs], Tensor],
    of_teacher: Callable[[Outputs], Tensor],
    gather: bool = False,
) -> Term:
    """RSD of one pair of embeddings behind a decoupling projector."""
    widths = of_student(setup.student).shape[1], of_teacher(setup.teacher).shape[1]
    projector, criterion = DecouplingProjector(*widths), _criterion(setup, gather)
    added.append(projector)
    return lambda s, t, y: criterion(projector(of_student(s)), of_teacher(t))


def _positions(student: Tensor, teacher: Tensor, grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Two maps or token grids as rows, averaged down to the grid first."""
    maps = as_map(student), as_map(teacher).float()
    return dense_pairs(*(down_to(x, grid) if grid else x for x in maps), channels_last=False)


def _regressed(setup: Setup, added: nn.ModuleList, loss: Callable[[Tensor, Tensor], Tensor]) -> Term:
    """A loss of all positions of both last maps, after a linear map of the student's features."""
    student, teacher = _positions(setup.student.stages[-1], setup.teacher.stages[-1])
    regressor = nn.Linear(student.shape[1], teacher.shape[1])
    added.append(regressor)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        student, teacher = _positions(s.stages[-1], t.stages[-1])
        return loss(regressor(student).float(), teacher)

    return term


def _on_branches(setup: Setup, added: nn.ModuleList, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Term:
    """A loss of the student's logits and of those that OFA's projectors make of its stages."""
    projectors = ofa.projectors(setup.student, setup.teacher)
    added.extend(projectors)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        branches = [projector(stage).float() for projector, stage in zip(projectors, s.stages, strict=True)]
        return torch.stack([loss(logits, t.logits, y) for logits in (*branches, s.logits)]).sum()

    return term


class Method(NamedTuple):
    build: Build
    weight: float
    warmup: float = 0.0  # the weight grows linearly over this share of the run
    kappa: float | None = None  # 0 stays 0


def method_named(text: str) -> Method:
    """From a name, or a name with settings: `rsd_dense:pooled=0.0,teacher_stage=3`.

    Raises:
        ValueError: There is no such method, or it has no such setting.
    """
    name, _, settings = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    found = METHODS[name]
    known = [key for key in inspect.signature(found.build).parameters if key not in ("setup", "added")]
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


# The papers' weights, for a cross-entropy of weight 1. KD's is its usual 0.9 to 0.1. FitNets' is that of the usual
# comparisons on CIFAR-100. A warm-up has the same share of the run as in the paper's 240 epochs.
METHODS = {
    "none": Method(none, 0.0),
    "kd": Method(kd, 9.0),
    "dkd": Method(dkd, 1.0, warmup=20 / 240),
    "dist": Method(dist, 1.0),
    "cwd": Method(cwd, 3.0),
    "fitnet": Method(fitnet, 100.0),
    "fitnet_map": Method(fitnet_map, 1.0),
    "pkd": Method(pkd, 10.0),
    "ofa": Method(ofa_kd, 1.0),
    "sdd": Method(sdd, 1.0, warmup=30 / 240),
    "rsd": Method(rsd, 0.1, kappa=0.01),
    "rsd_kappa0": Method(rsd, 0.1, kappa=0.0),
    "rsd_noproj": Method(rsd_noproj, 0.1, kappa=0.01),
    "rsd_logits": Method(rsd_logits, 0.1, kappa=0.01),
    "rsd_stages": Method(rsd_stages, 0.1, kappa=0.01),
    "rsd_dense": Method(rsd_dense, 0.1, kappa=0.01),
    "rsd_wide": Method(rsd_wide, 0.1, kappa=0.01),
    "kd_rsd": Method(partial(together, weights={"kd": 9.0, "rsd": 0.1}), 1.0, kappa=0.01),
    "dist_rsd": Method(partial(together, weights={"dist": 1.0, "rsd": 0.1}), 1.0, kappa=0.01),
    "cwd_rsd_dense": Method(cwd_rsd_dense, 1.0, kappa=0.01),
    "ofa_rsd": Method(ofa_rsd, 0.1, kappa=0.01),
}
