"""The projector's layers, size, initialisation and manners."""

import numpy as np
import pytest
import torch
from torch import nn

from rsd_loss import DecouplingProjector


def test_layers_and_parameter_count():
    projector = DecouplingProjector(5, 7)
    assert [type(layer) for layer in projector.children()] == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
    # Linear 5 -> 10, BatchNorm weight and bias, Linear 10 -> 7: no biases.
    assert sum(p.numel() for p in projector.parameters()) == 5 * 10 + 2 * 10 + 10 * 7
    assert projector.expand.bias is None
    assert projector.project.bias is None


def test_forward_is_the_stated_composition():
    projector = DecouplingProjector(np.int64(5), np.int32(7), expansion=np.int16(3)).double()
    x = torch.randn(9, 5, dtype=torch.float64)
    h = x @ projector.expand.weight.T
    h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(projector(x), nn.functional.gelu(h) @ projector.project.weight.T)
    assert projector.expand.out_features == 15


def test_initialisation():
    torch.manual_seed(0)
    projector = DecouplingProjector(256, 512)
    for weight in (projector.expand.weight, projector.project.weight):
        # The standard error of a standard deviation over 131072 draws is 0.2 percent.
        assert weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert abs(weight.mean().item()) < 3e-4
    assert torch.equal(projector.norm.weight, torch.ones(512))
    assert torch.equal(projector.norm.bias, torch.zeros(512))


def test_reset_parameters_starts_anew():
    projector, fresh = DecouplingProjector(4, 4), DecouplingProjector(4, 4)
    projector(torch.randn(8, 4) + 5)
    for each in (projector, fresh):
        torch.manual_seed(1)
        each.reset_parameters()
    for name, value in fresh.state_dict().items():
        assert torch.equal(projector.state_dict()[name], value), name


def test_one_row_in_eval_mode():
    projector = DecouplingProjector(4, 6).eval()
    x = torch.randn(3, 4)
    torch.testing.assert_close(projector(x[:1]), projector(x)[:1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype(dtype):
    projector = DecouplingProjector(4, 6, device="cpu", dtype=dtype)
    out = projector(torch.randn(8, 4, dtype=dtype))
    out.sum().backward()
    assert out.dtype == dtype
    assert {p.dtype for p in projector.parameters()} == {dtype}
    assert all(p.grad.isfinite().all() for p in projector.parameters())
    meta = DecouplingProjector(4, 6, device="meta")
    assert {p.device.type for p in [*meta.parameters(), *meta.buffers()]} == {"meta"}


@pytest.mark.parametrize("training", [True, False])
def test_compiles_in_one_graph(training):
    projector = DecouplingProjector(4, 6).train(training)
    x = torch.randn(8, 4)
    # The running statistics must move alike, so each call starts from the same state.
    state = {name: value.clone() for name, value in projector.state_dict().items()}
    want = projector(x)
    moved = {name: value.clone() for name, value in projector.state_dict().items()}
    projector.load_state_dict(state)
    torch.testing.assert_close(torch.compile(projector, fullgraph=True)(x), want)
    for name, value in projector.state_dict().items():
        torch.testing.assert_close(value, moved[name])
