"""What only a GPU can show; and of it, on fake tensors, what can be seen without one: devices, shapes and dispatch."""

import pytest
import torch
from conftest import pair
from test_memory import Watch
from torch._subclasses import FakeTensorMode
from torch.torch_version import TorchVersion

from rsd_loss import DecouplingProjector, RSDLoss, cross_correlation, rsd_loss
from rsd_loss.diagnostics import summary
from rsd_loss.features import dense_pairs, pool

fake = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.7", reason="torch 2.6 aborts on fake CUDA tensors where there is no GPU"
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHAPES = [(8, 24), (24, 8), (2000, 5)]


def gradients(losses):
    """Of the fused loss of every feature: by its node alone, as autograd's engine asks for a real device."""
    return list(losses.grad_fn.apply(torch.ones_like(losses), None, None)[:2])


@fake
@pytest.mark.parametrize("implementation", ["reference", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fake_tensors_stay_on_their_device(shape, dtype, implementation):
    with FakeTensorMode():
        student, teacher = (torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for _ in range(2))
        loss, terms = rsd_loss(student, teacher, implementation=implementation, reduction="none", return_terms=True)
        found = [loss, *terms, cross_correlation(student, teacher)]
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        if implementation == "fused":
            grads = gradients(loss)
            assert [(x.dtype, x.shape) for x in grads] == [(dtype, torch.Size(shape))] * 2
            found += grads
        assert {x.device.type for x in found} == {"cuda"}


@fake
def test_fake_maps_stay_on_their_device():
    with FakeTensorMode():
        feature_map, tokens = torch.randn(4, 6, 3, 3, device="cuda"), torch.randn(4, 17, 8, device="cuda")
        pairs = dense_pairs(feature_map, tokens, prefix_tokens=(0, 1))
        found = [*pairs, pool(feature_map), pool(tokens), *summary(pairs[1], pairs[1])]
        assert {x.device.type for x in found} == {"cuda"}


@fake
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_gets_one_block(dtype):
    """Blocks that stay in a cache are for CPUs: on a GPU each would be more launches."""
    counts = []
    for rows in (400, 20000):
        with FakeTensorMode(), Watch() as watch:
            student, teacher = (torch.randn(rows, 8, dtype=dtype, device="cuda") for _ in range(2))
            student.requires_grad_()
            gradients(rsd_loss(student, teacher, reduction="none"))
        counts.append(len(watch.operations))
    assert counts[0] == counts[1]


@pytest.fixture
def step():
    """Value and the student's gradient of a batch on the GPU, and the truth."""

    def make(rows, features, dtype=torch.float32, device="cuda"):
        student, teacher = (x.to(dtype) for x in pair(rows, features))
        exact = student.double().requires_grad_()
        loss = rsd_loss(exact, teacher.double(), implementation="reference")
        truth = loss.item(), torch.autograd.grad(loss, exact)[0]
        return student.to(device).requires_grad_(), teacher.to(device), truth

    return make


def run(student, teacher, **settings):
    loss = rsd_loss(student, teacher, **settings)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def assert_true(result, truth, tolerance):
    loss, grad = result
    assert loss.item() == pytest.approx(truth[0], rel=tolerance)
    torch.testing.assert_close(grad.double().cpu(), truth[1], rtol=0, atol=tolerance * truth[1].abs().max().item())


@gpu
@pytest.mark.parametrize("shape", [(128, 768), (768, 128), (4000, 64)], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_is_torchs_to_decide(step, shape, tf32, monkeypatch):
    """Products of float32 follow torch's flag, as any matmul does; statistics and sums do not."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    student, teacher, truth = step(*shape)
    # float32 keeps 24 bits of a factor and TF32 11, in products of columns of at most unit length.
    assert_true(run(student, teacher), truth, 5e-3 if tf32 else 1e-4)


@gpu
def test_float16_with_a_scaler(step):
    student, teacher, _ = step(64, 192)
    projector = DecouplingProjector(192, 192, device="cuda")
    optimizer = torch.optim.SGD(projector.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0)
    before = projector.project.weight.clone()
    with torch.autocast("cuda", torch.float16):
        loss = RSDLoss()(projector(student), teacher)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 65536, "a gradient overflowed"
    assert not torch.equal(projector.project.weight, before)


@gpu
@pytest.mark.parametrize("shape", [(128, 768), (768, 128)], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_host_does_not_wait(step, shape, compiled):
    student, teacher, truth = step(*shape)
    function = torch.compile(rsd_loss, fullgraph=True) if compiled else rsd_loss
    torch.autograd.grad(function(student, teacher), student)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = rsd_loss(student, teacher, return_terms=True) if not compiled else (function(student, teacher), None)
        (grad,) = torch.autograd.grad(loss, student)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_true((loss.detach(), grad), truth, 1e-4)


@gpu
@pytest.mark.parametrize("shape", [(128, 768), (768, 128)], ids=str)
def test_a_step_can_be_captured_in_a_graph(step, shape):
    student, teacher, _ = step(*shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(student, teacher)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(student, teacher)
    new_student, new_teacher, truth = step(*shape)
    with torch.no_grad():
        student.copy_(2 * new_student)
        teacher.copy_(3 * new_teacher)
    graph.replay()
    loss, grad = captured
    assert_true((loss, 2 * grad), truth, 1e-3)  # of a student twice as large; eps is then half as large


@gpu
def test_a_side_stream(step):
    student, teacher, truth = step(768, 128)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        result = run(student, teacher)
    torch.cuda.current_stream().wait_stream(side)
    assert_true(result, truth, 1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("implementation", ["fused", "triton"])
def test_a_device_that_is_not_the_current_one(step, implementation):
    student, teacher, truth = step(128, 192, device="cuda:1")
    with torch.cuda.device(0):
        assert_true(run(student, teacher, implementation=implementation), truth, 1e-4)


@gpu
@pytest.mark.parametrize(("shape", "most"), [((128, 2048), 5), ((8192, 256), 3.5)], ids=str)
def test_peak_memory_by_the_allocator(step, shape, most):
    """In inputs: a GPU works on a tall input as a whole, with a standardised copy of each side."""
    student, teacher, _ = step(*shape)
    run(student, teacher)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(student, teacher)
    assert torch.cuda.max_memory_allocated() - before <= most * student.numel() * 4
