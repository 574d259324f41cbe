"""gather_distributed: every process gets the loss of all rows, and its part of that loss's gradient.

The truth is the loss of the concatenated rows in one process, which each process computes for itself.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from conftest import pair, upstream
from test_modes import check_whatever_is_kept
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from rsd_loss import DecouplingProjector, RSDLoss, cross_correlation, rsd_loss

IMPLEMENTATIONS = ("reference", "fused")
# Rows of each process, and features: tall and wide, D = B and one more, uneven, processes with one row, with no feature
# to share but one, features that do not divide, a batch streamed in blocks beside one that is not.
SHARES = [
    ((8, 8), 6),
    ((3, 3), 40),
    ((4, 4), 8),
    ((4, 4), 9),
    ((5, 1, 7), 5),
    ((1, 1, 1), 5),
    ((1, 2, 1), 3),
    ((2, 1), 1),
    ((9, 1, 2, 5), 7),
    ((2, 1, 1, 3), 50),
    ((1, 1, 1, 1), 6),
    ((1500, 3, 1100), 4),
]


def own(rank, rows, x):
    """This process's rows of a whole batch, as a leaf."""
    return x.detach().split(rows)[rank].clone().requires_grad_(x.requires_grad)


def gathered(group, **settings):
    return RSDLoss(gather_distributed=True, process_group=group, **settings)


def loss_and_gradients(rank, group, rows, features, implementation, reduction):
    student, teacher = (x.requires_grad_() for x in pair(sum(rows), features))
    settings = {"kappa": 0.1, "reduction": reduction, "return_terms": True}
    want, want_terms = rsd_loss(student, teacher, implementation="reference", **settings)
    # A loss weighted differently in each process: the gradient is that of the sum of all processes' losses.
    weights = [upstream(want.shape, want.dtype, seed=r) for r in range(len(rows))]
    want_grads = torch.autograd.grad(want, (student, teacher), sum(weights))

    ours = [own(rank, rows, x) for x in (student, teacher)]
    criterion = gathered(group, implementation=implementation, **settings)
    got, terms = criterion(*ours)
    grads = torch.autograd.grad(got, ours, weights[rank], retain_graph=True)
    assert_close([got, *terms], [want, *want_terms], rtol=1e-9, atol=1e-9)
    assert_close(grads, tuple(own(rank, rows, x) for x in want_grads), rtol=1e-9, atol=1e-9)
    assert_close(torch.autograd.grad(got, ours, weights[rank]), grads, rtol=0, atol=0)
    with torch.no_grad():
        assert_close(criterion(*ours)[0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "features"), SHARES, ids=str)
def test_loss_and_gradients(pool, rows, features, implementation, reduction):
    pool.run(len(rows), loss_and_gradients, rows, features, implementation, reduction)


def precision(rank, group, rows, features, implementation, dtype, offset):
    """|ours - fp64| <= |plain formula in one process, same dtype - fp64| + tolerance."""
    student, teacher = ((x + offset).to(dtype) for x in pair(sum(rows), features))
    student.requires_grad_()
    results = []
    for x, criterion in (
        (student.detach().double().requires_grad_(), RSDLoss(implementation="reference")),
        (student, RSDLoss(implementation="reference")),
        (own(rank, rows, student), gathered(group, implementation=implementation)),
    ):
        t = own(rank, rows, teacher) if criterion.gather_distributed else teacher.to(x.dtype)
        value = criterion(x, t)
        # Large enough to keep float16 gradients normal, and not so large that the plain formula's overflow.
        scale = 1024 / len(rows) if criterion.gather_distributed else 1024
        (grad,) = torch.autograd.grad(value, x, torch.tensor(scale, dtype=value.dtype))
        results.append((value, grad if len(grad) == rows[rank] else own(rank, rows, grad)))
    # Eight units of the largest: another order of rounding may err by a little more than the formula does.
    unit = 8 * torch.finfo(dtype).eps
    for want, allowed, got in zip(*results, strict=True):
        assert got.dtype == allowed.dtype
        assert got.isfinite().all()
        error, allowed = ((x.double() - want).abs().max().item() for x in (got, allowed))
        assert error <= allowed + unit * want.abs().max().item(), (error, allowed)


@pytest.mark.parametrize("offset", [0, 1000])  # deviations of about 1: a mean in float32 keeps 4 digits of them
@pytest.mark.parametrize(("dtype", "implementation"), [(torch.float32, "fused"), (torch.float32, "triton")], ids=str)
@pytest.mark.parametrize(("rows", "features"), [((40, 8, 20), 16), ((4, 9), 40)], ids=str)
def test_precision(pool, rows, features, implementation, dtype, offset):
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    pool.run(len(rows), precision, rows, features, implementation, dtype, offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "features"), [((40, 8, 20), 16), ((4, 9), 40)], ids=str)
def test_half_precision(pool, rows, features, implementation, dtype):
    pool.run(len(rows), precision, rows, features, implementation, dtype, 0)


def triton(rank, group, rows, features):
    student, teacher = pair(sum(rows), features)
    want = rsd_loss(student.requires_grad_(), teacher, kappa=0.1, reduction="none", implementation="reference")
    weights = [upstream(want.shape, want.dtype, seed=r) for r in range(len(rows))]
    (want_grad,) = torch.autograd.grad(want, student, sum(weights))
    ours = [own(rank, rows, x).detach().float() for x in (student, teacher)]
    got = gathered(group, implementation="triton", kappa=0.1, reduction="none")(ours[0].requires_grad_(), ours[1])
    assert_close(got.double(), want, rtol=1e-5, atol=1e-5)  # float32
    (grad,) = torch.autograd.grad(got, ours[0], weights[rank].float())
    assert_close(grad.double(), own(rank, rows, want_grad), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        got = gathered(group, implementation="triton", kappa=0.1, reduction="none")(*ours)
        assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# Besides: a process whose moments come in several parts, and the last of them short.
@pytest.mark.parametrize(("rows", "features"), [*SHARES[:-1], ((1100, 3), 4)], ids=str)
def test_triton_in_the_interpreter(pool, rows, features):
    pytest.importorskip("triton", reason="triton is not installed")
    pool.run(len(rows), triton, rows, features)


def dead_and_constant(rank, group, rows, features, implementation):
    """A feature that is constant everywhere, and one that is constant in each process but not over all of them."""
    student, teacher = (x.requires_grad_() for x in pair(sum(rows), features))
    with torch.no_grad():
        for x in (student, teacher):
            x[:, 0] = 3
            x[:, 1] = torch.repeat_interleave(torch.arange(float(len(rows))), torch.tensor(rows))
    want = rsd_loss(student, teacher)
    (want_grad,) = torch.autograd.grad(want, student)
    ours = own(rank, rows, student)
    got = gathered(group, implementation=implementation)(ours, own(rank, rows, teacher).detach())
    assert_close(got, want, rtol=1e-9, atol=1e-9)
    (grad,) = torch.autograd.grad(got, ours)
    assert_close(grad, len(rows) * own(rank, rows, want_grad), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "features"), [((4, 5), 6), ((2, 3), 16)], ids=str)
def test_features_constant_in_a_process(pool, rows, features, implementation):
    pool.run(len(rows), dead_and_constant, rows, features, implementation)


def correlation(rank, group, rows, widths):
    whole = sum(rows)
    student, teacher = (pair(whole, width, seed=width)[0].requires_grad_() for width in widths)
    want = cross_correlation(student, teacher)
    u = upstream(want.shape, want.dtype)
    want_grads = torch.autograd.grad(want, (student, teacher), len(rows) * u)
    ours = [own(rank, rows, x) for x in (student, teacher)]
    got = cross_correlation(*ours, gather_distributed=True, process_group=group)
    assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert_close(torch.autograd.grad(got, ours, u), tuple(own(rank, rows, x) for x in want_grads), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("widths", [(5, 3), (3, 40)])
def test_cross_correlation(pool, widths):
    pool.run(3, correlation, (4, 1, 7), widths)


class Student(nn.Module):
    """An encoder with the projector inside, as DistributedDataParallel wants it; GroupNorm for a small norm layer."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 12), nn.GroupNorm(3, 12), nn.GELU(), nn.Linear(12, 8))
        self.projector = DecouplingProjector(8, 24)
        # Over all processes the norm needs SyncBatchNorm, which runs on GPUs only.
        self.projector.norm = nn.GroupNorm(4, 16)

    def forward(self, x):
        embedding = self.encoder(x)
        return embedding.mean(), self.projector(embedding)


def training(rank, group, rows, wrapper, compiled):
    """Twenty steps leave the same parameters as one process does with the concatenated batches."""
    torch.manual_seed(0)
    alone = Student().double()
    ours = copy.deepcopy(alone)
    if wrapper == "ddp":
        ours = DistributedDataParallel(ours, process_group=group)
    else:
        fully_shard(ours, mesh=init_device_mesh("cpu", (len(rows),)))
    criterion = gathered(group)
    if compiled:
        torch._dynamo.reset()
        criterion = torch.compile(criterion, backend="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=2e-3, momentum=0.9) for model in (alone, ours)]
    for step in range(20):
        images, teacher = torch.randn(sum(rows), 10).double(), torch.randn(sum(rows), 24).double()
        _, projected = alone(images)
        RSDLoss()(projected, teacher).backward()
        _, projected = ours(images.split(rows)[rank])
        criterion(projected, teacher.split(rows)[rank]).backward()
        for parameter, (name, want) in zip(ours.parameters(), alone.named_parameters(), strict=True):
            got = parameter.grad.full_tensor() if wrapper == "fsdp" else parameter.grad
            assert_close(got, want.grad, rtol=1e-9, atol=1e-9, msg=lambda m, at=(step, name): f"{at}: {m}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for parameter, want in zip(ours.parameters(), alone.parameters(), strict=True):
        assert_close(parameter.full_tensor() if wrapper == "fsdp" else parameter, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("rows", [(20, 20), (5, 5), (3, 9, 2, 4)], ids=str)
def test_training_with_ddp(pool, rows, compiled):
    pool.run(len(rows), training, rows, "ddp", compiled)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="fully_shard needs a GPU in torch 2.6")
@pytest.mark.parametrize("rows", [(7, 7, 7, 7), (3, 3, 3, 3)], ids=str)
def test_training_with_fsdp2(pool, rows):
    pool.run(4, training, rows, "fsdp", False)


def compiled_step(rank, group, implementation, rows, features):
    torch._dynamo.reset()
    student, teacher = (x.requires_grad_() for x in pair(sum(rows), features, torch.float32))

    def step(student, teacher):
        settings = {"gather_distributed": True, "process_group": group, "implementation": implementation}
        return rsd_loss(2 * student, teacher, **settings) + student.mean()

    results = []
    for f in (step, torch.compile(step, backend="aot_eager")):
        ours = [own(rank, rows, x) for x in (student, teacher)]
        value = f(*ours)
        results.append([value, *torch.autograd.grad(value, ours)])
    assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("features", "implementation"), [(4, "fused"), (40, "fused"), (40, "reference")])
def test_compiled(pool, features, implementation):
    pool.run(2, compiled_step, implementation, (8, 5), features)


def second_derivative(rank, group, rows, features, implementation):
    student, teacher = (x.requires_grad_() for x in pair(sum(rows), features))

    def penalty(x, t, criterion):
        (grad,) = torch.autograd.grad(criterion(x, t), x, create_graph=True)
        return grad.square().sum()

    ours = own(rank, rows, student)
    own_penalty = penalty(ours, own(rank, rows, teacher), gathered(group, implementation=implementation))
    if implementation == "fused":
        with pytest.raises(RuntimeError, match='pass implementation="reference"'):
            torch.autograd.grad(own_penalty, ours)
        return
    (got,) = torch.autograd.grad(own_penalty, ours)
    # The local gradients are W times those of the one loss, and each process has the squares of its own rows.
    want = penalty(student, teacher, RSDLoss(implementation="reference"))
    (want_grad,) = torch.autograd.grad(len(rows) ** 2 * want, student)
    assert_close(got, own(rank, rows, want_grad), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", [4, 40])
def test_second_derivative(pool, features, implementation):
    pool.run(2, second_derivative, (4, 5), features, implementation)


def raises_everywhere(rank, group, case):
    student, teacher = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    settings = {"gather_distributed": True, "process_group": group}
    differs = "must be the same in all processes of the group"
    bad = "rank 1 was given bad input"
    match case, rank:
        case "width", 1:
            student, teacher, message = student[:, :5], teacher[:, :5], f"student's width {differs}: it is 5 in rank 1"
        case "width", _:
            message = f"student's width {differs}: it is 6 in rank {rank} and not in rank 1"
        case "gradient", 1:
            student, message = student.detach(), f"student.requires_grad {differs}: it is False"
        case "gradient", _:
            message = f"student.requires_grad {differs}: it is True"
        case "dtype", 1:
            student, message = student.half(), f"student's dtype {differs}"
        case "dtype", _:
            message = f"student's dtype {differs}"
        case "kappa", _:
            settings["kappa"], message = 0.01 * (1 + rank), f"kappa {differs}"
        case "autocast", _:
            message = f"the dtype of the products, which torch.autocast may change, {differs}"
        case "setting", 1:
            settings["eps"], message = float("nan"), "eps must be a finite number"
        case "implementation", _:
            settings["implementation"] = "fused" if rank == 1 else "reference"
            message = f"implementation {differs}"
        case "shape", 1:
            student, message = student[None], "student must be \\(batch, features\\), got shape \\(1, 4, 6\\)"
        case "unavailable", 1:
            student, teacher, message = student.double(), teacher.double(), "triton"
        case "meta", 1:
            student, teacher, message = student.detach().to("meta"), teacher.to("meta"), "cannot be gathered"
        case "sparse", 1:
            teacher, message = teacher.to_sparse(), "teacher must be a dense tensor"
        case "reduction", _:
            settings["reduction"], message = ("mean" if rank == 1 else "sum"), f"reduction {differs}"
        case "empty", 1:
            student, teacher, message = student[:0], teacher[:0], "must have at least 1 row to correlate over, got 0"
        case "shape" | "empty" | "unavailable" | "setting" | "meta" | "sparse", _:
            message = bad
    if case == "unavailable":
        settings["implementation"] = "triton"
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=(case, rank) == ("autocast", 1)),
        pytest.raises((ValueError, RuntimeError), match=message),
    ):
        rsd_loss(student, teacher, **settings)
    if case in ("width", "gradient", "shape", "empty", "setting"):
        with pytest.raises(ValueError, match=message):
            cross_correlation(student, teacher, **settings)
    # Nothing is left behind that the next call would trip over.
    rsd_loss(torch.randn(4, 6), torch.randn(4, 6), gather_distributed=True, process_group=group)


@pytest.mark.parametrize(
    "case",
    [
        *("width", "gradient", "dtype", "kappa", "implementation", "autocast", "setting", "shape", "unavailable"),
        *("empty", "meta", "sparse", "reduction"),
    ],
)
def test_an_error_in_one_process_is_one_in_all(pool, case):
    pool.run(3, raises_everywhere, case)


def another_function(rank, group):
    call = cross_correlation if rank == 1 else rsd_loss
    with pytest.raises(
        ValueError, match=f"the function called must be the same .* it is {call.__name__} in rank {rank}"
    ):
        call(torch.randn(4, 6), torch.randn(4, 6), gather_distributed=True, process_group=group)


def test_one_process_calls_another_function(pool):
    pool.run(3, another_function)


def teacher_of_inference_mode(rank, group, features):
    student, teacher = pair(8, features)
    student.requires_grad_()
    (want,) = torch.autograd.grad(rsd_loss(student, teacher), student)
    with torch.inference_mode(rank == 1):  # in one process only
        teacher = teacher.clone()
    ours = own(rank, (4, 4), student)
    (grad,) = torch.autograd.grad(gathered(group)(ours, teacher.split(4)[rank]), ours)
    assert_close(grad, 2 * own(rank, (4, 4), want), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("features", [4, 40])
def test_teacher_of_inference_mode(pool, features):
    pool.run(2, teacher_of_inference_mode, features)


def losses_changed_in_place(rank, group, features):
    student, teacher = (x.requires_grad_() for x in pair(8, features))
    weights = upstream((features,), torch.float64)
    (want,) = torch.autograd.grad(rsd_loss(student, teacher, reduction="none"), student, weights)
    ours = own(rank, (4, 4), student)
    losses = gathered(group, reduction="none")(ours, own(rank, (4, 4), teacher))
    losses *= weights
    (grad,) = torch.autograd.grad(losses.sum(), ours)
    assert_close(grad, 2 * own(rank, (4, 4), want), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("features", [4, 40])
def test_losses_can_be_changed_in_place(pool, features):
    pool.run(2, losses_changed_in_place, features)


def layouts_of_distributed_tensors(rank, group):
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Shard(0), Replicate()], [Shard(0), Shard(1)], [Shard(1), Shard(0)]):
        student, teacher = (x.requires_grad_() for x in pair(13, 7))  # uneven shards
        want = rsd_loss(student, teacher)
        want_grads = torch.autograd.grad(want, (student, teacher))
        ours = [distribute_tensor(x.detach(), mesh, placements).requires_grad_() for x in (student, teacher)]
        loss = rsd_loss(*ours)
        loss.backward()
        assert_close(loss.full_tensor(), want, rtol=1e-9, atol=1e-9)
        assert_close(tuple(x.grad.full_tensor() for x in ours), want_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="torch 2.6 averages no DTensors over gloo")
def test_layouts_of_distributed_tensors(pool):
    pool.run(4, layouts_of_distributed_tensors)


def distributed_tensors(rank, group, shape, placement):
    """Right where it runs, and refused by what would see the local part only."""
    mesh = DeviceMesh.from_group(group, "cpu")  # a new group of these alone would leave the others behind
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    want = rsd_loss(student, teacher)
    want_grads = torch.autograd.grad(want, (student, teacher))
    ours = [distribute_tensor(x.detach(), mesh, [placement]).requires_grad_() for x in (student, teacher)]
    loss = rsd_loss(*ours)
    loss.backward()
    assert_close(loss.full_tensor(), want, rtol=1e-9, atol=1e-9)
    assert_close(tuple(x.grad.full_tensor() for x in ours), want_grads, rtol=1e-9, atol=1e-9)
    with pytest.raises(
        RuntimeError, match=r'"fused" cannot run here: an embedding is a DTensor.*: pass implementation='
    ):
        rsd_loss(*ours, implementation="fused")
    with pytest.raises(RuntimeError, match="gather_distributed=True cannot run here: an embedding is a DTensor"):
        rsd_loss(*ours, gather_distributed=True, process_group=group)
    other = ours[1].redistribute(placements=[Replicate() if placement != Replicate() else Shard(0)])
    for mixed in (other, teacher):
        with pytest.raises(ValueError, match="must be DTensors with the same placements, or neither one"):
            rsd_loss(ours[0], mixed)


@pytest.mark.skipif(TorchVersion(torch.__version__) < "2.7", reason="torch 2.6 averages no DTensors over gloo")
@pytest.mark.parametrize("shape", [(10, 6), (6, 10), (1100, 5)], ids=str)
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_distributed_tensors(pool, shape, placement):
    pool.run(2, distributed_tensors, shape, placement)


def group_of_a_module(rank, group):
    module = gathered(group)
    copied = copy.deepcopy(nn.Sequential(module, module))
    assert copied[0] is copied[1] is not module
    assert copied[0].process_group is group
    assert repr(copied[0]) == repr(module)
    with pytest.raises(TypeError, match="ProcessGroup"):
        pickle.dumps(module)
    module.process_group = None
    assert repr(pickle.loads(pickle.dumps(module))) == repr(module)


def test_group_of_a_module(pool):
    pool.run(2, group_of_a_module)


def one_row_each(rank, group):
    settings = {"gather_distributed": True, "process_group": group}
    assert rsd_loss(torch.randn(1, 6), torch.randn(1, 6), **settings).isfinite()
    with pytest.raises(ValueError, match="at least 2 rows to correlate over, got 1"):
        rsd_loss(torch.randn(1, 6), torch.randn(1, 6))


def test_one_row_in_each_process(pool):
    pool.run(2, one_row_each)


def one_row_behind_a_projector(rank, group):
    projector = nn.SyncBatchNorm.convert_sync_batchnorm(DecouplingProjector(4, 6))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):  # on the CPU; not our refusal
        projector(torch.randn(1, 4))


def test_one_row_behind_a_synchronised_projector(pool):
    pool.run(2, one_row_behind_a_projector)


def autocast_and_checkpointing(rank, group, rows, features, implementation, dtype):
    """bfloat16 products of embeddings in another half or in float32, recomputed in backward."""
    student, teacher = (x.to(dtype) for x in pair(sum(rows), features))
    student.requires_grad_()
    results = []
    for x, t, criterion in (
        (student, teacher, RSDLoss(implementation="reference")),
        (own(rank, rows, student), own(rank, rows, teacher), gathered(group, implementation=implementation)),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            value = checkpoint(criterion, x, t, use_reentrant=False)
        (grad,) = torch.autograd.grad(value, x)
        results.append((value, grad))
    (want, want_grad), (got, grad) = results
    # bfloat16 products have 8 bits.
    assert_close(got, want, rtol=3e-2, atol=3e-2)
    want_grad = len(rows) * own(rank, rows, want_grad)
    assert_close(grad, want_grad, rtol=0, atol=3e-2 * want_grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("features", [6, 40])
def test_autocast_and_checkpointing(pool, features, implementation, dtype):
    pool.run(2, autocast_and_checkpointing, (9, 12), features, implementation, dtype)


def selective_checkpointing(rank, group, rows, features, implementation):
    student, teacher = (own(rank, rows, x).requires_grad_() for x in pair(sum(rows), features))
    check_whatever_is_kept(gathered(group, implementation=implementation), student, teacher)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "features"), [((4, 4), 20), ((11, 9), 8), ((1100, 3), 6)], ids=str)
def test_selective_checkpointing(pool, rows, features, implementation):
    pool.run(2, selective_checkpointing, rows, features, implementation)


def other_groups(rank, _):
    """A group that this process is not in, one of it alone, one in another order, and a loss of its own rows beside."""
    groups = [dist.new_group([r]) for r in range(4)]
    reverse = dist.new_group([3, 1])
    student, teacher = (x[8 * rank : 8 * rank + 8] for x in pair(32, 6))
    with pytest.raises(ValueError, match=rf"process_group does not contain this process \(rank {rank}\)"):
        rsd_loss(student, teacher, gather_distributed=True, process_group=groups[rank - 1])
    with pytest.raises(TypeError, match=r"process_group must be .*ProcessGroup, got DeviceMesh: .* mesh.get_group"):
        rsd_loss(student, teacher, gather_distributed=True, process_group=init_device_mesh("cpu", (4,)))
    if rank in (1, 3):
        got = rsd_loss(student, teacher, gather_distributed=True, process_group=reverse)
        both = (torch.cat((x[8:16], x[24:])) for x in pair(32, 6))
        assert_close(got, rsd_loss(*both), rtol=1e-9, atol=1e-9)
    local = rsd_loss(student, teacher)
    assert rsd_loss(student, teacher, gather_distributed=True, process_group=groups[rank]) == local
    assert rsd_loss(student, teacher, gather_distributed=True) != local


def test_groups(pool):
    pool.run(4, other_groups)


def test_one_process_is_the_same_as_off():
    student, teacher = torch.randn(8, 6), torch.randn(8, 6)
    for call in (rsd_loss, cross_correlation):
        assert torch.equal(call(student, teacher, gather_distributed=True), call(student, teacher))


def compiled_before_the_group(rank, store):
    torch._dynamo.reset()
    student, teacher = (x[8 * rank : 8 * rank + 8] for x in pair(16, 6))
    criterion = torch.compile(RSDLoss(gather_distributed=True), backend="eager")
    assert_close(criterion(student, teacher), rsd_loss(student, teacher))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert_close(criterion(student, teacher), rsd_loss(*pair(16, 6)))
    dist.destroy_process_group()


def group_of_another_time(rank, store):
    for time in range(2):
        dist.init_process_group("gloo", init_method=f"file://{store}{time}", rank=rank, world_size=2)
        if time == 0:
            criterion = gathered(dist.new_group([0, 1]))
        else:
            with pytest.raises(ValueError, match="process_group was destroyed since it was made"):
                criterion(torch.randn(4, 6), torch.randn(4, 6))
        dist.barrier()  # the other process may still be connecting
        dist.destroy_process_group()


def groups_that_come_and_go(rank, folder):
    compiled_before_the_group(rank, folder / "first")
    group_of_another_time(rank, folder / "later")


def test_groups_that_come_and_go(tmp_path):
    spawn(groups_that_come_and_go, args=(tmp_path,), nprocs=2)


def test_a_group_that_would_be_ignored(pool):
    student, teacher = torch.randn(8, 6), torch.randn(8, 6)
    group = object()
    for call in (rsd_loss, cross_correlation, lambda *_, **settings: RSDLoss(**settings)):
        with pytest.raises(ValueError, match="process_group is given but gather_distributed is False"):
            call(student, teacher, process_group=group)
    for call in (rsd_loss, cross_correlation):
        with pytest.raises(ValueError, match=r"torch\.distributed is not initialised: initialise it first"):
            call(student, teacher, gather_distributed=True, process_group=group)


@pytest.mark.parametrize("call", [rsd_loss, cross_correlation, RSDLoss(gather_distributed=True)])
def test_a_launch_that_forgot_to_initialise_is_warned(call, monkeypatch):
    student, teacher = torch.randn(8, 6), torch.randn(8, 6)
    settings = {} if isinstance(call, RSDLoss) else {"gather_distributed": True}
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "has no effect: .* torch.distributed is not initialised. Call init_process"
    with pytest.warns(UserWarning, match=message):
        call(student, teacher, **settings)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(student, teacher, **settings)
