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


Term = Callable[[Outputs, Outputs, Tensor], Tensor]
Build = Callable[[Setup, nn.ModuleList], Term]
Rows = Callable[[Outputs, Outputs], tuple[Tensor, Tensor]]  # (samples, features) from student and teacher
Loss = Callable[..., Tensor]


def embeddings(s: Outputs, t: Outputs) -> tuple[Tensor, Tensor]:
    return s.embedding, t.embedding


def positions(s: Outputs, t: Outputs, student_stage: int = 4, teacher_stage: int = 4) -> tuple[Tensor, Tensor]:
    """Every position of a stage (1 to 4) as a sample, on 16 x 16 positions at most."""
    maps = as_map(s.stages[student_stage - 1]), as_map(t.stages[teacher_stage - 1]).float()
    return dense_pairs(*(down_to(x, (16, 16)) for x in maps), channels_last=False)


# Other methods


def on_logits(loss: Loss) -> Build:
    return lambda setup, added: lambda s, t, y: loss(s.logits, t.logits, y)


def regressed(loss: Loss, rows: Rows) -> Build:
    """A loss of rows, after a linear map of the student's features."""

    def build(setup: Setup, added: nn.ModuleList) -> Term:
        regressor = nn.Linear(*(x.shape[1] for x in rows(setup.student, setup.teacher)))
        added.append(regressor)

        def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
            student, teacher = rows(s, t)
            return loss(regressor(student).float(), teacher)

        return term

    return build


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


def on_branches(setup: Setup, added: nn.ModuleList, loss: Loss) -> Term:
    """A loss of the student's logits and of those that OFA's projectors make of its stages."""
    projectors = ofa.projectors(setup.student, setup.teacher)
    added.extend(projectors)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        branches = [projector(stage).float() for projector, stage in zip(projectors, s.stages, strict=True)]
        return torch.stack([loss(logits, t.logits, y) for logits in (*branches, s.logits)]).sum()

    return term


# RSD and its variants


def criterion(setup: Setup, gather: bool = False) -> RSDLoss:
    return RSDLoss(kappa=setup.kappa, gather_distributed=gather)


def projected(setup: Setup, added: nn.ModuleList, rows: Rows, gather: bool = False) -> Term:
    """RSD of rows behind a decoupling projector."""
    projector = DecouplingProjector(*(x.shape[1] for x in rows(setup.student, setup.teacher)))
    loss = criterion(setup, gather)
    added.append(projector)

    def term(s: Outputs, t: Outputs, y: Tensor) -> Tensor:
        student, teacher = rows(s, t)
        return loss(projector(student), teacher)

    return term


def rsd(setup: Setup, added: nn.ModuleList, gather: bool = False) -> Term:
    """The paper's method. `gather` takes the statistics over all processes, which the authors do not."""
    return projected(setup, added, embeddings, gather)


def rsd_noproj(setup: Setup, added: nn.ModuleList) -> Term:
    """Without the projector: a linear map where the widths differ, else nothing."""
    width, target = (x.shape[1] for x in embeddings(setup.student, setup.teacher))
    align = nn.Identity() if width == target else nn.Linear(width, target, bias=False)
    added.append(align)
    loss = criterion(setup)
    return lambda s, t, y: loss(align(s.embedding), t.embedding)


def rsd_logits(setup: Setup, added: nn.ModuleList) -> Term:
    """Between the logits. Their widths agree, so they need no projector."""
    loss = criterion(setup)
    return lambda s, t, y: loss(s.logits, t.logits)


def rsd_stages(setup: Setup, added: nn.ModuleList) -> Term:
    """RSD, and the mean of RSD over the pooled intermediate stages."""
    last = rsd(setup, added)
    terms = [
        projected(setup, added, lambda s, t, i=i: (pool(s.stages[i]), pool(t.stages[i].float())))
        for i in range(len(setup.teacher.stages) - 1)
    ]
    return lambda s, t, y: last(s, t, y) + torch.stack([term(s, t, y) for term in terms]).mean()


def rsd_dense(
    setup: Setup, added: nn.ModuleList, pooled: float = 1.0, student_stage: int = 4, teacher_stage: int = 4
) -> Term:
    """RSD times `pooled`, and RSD with every position of a stage as a sample."""
    last = rsd(setup, added)
    dense = projected(setup, added, partial(positions, student_stage=student_stage, teacher_stage=teacher_stage))
    return lambda s, t, y: pooled * last(s, t, y) + dense(s, t, y)


def ofa_rsd(setup: Setup, added: nn.ModuleList) -> Term:
    """OFA's framework with RSD in place of OFA's losses."""
    loss = criterion(setup)
    return on_branches(setup, added, lambda s, t, y: loss(s, t))


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


class Method(NamedTuple):
    build: Build
    weight: float
    warmup: float = 0.0  # the weight grows linearly over this share of the run
    kappa: float | None = None  # 0 stays 0


# The papers' weights, for a cross-entropy of weight 1. KD's is its usual 0.9 to 0.1. FitNets' is that of the usual
# comparisons on CIFAR-100. A warm-up has the same share of the run as in the paper's 240 epochs.
METHODS = {
    "none": Method(on_logits(lambda s, t, y: s.new_zeros(())), 0.0),
    "kd": Method(on_logits(lambda s, t, y: losses.kd(s, t)), 9.0),
    "dkd": Method(on_logits(losses.dkd), 1.0, warmup=20 / 240),
    "dist": Method(on_logits(lambda s, t, y: losses.dist(s, t)), 1.0),
    "cwd": Method(on_logits(lambda s, t, y: losses.cwd(s, t)), 3.0),
    "sdd": Method(sdd, 1.0, warmup=30 / 240),
    "ofa": Method(partial(on_branches, loss=losses.ofa), 1.0),
    # FitNets (Romero et al., ICLR 2015): the squared error of embeddings, or of last maps.
    "fitnet": Method(regressed(F.mse_loss, embeddings), 100.0),
    "fitnet_map": Method(regressed(F.mse_loss, positions), 1.0),
    "pkd": Method(regressed(losses.pkd, positions), 10.0),
    "rsd": Method(rsd, 0.1, kappa=0.01),
    "rsd_kappa0": Method(rsd, 0.1, kappa=0.0),
    "rsd_noproj": Method(rsd_noproj, 0.1, kappa=0.01),
    "rsd_logits": Method(rsd_logits, 0.1, kappa=0.01),
    "rsd_stages": Method(rsd_stages, 0.1, kappa=0.01),
    "rsd_dense": Method(rsd_dense, 0.1, kappa=0.01),
    "kd_rsd": Method(partial(together, weights={"kd": 9.0, "rsd": 0.1}), 1.0, kappa=0.01),
    "dist_rsd": Method(partial(together, weights={"dist": 1.0, "rsd": 0.1}), 1.0, kappa=0.01),
    "cwd_rsd_dense": Method(cwd_rsd_dense, 1.0, kappa=0.01),
    "ofa_rsd": Method(ofa_rsd, 0.1, kappa=0.01),
}


def method_named(text: str) -> Method:
    """From a name, or a name with settings: `rsd_dense:pooled=0.0,teacher_stage=3`."""
    name, _, settings = text.partition(":")
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    found = METHODS[name]
    pairs = (setting.partition("=") for setting in settings.split(",") if setting)
    try:
        chosen = {key: ast.literal_eval(value) for key, _, value in pairs}
        inspect.signature(found.build).bind(None, None, **chosen)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"{name} has no such settings as {settings!r}: {error}") from error
    return found._replace(build=partial(found.build, **chosen))
