"""The Triton kernels, interpreted on the CPU, against the plain formula in float64.

The interpreter must be chosen before the kernels are defined, so these tests run where TRITON_INTERPRET=1 was set
before Python started; elsewhere the last one runs this file so, in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import pair, upstream
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rsd_loss import _triton, reference, rsd_loss

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.interpreted  # left to test_in_the_interpreter, see conftest.py
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Fewest rows, one feature, and both; a tile is 32 x 32, so one short of it, one over it, and it; far taller; far wider;
# over 512 rows, whose moments are merged from parts (three here, the last one short).
SHAPES = [(2, 1), (2, 7), (9, 1), (31, 33), (33, 31), (32, 32), (70, 5), (5, 130), (1100, 7)]

# 1e4 is beyond the range of float16, or takes all digits.
SCALES = [(dtype, *case) for case in ((0, 1e-4), (100, 1)) for dtype in DTYPES]
SCALES += [(dtype, *case) for case in ((0, 1e4), (1e4, 1), (1e4, 1e-4)) for dtype in DTYPES[:2]]


def round_half(data, source, target, _):
    """Rounds to nearest even, as GPUs do, where the interpreter truncates bfloat16."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    integers = {"fp32": np.uint32, "bf16": np.uint16, "fp16": np.uint16}
    x = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.dtype.itemsize}")).view(dtypes[str(source)])
    bits = x.to(dtypes[str(target)]).view(torch.int32 if str(target) == "fp32" else torch.int16)
    return bits.numpy().view(integers[str(target)])


@pytest.fixture(autouse=True)
def _gpu_like(monkeypatch, request):
    """Rounds as a GPU does, and fills torch.empty with NaN, so that no test passes on memory nothing wrote."""
    if not INTERPRETED:
        return
    monkeypatch.setattr("triton.runtime.interpreter._convert_float", round_half)
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, _make=make, **kwargs):
            x = _make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        monkeypatch.setattr(torch, name, poisoned)


def evaluate(function, student, teacher, u, kappa=0.1, eps=1e-5, grads="s"):
    """Losses, d, q and the gradients asked for ("s" the student's, "t" the teacher's), all detached."""
    student, teacher = student.detach().requires_grad_("s" in grads), teacher.detach().requires_grad_("t" in grads)
    losses, d, q = function(student, teacher, kappa, eps)
    assert not d.requires_grad
    assert not q.requires_grad
    inputs = [x for x in (student, teacher) if x.requires_grad]
    out = torch.autograd.grad(losses, inputs, u.to(losses)) if inputs else ()
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(out, inputs, strict=True))
    return losses.detach(), d, q, *out


def check(student, teacher, u=None, factor=8, **settings):
    """|triton - fp64| <= |reference in the same dtype - fp64| + tolerance, for every output."""
    features = student.shape[1]
    u = upstream(features, torch.float32) if u is None else u
    ours = evaluate(_triton.feature_losses, student, teacher, u, **settings)
    theirs = evaluate(reference.feature_losses, student, teacher, u, **settings)
    truth = evaluate(reference.feature_losses, student.double(), teacher.double(), u, **settings)
    assert all(x.dtype == torch.float32 for x in ours[:3])
    # Other orders of rounding may err a little more, by a few units of the terms that are added up. d is at most 1, the
    # losses and q are sums of D squares at most 1, and gradients (which cancel where two rows leave one direction, or
    # an embedding matches) are differences of terms of the size of the upstream over the norm of a column.
    unit = factor * torch.finfo(torch.promote_types(student.dtype, teacher.dtype)).eps
    slopes = []
    for name, x in (("s", student), ("t", teacher)):
        if name in settings.get("grads", "s"):
            norm = (x.double().std(0, correction=0) + 1e-5) * x.shape[0] ** 0.5
            slopes.append((u.abs().max() / norm).max().item())
    sizes = [1.0, 1.0, 1.0, *slopes]
    names = ["losses", "d", "q", *settings.get("grads", "s")]
    for name, a, b, want, size in zip(names, ours, theirs, truth, sizes, strict=True):
        assert a.isfinite().all(), name
        error, allowed = ((x.double() - want).abs().max().item() for x in (a, b))
        assert error <= allowed + unit * (size + want.abs().max().item()), (name, error, allowed)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, dtype):
    check(*pair(*shape, dtype), grads="s")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "most"), [((70, 130), 4), ((70, 5), 2), ((64, 3), 64)], ids=str)
def test_parts(shape, most, dtype, monkeypatch):
    """Three parts and wide; no more parts than allowed, which are then longer; parts that end with the batch."""
    monkeypatch.setattr(_triton, "_ROWS", 32)
    monkeypatch.setattr(_triton, "_PARTS", most)
    check(*pair(*shape, dtype))


@interpreted
@pytest.mark.parametrize("grads", ["", "t", "st"])  # of the value alone another product is the smaller
@pytest.mark.parametrize("shape", [(2, 1), (20, 34), (20, 44), (44, 20)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_alone_and_teacher(shape, dtype, grads):
    check(*pair(*shape, dtype), grads=grads)


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_mixed_dtypes(shape, dtypes):
    student, teacher = (x.to(dtype) for x, dtype in zip(pair(*shape), dtypes, strict=True))
    check(student, teacher)


@interpreted
@pytest.mark.parametrize("kappa", [0.0, 0.01, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_kappa_and_eps(shape, kappa):
    student, teacher = pair(*shape, torch.float32)
    check(student, teacher, kappa=kappa, eps=0.5, factor=8 * max(1, kappa))


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_strides(shape):
    rows, features = shape
    student, teacher = pair(2 * rows, 3 * features, torch.float32)
    check(student.T.contiguous().T[:rows, :features], teacher[:rows, :features])
    check(student[::2, 1::3], teacher[1::2, ::3].T.contiguous().T)
    check(student[:rows, :1].expand(rows, features), teacher[:1, :features].expand(rows, features))
    check(student[:rows, :features], teacher[:rows, :features], u=upstream((), torch.float32).expand(features))
    check(student[:rows, :features], teacher[:rows, :features], u=upstream(3 * features, torch.float32)[::3])


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (140, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "offset", "scale"), SCALES, ids=str)
def test_offsets_and_scales(shape, dtype, offset, scale, monkeypatch):
    monkeypatch.setattr(_triton, "_ROWS", 64)  # the last shape in three parts
    student, teacher = (scale * (x + offset) for x in pair(*shape))
    check(student.to(dtype), teacher.to(dtype), grads="s")


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (140, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_features(shape, dtype, monkeypatch):
    monkeypatch.setattr(_triton, "_ROWS", 64)
    student, teacher = pair(*shape, dtype)
    student[:, ::2] = 0.1
    teacher[:, ::3] = 1e4
    check(student, teacher, eps=1e-3)  # a smaller one takes the true gradient of a dead feature beyond float16
    losses, d, q = _triton.feature_losses(student, teacher, 0.1, 1e-5)
    # A constant column is exactly 0 when centred, whatever the rounding of its mean.
    assert not d[::2].any()
    assert not d[::3].any()
    assert not q[::2].any()
    assert (losses[::2] == 1).all()


@interpreted
@pytest.mark.parametrize("scaled", [2.0**-24, 2.0**16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_upstream_stays_out_of_half_precision(shape, dtype, scaled):
    # The gradient of float32 embeddings under autocast has room for what a GradScaler multiplies by. As nothing halfway
    # there rounds it to half precision, a power of two changes the exponents and no other bit.
    student, teacher = pair(*shape, torch.float32)
    u = upstream(shape[1], torch.float32)
    with torch.autocast("cpu", dtype):
        plain = evaluate(_triton.feature_losses, student, teacher, u)
        large = evaluate(_triton.feature_losses, student, teacher, u * scaled)
    for a, b in zip(plain[3:], large[3:], strict=True):
        assert b.isfinite().all()
        assert torch.equal(a * scaled, b)


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(shape, dtype):
    student, teacher = pair(*shape, torch.float32)
    u = upstream(shape[1], torch.float32)
    want = evaluate(_triton.feature_losses, student, teacher, u)
    with torch.autocast("cpu", dtype):
        got = evaluate(_triton.feature_losses, student, teacher, u)
        student.requires_grad_()
        outside = torch.autograd.grad(_triton.feature_losses(student, teacher, 0.1, 1e-5)[0], student, u)[0]
    losses, _, _ = _triton.feature_losses(student, teacher, 0.1, 1e-5)
    with torch.autocast("cpu", dtype):  # around backward alone: no product may change its dtype
        (unchanged,) = torch.autograd.grad(losses, student, u)
    assert torch.equal(outside, got[3])
    assert torch.equal(unchanged, want[3])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert not torch.equal(a, b)  # the products did run in half precision
        torch.testing.assert_close(a, b, rtol=0, atol=8 * torch.finfo(dtype).eps * max(1, b.abs().max().item()))


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_backward_twice(shape):
    student, teacher = (x.requires_grad_() for x in pair(*shape, torch.float32))
    losses, _, _ = _triton.feature_losses(student, teacher, 0.1, 1e-5)
    first, second = (
        torch.autograd.grad(losses, (student, teacher), upstream(shape[1], torch.float32), retain_graph=True)
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@interpreted
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_double_backward(shape):
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()
    loss = rsd_loss(student, teacher, implementation="triton")
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match='implementation="reference"'):
        torch.autograd.grad(grad.square().sum(), student)


@interpreted
def test_losses_without_gradient_upstream():
    student, teacher = pair(5, 7, torch.float32)
    student.requires_grad_()
    with torch.no_grad():
        assert not _triton.feature_losses(student, teacher, 0.1, 1e-5)[0].requires_grad
    assert _triton.feature_losses(student, teacher, 0.1, 1e-5)[0].requires_grad
    assert not _triton.feature_losses(student.detach(), teacher, 0.1, 1e-5)[0].requires_grad


class Launches(TorchDispatchMode):
    """Counts kernels by name, and the torch operations that would launch one on a GPU."""

    # Memory, views and metadata.
    FREE = ("empty", "empty_like", "select", "permute", "expand", "detach", "promote_types")

    def __init__(self, monkeypatch):
        super().__init__()
        self.names = []
        for name in ("_moments", "_standardise", "_columns", "_gradient"):
            monkeypatch.setattr(_triton, name, Counted(name, getattr(_triton, name), self.names))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.overloadpacket.__name__) not in self.FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class Counted:
    def __init__(self, name, kernel, names):
        self.name, self.kernel, self.names = name, kernel, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names.append(self.name)
            with _disable_current_modes():  # the interpreter's own copies are no launches
                self.kernel[grid](*args, **kwargs)

        return launch


@interpreted
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((24, 40), ["_standardise", "mm", "mm", "_columns", "sum", "_gradient"]),
        ((40, 24), ["_standardise", "mm", "_columns", "sum", "mm", "_gradient"]),
        ((70, 80), ["_moments", "_standardise", "mm", "mm", "_columns", "sum", "_gradient"]),
        ((70, 3), ["_moments", "_standardise", "mm", "_columns", "sum", "mm", "_gradient"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_seven_launches_at_most(shape, dtype, expected, monkeypatch):
    monkeypatch.undo()  # filling with NaN would count
    monkeypatch.setattr(_triton, "_ROWS", 64)
    student, teacher = pair(*shape, dtype)
    student.requires_grad_()
    u = torch.tensor(0.5)
    with Launches(monkeypatch) as launches:
        loss = rsd_loss(student, teacher, implementation="triton")
        torch.autograd.grad(loss, student, u)
    assert launches.names == expected
    assert len(expected) <= 7


@interpreted
def test_float64_is_refused():
    student, teacher = pair(5, 7)
    with pytest.raises(RuntimeError, match="float64"):
        rsd_loss(student, teacher, implementation="triton")
    with pytest.raises(RuntimeError, match="float64"):
        rsd_loss(student.float(), teacher, implementation="triton")


@pytest.mark.compiled  # the interpreter runs on any device
def test_cpu_tensors_are_refused():
    student, teacher = pair(5, 7, torch.float32)
    with pytest.raises(RuntimeError, match="CUDA"):
        rsd_loss(student, teacher, implementation="triton")


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("rsd_loss._triton_alone", _triton.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "not installed" in module.why_unavailable(torch.zeros(2, 2))


@pytest.mark.compiled
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (128, 768), (1000, 1100), (50_176, 384)], ids=str)
def test_on_a_gpu(shape, dtype):
    student, teacher = (x.cuda() for x in pair(*shape, dtype))
    check(student, teacher)
    loss = torch.compile(rsd_loss, fullgraph=True)(student.requires_grad_(), teacher, implementation="triton")
    want = rsd_loss(student, teacher, implementation="triton")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, want)))


@pytest.mark.compiled
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", __file__]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout
