"""Shared data, and the loss under test in each of its implementations, eager and compiled."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Pool

import rsd_loss

DATA = Path(__file__).parent / "data"
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when the compiler is loaded
# Where the numerical tests make their tensors: RSD_TEST_DEVICE=cuda, say.
DEVICE = os.environ.get("RSD_TEST_DEVICE", "cpu")
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
IMPLEMENTATIONS = ("reference", "fused")  # triton has a process of its own, for its interpreter

# The compiled loss is one function that every test calls with shapes, dtypes and settings of its own.
_new = hasattr(torch._dynamo.config, "recompile_limit")  # torch 2.6 has the older names only
setattr(torch._dynamo.config, "recompile_limit" if _new else "cache_size_limit", 256)
setattr(torch._dynamo.config, "accumulated_recompile_limit" if _new else "accumulated_cache_size_limit", 4096)


def pytest_collection_modifyitems(config, items):
    """Triton's interpreter has a process of its own, so each process leaves the other's tests out of its list."""
    elsewhere = "compiled" if os.environ.get("TRITON_INTERPRET") == "1" else "interpreted"
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(elsewhere)])
    items[:] = [item for item in items if not item.get_closest_marker(elsewhere)]
    # The longest first, beside all others; those of the pool side by side, as each of xdist's workers has its own.
    items.sort(key=lambda item: (item.name != "test_in_the_interpreter", "pool" not in item.fixturenames))


@functools.cache
def compiled_loss(backend="inductor"):
    return torch.compile(rsd_loss.rsd_loss, fullgraph=True, dynamic=True, backend=backend)


def named_loss(name, backend="inductor"):
    """rsd_loss with the implementation fixed, called as it is or compiled: "fused-compiled", say."""
    name, _, compiled = name.partition("-")
    return functools.partial(compiled_loss(backend) if compiled else rsd_loss.rsd_loss, implementation=name)


LOSSES = (*IMPLEMENTATIONS, "fused-compiled")  # test_compile has the plain formula compiled


@pytest.fixture(params=LOSSES)
def loss(request):
    """Compiled it is traced only; tests for which generated code may matter take `named_loss`."""
    return named_loss(request.param, backend="aot_eager")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def golden():
    """The published code's numbers in float64: name -> dict of student, teacher, kappa, loss, grad_student, ..."""
    cases = {}
    with np.load(DATA / "rsd_official_float64.npz") as data:
        for key in data.files:
            name, field = key.split("/")
            cases.setdefault(name, {})[field] = torch.as_tensor(data[key])
    return cases


def pair(rows, features, dtype=torch.float64, seed=0):
    """A student and a teacher that are correlated, shifted and of unequal scale."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = {"generator": generator, "dtype": torch.float64, "device": "cpu"}  # the same numbers on every device
    student = torch.randn(rows, features, **drawn)
    teacher = torch.randn(rows, features, **drawn) + 0.5 * student
    scale = torch.rand(features, **drawn) + 0.5
    return (student * scale + 1).to(DEVICE, dtype), (2 * teacher * scale - 3).to(DEVICE, dtype)


def upstream(shape, dtype, seed=1):
    """A random gradient to pull back: ones would hide a factor lost or a sum taken twice."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE, dtype)


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    pool = Pool(tmp_path_factory.mktemp("pool"))
    yield pool
    pool.close()
