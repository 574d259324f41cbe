"""The Triton kernels through the compilers, without a GPU: to machine code, and under torch.compile."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import pair
from torch.torch_version import TorchVersion

from rsd_loss import _triton, rsd_loss

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ARCHES = (80, 90)
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# Each kernel with the switches that change its code.
KERNELS = (
    ("_moments", {}),
    ("_standardise", {"max_parts": 0}),
    ("_standardise", {"max_parts": _triton._PARTS}),
    ("_columns", {"tall": True}),
    ("_columns", {"tall": False}),
    ("_gradient", {}),
)
# How the launcher specialises the arguments: contiguous inputs whose widths are multiples of 16; inputs of any width
# and strides; a single feature. The integers 1 become constants, and the multiples of 16 are marked as such.
LAYOUTS = {
    "aligned": (frozenset({"s_col", "t_col", "upstream_stride"}), True),
    "any": (frozenset(), False),
    "one feature": (frozenset({"features", "s_col", "t_col", "upstream_stride"}), False),
}
_FLOAT32 = {"moments_ptr", "stats_ptr", "losses_ptr", "d_ptr", "off_ptr", "upstream_ptr"}


def compile_kernel(name, switches, arch, dtype, layout):
    """The compiled kernel, as Triton would make it for embeddings of this dtype on this architecture."""
    kernel = getattr(_triton, name)
    ones, aligned = LAYOUTS[layout]
    constants = {"block_r": _triton._BLOCK_R, "block_c": _triton._BLOCK_C, **switches}
    constants |= {p.name: 1 for p in kernel.params if p.name in ones}
    signature, attributes = {}, {}
    for index, name_ in enumerate(kernel.arg_names):
        if name_ in constants:
            signature[name_] = "constexpr"
        elif name_.endswith("_ptr"):
            signature[name_] = "*fp32" if name_ in _FLOAT32 else f"*{DTYPES[dtype]}"
        else:
            signature[name_] = "fp32" if name_ in ("eps", "eps_norm", "kappa") else "i32"
        if signature[name_].startswith("*") or (signature[name_] == "i32" and (aligned or name_ == "chunk")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32))


def resources(compiled, folder):
    """Registers per thread, shared memory per program and bytes of stack per thread, which here are all spills."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cuobjdump = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("cuobjdump not found, neither in triton nor on PATH")
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [cuobjdump, "--dump-resource-usage", str(path)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", log)}
    shared = int(compiled.metadata.shared)
    return {"registers": found["REG"], "shared_bytes": shared, "spill_bytes": found["STACK"] + found["LOCAL"]}


IDS = [name + "".join(f"-{key}={value}" for key, value in switches.items()) for name, switches in KERNELS]


def test_every_kernel_is_listed():
    entry_points = {"_moments", "_standardise", "_columns", "_gradient"}
    helpers = {"_merge", "_deviations", "_moments_of"}
    found = {name for name, value in vars(_triton).items() if isinstance(value, triton.JITFunction)}
    assert found == entry_points | helpers
    assert {name for name, _ in KERNELS} == entry_points


@pytest.mark.skipif(TorchVersion(triton.__version__) < "3.3", reason="another signature before Triton 3.3")
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("name", "switches"), KERNELS, ids=IDS)
def test_compiles_without_spills(name, switches, arch, tmp_path, record_property):
    for dtype in DTYPES:
        # The layouts differ in the arithmetic of addresses only: one dtype does for the rarer ones.
        for layout in LAYOUTS if dtype == "float16" else ("aligned",):
            used = resources(compile_kernel(name, switches, arch, dtype, layout), tmp_path)
            record_property(f"{dtype} {layout}", used)
            assert used["spill_bytes"] == 0, (dtype, layout, used)
            # 64 registers let 8 programs of 4 warps, half of the warps it has room for, share a multiprocessor.
            assert used["registers"] <= 64, (dtype, layout, used)


class Driver:
    """Tells dynamo what the kernels would be compiled for."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

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
