"""The Triton kernels through the compilers, without a GPU: to machine code, and under torch.compile."""

import os

import pytest
import torch
from conftest import pair
from torch.torch_version import TorchVersion

from rsd_loss import _triton, rsd_loss

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
ahead_of_time = pytest.importorskip("benchmarks.speed.triton_resources")

IDS = [name + "".join(f"-{key}={value}" for key, value in switches.items()) for name, switches in ahead_of_time.KERNELS]


def test_every_kernel_is_listed():
    entry_points = {"_moments", "_standardise", "_columns", "_gradient"}
    helpers = {"_merge", "_deviations", "_moments_of"}
    found = {name for name, value in vars(_triton).items() if isinstance(value, triton.JITFunction)}
    assert found == entry_points | helpers
    assert {name for name, _ in ahead_of_time.KERNELS} == entry_points


@pytest.mark.skipif(TorchVersion(triton.__version__) < "3.3", reason="another signature before Triton 3.3")
@pytest.mark.parametrize("arch", ahead_of_time.ARCHES)
@pytest.mark.parametrize(("name", "switches"), ahead_of_time.KERNELS, ids=IDS)
def test_compiles_without_spills(name, switches, arch, record_property):
    for dtype in ahead_of_time.DTYPES:
        # The layouts differ in the arithmetic of addresses only: one dtype does for the rarer ones.
        for layout in ahead_of_time.LAYOUTS if dtype == "float16" else ("aligned",):
            used = ahead_of_time.resources(ahead_of_time.compile_kernel(name, switches, arch, dtype, layout))
            record_property(f"{dtype} {layout}", used)
            assert used["spill_bytes"] == 0, (dtype, layout, used)
            # 64 registers let 8 programs of 4 warps, half of the warps it has room for, share a multiprocessor.
            assert used["registers"] <= 64, (dtype, layout, used)


class Driver:
    """Tells dynamo what the kernels would be compiled for."""

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (600, 5)], ids=str)
def test_one_graph(shape, dynamic, monkeypatch):
    side_table = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap").kernel_side_table
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda **_: True)
    monkeypatch.setattr("triton.runtime.driver._active", Driver(), raising=False)
    monkeypatch.setattr(_triton, "why_unavailable", lambda *_: None)
    kernels = []

    def backend(graph, _):
        for module in graph.modules():
            for node in module.graph.nodes:
                if "kernel_idx" in node.kwargs:
                    kernels.append(side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__)
        return lambda *_: (torch.zeros(()),)

    torch._dynamo.reset()
    student, teacher = pair(*shape, torch.float32)
    student.requires_grad_()
    loss = torch.compile(rsd_loss, fullgraph=True, dynamic=dynamic, backend=backend)
    loss(student, teacher, implementation="triton")
    torch._dynamo.reset()
    moments = ["_moments"] if shape[0] > _triton._ROWS else []
    assert sorted(kernels) == sorted([*moments, "_standardise", "_columns", "_gradient"])
