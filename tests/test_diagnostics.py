"""The numbers to log, against their formulas written out on the full matrices."""

import pytest
import torch
from conftest import DEVICE, pair
from test_memory import SYNCHRONISING, Watch

from rsd_loss import cross_correlation
from rsd_loss.diagnostics import summary

SHAPES = [(5, 12), (12, 5), (7, 7), (30, 1), (4, 3), (2, 3)]


def hsic(x, y):
    """The unbiased estimator of Song et al. (2012), as they write it: the diagonals are left out."""
    k, m = ((z @ z.T).fill_diagonal_(0) for z in (x, y))
    rows, one = len(x), x.new_ones(len(x))
    if rows < 4:
        return x.new_full((), torch.nan)
    whole = (one @ k @ one) * (one @ m @ one) / ((rows - 1) * (rows - 2))
    return ((k @ m).trace() + whole - 2 / (rows - 2) * (one @ k @ m @ one)) / (rows * (rows - 3))


def naive(student, teacher):
    p = cross_correlation(student, teacher, eps=1e-5)
    off_diagonal = p[~torch.eye(len(p), dtype=torch.bool)]
    z = (student - student.mean(0)) / (student.std(0, correction=0) + 1e-5)
    singular = torch.linalg.svdvals(z)
    weights = singular / singular.sum()
    entropy = -(weights * weights.clamp_min(1e-300).log()).sum()
    cka = hsic(student, teacher) / (hsic(student, student) * hsic(teacher, teacher)).sqrt()
    rms = off_diagonal.square().mean().sqrt() if len(p) > 1 else p.new_zeros(())
    return p.diagonal().mean(), rms, entropy.exp(), cka


@pytest.mark.parametrize("shape", SHAPES)
def test_summary(shape):
    student, teacher = pair(*shape)
    student.requires_grad_()
    got = summary(student, teacher)
    # A singular value that should be 0 comes as the root of a rounding error, 1e-8.
    want = naive(student.detach(), teacher)
    torch.testing.assert_close(list(got), list(want), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not any(x.requires_grad for x in got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_summary_in_other_dtypes(dtype, autocast):
    student, teacher = pair(40, 24, dtype)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        got = summary(student, teacher)
    assert all(x.dtype == torch.float32 for x in got)
    want = summary(student.double(), teacher.double())
    torch.testing.assert_close(list(got), [x.float() for x in want], rtol=1e-4, atol=1e-4)  # float32 from there on


@pytest.mark.parametrize("shape", SHAPES)
def test_summary_of_two_dtypes(shape):
    student, teacher = pair(*shape)
    want = summary(student.float().double(), teacher)
    torch.testing.assert_close(list(summary(student.float(), teacher)), list(want), equal_nan=True)


@pytest.mark.parametrize("shape", [(128, 192), (128, 2048), (2000, 64)])
def test_alignment_of_unrelated_features_is_near_zero(shape):
    """The usual estimator has 0.60 and 0.94 for the first two. Both have an offset, which must not matter either."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape) + 10
    # Its spread over draws is about 1 / rows.
    assert summary(student, teacher).linear_cka.abs() < 5 / shape[0]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e9, 1e15])
def test_alignment_does_not_see_the_scale(shape, scale):
    student, teacher = pair(*shape)
    want = summary(student, teacher).linear_cka.float()
    got = summary((student * scale).float(), (teacher * scale).float()).linear_cka
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)  # float32


def test_summary_of_a_constant_feature():
    x = torch.randn(2000, 4)
    x[:, 0] = 10000.3
    torch.testing.assert_close(summary(x, x).mean_diagonal.item(), 0.75, rtol=0, atol=1e-4)


def test_extremes():
    x = torch.randn(50, 6, dtype=torch.float64)
    same = summary(x, 3 * x + 1)
    torch.testing.assert_close(same.mean_diagonal.item(), 1.0, rtol=0, atol=1e-4)  # eps
    torch.testing.assert_close(same.linear_cka.item(), 1.0)
    one = summary(x[:, :1].expand(-1, 6) * torch.arange(1, 7), x)
    torch.testing.assert_close(one.effective_rank.item(), 1.0, rtol=1e-5, atol=0)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    torch.testing.assert_close(summary(x @ rotation, x).linear_cka.item(), 1.0)
    assert all(value.isfinite() for value in summary(torch.ones(4, 3), torch.ones(4, 3)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_summary_of_what_is_not_finite_is_nan(shape, value):
    """It is for looking at a run in trouble, and must not be what ends it."""
    student = torch.randn(shape)
    student[1, 2] = value
    assert all(number.isnan() for number in summary(student, torch.randn(shape)))


@pytest.mark.parametrize("shape", [(8, 200), (200, 8)])
def test_summary_is_cheap(shape):
    student, teacher = pair(*shape, torch.float32)
    with Watch() as watch:
        summary(student, teacher)
    assert watch.largest <= student.numel()
    assert not SYNCHRONISING & set(watch.operations)


def test_widths_differ():
    with pytest.raises(ValueError, match=r"project the student with DecouplingProjector\(4, 6\)"):
        summary(torch.randn(8, 4), torch.randn(8, 6))
