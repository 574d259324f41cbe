"""Special modes of torch around the loss: a right number or one clear error, and never a wrong number."""

import functools
import itertools

import pytest
import torch
from conftest import IMPLEMENTATIONS, pair, upstream
from test_memory import Watch
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rsd_loss import RSDLoss, rsd_loss

SHAPES = [(8, 20), (20, 8), (1100, 6)]  # wide, tall, and tall in blocks


@pytest.mark.parametrize(
    ("backend", "side", "shape"),  # inductor takes the graphs of aot_eager, seconds each
    [*itertools.product([None, "eager", "aot_eager"], [0, 1], SHAPES), ("inductor", 0, SHAPES[0])],
)
def test_second_derivative_raises(backend, side, shape):
    """Dropped in silence it would be a wrong number. Under aot_autograd torch has words of its own."""
    torch._dynamo.reset()
    inputs = pair(*shape)
    inputs[side].requires_grad_()
    loss = rsd_loss if backend is None else torch.compile(rsd_loss, backend=backend)
    value = loss(*inputs)
    (grad,) = torch.autograd.grad(value, inputs[side], create_graph=True)
    with pytest.raises(RuntimeError, match=r'implementation="reference"|does not currently support double backward'):
        torch.autograd.grad(value + grad.square().sum(), inputs[side])


@pytest.mark.parametrize("shape", SHAPES)
def test_second_derivative_of_the_reference(shape):
    student, teacher = pair(*shape)
    student.requires_grad_()
    (grad,) = torch.autograd.grad(rsd_loss(student, teacher, implementation="fused"), student, create_graph=True)
    (want,) = torch.autograd.grad(rsd_loss(student, teacher), student)
    assert torch.equal(grad, want)  # what refuses to be differentiated is no other number
    if shape[0] < 1000:  # a large Jacobian
        settings = {"kappa": 0.3, "implementation": "reference"}
        assert torch.autograd.gradgradcheck(lambda s: rsd_loss(s, teacher, **settings), student)


def check_whatever_is_kept(criterion, student, teacher):
    """A policy may keep each operation alone, or all. One that is changed in place would be kept wrong."""
    want = torch.autograd.grad(criterion(student, teacher), (student, teacher))
    operations = {}  # in their order, which processes share

    class Record(Watch):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations[function] = None
            return super().__torch_dispatch__(function, types, args, kwargs)

    with Record():
        criterion(student, teacher)
    assert len(operations) > 5
    for kept in [*([operation] for operation in operations), list(operations)]:

        def policy(ctx, operation, *args, kept=kept, **kwargs):
            return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        value = checkpoint(criterion, student, teacher, use_reentrant=False, context_fn=contexts)
        grads = torch.autograd.grad(value, (student, teacher))
        torch.testing.assert_close(grads, want, msg=lambda text, kept=kept: f"{text}, keeping {kept}")


@pytest.mark.parametrize("shape", SHAPES)
def test_selective_checkpointing(shape, implementation):
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    check_whatever_is_kept(functools.partial(rsd_loss, implementation=implementation), student, teacher)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_mode(shape):
    student, teacher = pair(*shape)
    student.requires_grad_()
    along = upstream(shape, torch.float64)
    (grad,) = torch.autograd.grad(rsd_loss(student, teacher), student)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), along)
        tangent = forward_ad.unpack_dual(rsd_loss(dual, teacher)).tangent
        with pytest.raises(RuntimeError, match=r'forward-mode AD .*: pass implementation="reference"'):
            rsd_loss(dual, teacher, implementation="fused")
    torch.testing.assert_close(tangent, (grad * along).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gather", [False, True])  # which has no effect in a single process
def test_function_transforms(shape, gather):
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    (want,) = torch.autograd.grad(rsd_loss(student, teacher), student)
    got = torch.func.grad(functools.partial(rsd_loss, gather_distributed=gather))(student.detach(), teacher.detach())
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_export(implementation):
    """Without a gradient, for any number of rows on one side of the boundaries between the ways to compute it."""
    rows = torch.export.Dim("rows", min=600, max=4000)
    module = RSDLoss(implementation=implementation, reduction="none")
    student, teacher = pair(1000, 6, torch.float32)
    exported = torch.export.export(module, (student, teacher), dynamic_shapes=({0: rows}, {0: rows}))
    for other in (600, 3001):
        inputs = pair(other, 6, torch.float32)
        torch.testing.assert_close(exported.module()(*inputs), module(*inputs))
    for shape in ((8, 20), (20, 8)):
        inputs = pair(*shape, torch.float32)
        torch.testing.assert_close(torch.export.export(module, inputs).module()(*inputs), module(*inputs))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_overflow_shows(implementation, shape, side):
    """A variance beyond float32, as of a student that has diverged, must not pass for a dead feature."""
    inputs = pair(*shape, torch.float32)
    inputs[side][:, 0] *= 1e25
    losses = rsd_loss(*inputs, reduction="none", implementation=implementation)
    assert losses[0].isnan()
    inputs[0].requires_grad_()
    losses = rsd_loss(*inputs, reduction="none", implementation=implementation)
    assert losses[0].isnan()
    (grad,) = torch.autograd.grad(losses.sum(), inputs[0])
    assert grad[:, 0].isnan().all()
