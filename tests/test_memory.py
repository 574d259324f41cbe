"""What is allocated and dispatched: no tensor beyond the promised size, no read of a value."""

import pytest
import torch
from conftest import IMPLEMENTATIONS, pair
from torch.utils._python_dispatch import TorchDispatchMode

from rsd_loss import rsd_loss

# An operation that hands a tensor's value to Python makes a GPU wait.
SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "unique", "masked_select"}


class Watch(TorchDispatchMode):
    """Records the largest tensor made and the names of all operations."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append(function.overloadpacket.__name__)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


FAST = [name for name in IMPLEMENTATIONS if name != "reference"]
# On both sides of rows = features and of features = 2 rows, where the side changes with and without a gradient.
SHAPES = [(8, 200), (20, 50), (20, 39), (20, 41), (20, 21), (20, 20), (20, 19), (200, 8), (1500, 16), (2, 1)]


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tensor_exceeds_an_input_with_a_gradient(implementation, shape, reduction):
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()
    with Watch() as watch:
        loss = rsd_loss(student, teacher, reduction=reduction, implementation=implementation)
        torch.autograd.grad(loss, student, torch.ones_like(loss))
    assert watch.largest <= student.numel()
    assert not SYNCHRONISING & set(watch.operations)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_tensor_exceeds_two_inputs_without_a_gradient(implementation, shape):
    student, teacher = pair(*shape, torch.float32)
    with Watch() as watch:
        rsd_loss(student, teacher, implementation=implementation, return_terms=True)
    assert watch.largest <= 2 * student.numel()
    assert not SYNCHRONISING & set(watch.operations)


@pytest.mark.parametrize(("features", "products"), [(40, 1), (41, 2)])
def test_the_value_alone_takes_the_cheaper_side(features, products):
    """Up to D = 2 B that is the (D, D) product, at 2 B D^2 operations against 4 B^2 D."""
    with Watch() as watch:
        rsd_loss(*pair(20, features, torch.float32))
    assert watch.operations.count("mm") == products


@pytest.mark.parametrize("shape", [(8, 200), (200, 8)])
def test_what_is_kept_for_backward(shape):
    """Wide keeps the student and its gradient, and no teacher; tall keeps both inputs and nothing else as large."""
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()
    saved = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add((x.data_ptr(), x.numel())) or x, lambda x: x):
        rsd_loss(student, teacher)
    large = [address for address, size in saved if size >= student.numel()]
    assert len(large) == 2
    assert (teacher.data_ptr() in large) == (shape[0] > shape[1])


@pytest.mark.parametrize("implementation", FAST)
def test_no_gradient_work_unless_asked(implementation):
    for shape in ((8, 200), (200, 8)):
        student, teacher = pair(*shape, torch.float32)
        with Watch() as value:
            rsd_loss(student, teacher, implementation=implementation)
        student.requires_grad_()
        with Watch() as one:
            rsd_loss(student, teacher, implementation=implementation).backward()
        teacher.requires_grad_()
        with Watch() as both:
            rsd_loss(student, teacher, implementation=implementation).backward()
        assert [w.operations.count("mm") for w in (value, one, both)] == (
            [2, 2, 4] if shape[0] < shape[1] else [1, 2, 3]
        )


@pytest.mark.parametrize(("shape", "mode", "most"), [((128, 768), 2, 40), ((128, 768), 1, 31), ((512, 256), 2, 48)])
def test_launches(shape, mode, most):
    """What a GPU would be sent; lightly's loss takes 36 at any shape."""
    measure = pytest.importorskip("benchmarks.speed.measure", reason="the benchmarks are in a checkout only")
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_(mode == 2)

    def step():
        loss = rsd_loss(student, teacher)
        return torch.autograd.grad(loss, student) if mode == 2 else loss

    assert measure.operations(step, student.device, compiled=False) <= most


@pytest.mark.parametrize("shape", [(128, 1024), (2048, 128), (1024, 768)])
def test_peak_memory(shape):
    """Beyond the inputs, with the gradient: wide, 5 inputs and two (B, B) matrices; tall, 2.5 inputs and vectors."""
    measure = pytest.importorskip("benchmarks.speed.measure", reason="the benchmarks are in a checkout only")
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()

    def step():
        return torch.autograd.grad(rsd_loss(student, teacher), student)

    step()  # what is allocated once per process is none of the loss's
    size = student.numel() * student.element_size()
    assert size <= measure.peak_bytes(step, student.device) <= (5.25 if shape[0] < shape[1] else 2.6) * size
