"""No fast implementation is less precise than the plain formula in the same dtype, whatever the data."""

import pytest
import torch
from conftest import DEVICE, IMPLEMENTATIONS, pair, upstream
from torch import nn

from rsd_loss import DecouplingProjector, RSDLoss, cross_correlation, rsd_loss

FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# The fewest rows and features, square, wide, much wider, tall, and taller (streamed; the last in bfloat16 too).
SHAPES = [(2, 1), (2, 7), (3, 3), (16, 16), (24, 40), (4, 300), (40, 24), (1100, 5), (4100, 5)]


def data(kind, rows, features):
    student, teacher = pair(rows, features)
    if kind.startswith("scale"):
        return student / 4 * float(kind[5:]), teacher / 4 * float(kind[5:])  # below float16's 65504 at 1e4
    if kind.startswith("offset"):
        return student + float(kind[6:]), teacher + float(kind[6:])
    # A spread near eps = 1e-5 in a few features, beside healthy ones.
    student[:, ::3] *= 1e-5
    teacher[:, ::2] *= 1e-5
    return student, teacher


def error(implementation, dtype, inputs, truth, reduction):
    student, teacher = (x.to(dtype).requires_grad_() for x in inputs)
    value = rsd_loss(student, teacher, kappa=0.1, reduction=reduction, implementation=implementation)
    u = upstream(value.shape, torch.float64)
    grads = torch.autograd.grad(value, (student, teacher), u.to(value.dtype))
    assert all(grad.dtype == dtype for grad in grads)
    return [(got.double() - want).abs().max().item() for got, want in zip((value, *grads), truth, strict=True)]


KINDS = ["scale1e-4", "scale1", "scale1e4", "offset1e2", "offset1e4", "nearly dead"]
# float16 spaces its numbers by 8 at 1e4: every feature would be dead.
CASES = [(dtype, kind) for dtype in DTYPES for kind in KINDS if (dtype, kind) != (torch.float16, "offset1e4")]


@pytest.mark.parametrize(("dtype", "kind"), CASES)
@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_the_reference(implementation, shape, dtype, kind):
    # What counts is the error on the numbers given, so the rounding of the inputs comes before the truth.
    inputs = [x.to(dtype).double() for x in data(kind, *shape)]
    for reduction in ("sum", "none"):
        student, teacher = (x.clone().requires_grad_() for x in inputs)
        value = rsd_loss(student, teacher, kappa=0.1, reduction=reduction, implementation="reference")
        u = upstream(value.shape, torch.float64)
        grads = torch.autograd.grad(value, (student, teacher), u)
        truth = [x.detach() for x in (value, *grads)]
        ours = error(implementation, dtype, inputs, truth, reduction)
        theirs = error("reference", dtype, inputs, truth, reduction)
        # Rounding in another order may go a little either way, and does not scale with a gradient that happens to
        # cancel (two rows have one direction only), but with its terms: |w| / (n + eps sqrt(B)) is of order slope.
        epsilon = torch.finfo(dtype).eps
        slopes = [1 / (x.std(0, correction=0).min().item() + 1e-5) / shape[0] ** 0.5 for x in inputs]
        sizes = [shape[1] ** 0.5 if reduction == "sum" else 1.0, *slopes]
        for name, a, b, want, size in zip(("value", "student", "teacher"), ours, theirs, truth, sizes, strict=True):
            assert a <= b + 8 * epsilon * (size + want.abs().max().item()), (reduction, name, a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (4100, 24)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(implementation, shape, dtype):
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()
    want = rsd_loss(student, teacher, implementation=implementation)
    (want_grad,) = torch.autograd.grad(want, student)
    with torch.autocast(DEVICE, dtype):
        value = rsd_loss(student, teacher, implementation=implementation)
        assert cross_correlation(student, teacher).dtype == dtype
    (grad,) = torch.autograd.grad(value, student, retain_graph=True)
    assert value.dtype == torch.float32
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, want_grad)  # the products did run in half precision
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(value, want, rtol=tolerance, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=0, atol=tolerance * want_grad.abs().max().item())
    with torch.autocast(DEVICE, dtype):  # around backward() it is customary, and must change nothing
        again = torch.autograd.grad(value, student, retain_graph=True)[0]
        full = torch.autograd.grad(want_of(student, teacher, implementation), student)[0]
    assert torch.equal(again, grad)
    if implementation != "reference":  # whose backward is autograd's, matmuls and all
        assert torch.equal(full, want_grad)


@pytest.mark.parametrize("rows", [100, 4100])
def test_a_row_far_out_keeps_its_gradient(implementation, rows):
    """There two terms 1000 times the gradient cancel, which they do only if both have the same rounding."""
    student, teacher = pair(rows, 16)
    student[7] += 1000
    teacher[7] += 1000
    student.requires_grad_()
    want = torch.autograd.grad(rsd_loss(student, teacher, implementation="reference"), student)[0][7]
    single = student.detach().float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        value = rsd_loss(single, teacher.float(), implementation=implementation)
    got = torch.autograd.grad(value, single)[0][7]
    assert (got - want).norm() < 0.05 * want.norm()  # bfloat16 has 8 bits; the terms alone would leave none


def want_of(student, teacher, implementation):
    with torch.autocast(DEVICE, enabled=False):
        return rsd_loss(student, teacher, implementation=implementation)


@pytest.mark.parametrize("shape", [(64, 40), (40, 64)])
def test_half_precision_survives_a_gradient_scaler(implementation, shape):
    """65536, a scaler's first factor, neither overflows nor lets small gradients vanish on the way."""
    student, teacher = pair(*shape, torch.float16)
    student.requires_grad_()
    want = torch.autograd.grad(rsd_loss(student.double(), teacher.double()), student)[0].double()
    value = rsd_loss(student, teacher, implementation=implementation, reduction="mean")
    scale = 2.0**16
    (grad,) = torch.autograd.grad(value * scale / 2**10, student)  # as large as float16 gradients can hold here
    torch.testing.assert_close(
        grad.double() / scale * 2**10 * shape[1], want, rtol=0, atol=0.01 * want.abs().max().item()
    )


def test_embeddings_of_two_dtypes(implementation):
    student, teacher = pair(24, 40, torch.float32)
    want = rsd_loss(student, teacher, implementation=implementation)
    half = student.to(torch.bfloat16).requires_grad_()
    value = rsd_loss(half, teacher.requires_grad_(), implementation=implementation)
    value.backward()
    assert half.grad.dtype == torch.bfloat16
    assert teacher.grad.dtype == torch.float32
    torch.testing.assert_close(value, want, rtol=1e-2, atol=0)  # bfloat16 input: 8 bits


def test_training_in_float16_autocast_stays_finite(implementation):
    """300 steps with a GradScaler, on a batch larger and smaller than the width in turn."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24))
    projector, criterion = DecouplingProjector(24, 32), RSDLoss(implementation=implementation)
    parameters = [*student.parameters(), *projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=65536.0)
    teacher = nn.Linear(16, 32).requires_grad_(False)
    losses, overflows = [], 0
    for step in range(300):
        x = torch.randn(24 if step % 2 else 48, 16)
        with torch.autocast(DEVICE, torch.float16):
            loss = 0.1 * criterion(projector(student(x)), teacher(x))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        overflows += not all(p.grad.isfinite().all() for p in parameters)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        assert loss.isfinite()
        assert all(p.isfinite().all() for p in parameters)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    # Times 65536 a gradient can be beyond float16 by itself: a scaler is there to find that out in a few steps.
    assert overflows <= 5
