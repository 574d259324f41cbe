"""One graph under torch.compile, few recompilations, for every implementation."""

import pytest
import torch
from conftest import DEVICE, pair, upstream
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion

from rsd_loss import RSDLoss

# Code is generated for what has paths of its own for the compiler; the plain formula is any other graph to it.
BACKENDS = {"reference": "aot_eager", "fused": "inductor"}


@pytest.mark.parametrize(("features", "implementation"), [(24, "reference"), (24, "fused"), (1, "fused")])
def test_changing_batch_sizes(implementation, features):
    """A run's batches, its smaller last ones and others: one graph each for wide, tall and streamed serves them."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(BACKENDS[implementation])
    module = RSDLoss(implementation=implementation, return_terms=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for rows in (16, 10, 7, 64, 25, 999, 16, 9000):
        student, teacher = pair(rows, features, torch.float32)
        student.requires_grad_()
        (got, got_terms), (want, want_terms) = (f(student, teacher) for f in (compiled, module))
        torch.testing.assert_close([got, *got_terms], [want, *want_terms], rtol=1e-4, atol=1e-5)
        assert not any(term.requires_grad for term in got_terms)
        u = upstream((), torch.float32)
        grads = [torch.autograd.grad(x, student, u)[0] for x in (got, want)]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5 * grads[1].abs().max().item())
    if features > 1 or TorchVersion(torch.__version__) >= "2.7":  # 2.6 compiles a single column for many lengths
        assert counter.frame_count <= {"reference": 2, "fused": 3}[implementation]


@pytest.mark.parametrize(
    ("implementation", "shape"),
    # The last streams in both precisions; the plain formula has one way for all.
    [("reference", (24, 8)), ("fused", (8, 24)), ("fused", (24, 8)), ("fused", (33000, 2))],
)
def test_static_shapes_autocast_and_teacher_gradients(implementation, shape):
    torch._dynamo.reset()
    module = RSDLoss(implementation=implementation, reduction="none")
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=BACKENDS[implementation])
    student, teacher = (x.requires_grad_() for x in pair(*shape, torch.float32))
    for enabled in (False, True):
        results = []
        for f in (compiled, module):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                value = f(student, teacher)
            results.append([value, *torch.autograd.grad(value, (student, teacher), upstream(value.shape, value.dtype))])
        # bfloat16 has 8 bits, and a compiler may keep more of an intermediate than eager does.
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=(3e-2 if enabled else 1e-5) * want.abs().max().item())
