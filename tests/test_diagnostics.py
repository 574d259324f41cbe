"""The numbers to log, against their formulas written out on the full matrices."""

import pytest
import torch
from conftest import DEVICE, pair
from test_memory import SYNCHRONISING, Watch

from rsd_loss import cross_correlation, rsd_loss
from rsd_loss.diagnostics import redundancy, summary

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
    own = cross_correlation(teacher, teacher)
    repeated = (own.square().sum() - own.diagonal().square().sum()) / len(own)
    return p.diagonal().mean(), rms, entropy.exp(), cka, repeated


@pytest.mark.parametrize("shape", SHAPES)
def test_summary(shape):
    student, teacher = pair(*shape)
    student.requires_grad_()
    got = summary(student, teacher)
    # A singular value that should be 0 comes as the root of a rounding error, 1e-8.
    want = naive(student.detach(), teacher)
    torch.testing.assert_close(list(got), list(want), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert not any(x.requires_grad for x in got)
    assert torch.equal(redundancy(teacher), got.redundancy)
    _, terms = rsd_loss(teacher, teacher, reduction="mean", return_terms=True)
    torch.testing.assert_close(terms.decorrelation, got.redundancy, rtol=1e-9, atol=1e-9)


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
    constant = summary(torch.ones(4, 3), torch.ones(4, 3))
    assert [*constant[:3], constant.redundancy] == [0, 0, 1, 0]
    assert constant.linear_cka.isnan()


@pytest.mark.parametrize("shape", [(1024, 2048), (512, 768), (64, 4096), (2048, 64)])
def test_rounding_is_no_rank(shape):
    torch.manual_seed(0)
    student = torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    # In float32 each of min(B, D) directions keeps some 1e-8 of the entropy's weight.
    assert summary(student, torch.randn(shape)).effective_rank < 1.001


@pytest.mark.parametrize("shape", [(1024, 2048), (512, 768), (256, 64)])
def test_rank_of_a_nearly_collapsed_student(shape):
    """Its small directions are no rounding, though their squares are: the same as in float64 throughout."""
    torch.manual_seed(0)
    student = torch.randn(shape[0], 1) + 0.03 * torch.randn(shape)
    found, truth = (summary(x, torch.randn(shape)).effective_rank.item() for x in (student, student.double()))
    assert truth > 3
    assert found == pytest.approx(truth, rel=1e-3)  # float32 standardises


@pytest.mark.parametrize("far", [1.0, 1e4])
def test_alignment_that_cannot_be_estimated_is_nan(far):
    """One row holds all of the student's variance, and the estimate of its own HSIC is zero but for rounding."""
    student = torch.zeros(32, 8)
    student[0] = far
    assert summary(student, torch.randn(32, 8)).linear_cka.isnan()


def test_redundancy_counts_repetitions():
    x = torch.randn(100, 8, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(dim=0)).Q * 10  # eight uncorrelated features
    torch.testing.assert_close(redundancy(x.repeat(1, 5)).item(), 4.0, rtol=0, atol=1e-3)  # eps
    assert redundancy(x.repeat(1, 50)) < 49 < redundancy(x.repeat(1, 51))


def test_redundancy_names_its_argument():
    for bad, error in ((torch.randn(2, 3, 4), ValueError), (torch.ones(4, 3).int(), TypeError)):
        with pytest.raises(error, match=r"^teacher must be"):
            redundancy(bad)
    with pytest.raises(ValueError, match="at least 2 rows"):
        redundancy(torch.randn(1, 3))


def test_meta_tensors_in_autocast():
    x = torch.randn(8, 6, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert all(value.is_meta for value in summary(x, x))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_summary_of_what_is_not_finite_is_nan(shape, value):
    """It is for looking at a run in trouble, and must not be what ends it."""
    student = torch.randn(shape)
    student[1, 2] = value
    got = summary(student, torch.randn(shape))
    assert all(number.isnan() for number in got[:4])
    assert got.redundancy.isfinite()  # the teacher's


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
