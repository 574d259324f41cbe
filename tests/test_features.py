"""Pooling and dense pairs, against explicit indexing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rsd_loss import rsd_loss
from rsd_loss.features import dense_pairs, pool


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pool_map(memory_format):
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=memory_format)
    torch.testing.assert_close(pool(x), F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_pool_tokens():
    x = torch.randn(2, 7, 5)
    torch.testing.assert_close(pool(x), x.sum(dim=1) / 7)
    assert torch.equal(pool(x, prefix_tokens=np.int64(2)), pool(x, prefix_tokens=2))
    torch.testing.assert_close(pool(x, prefix_tokens=2), (x[:, 2] + x[:, 3] + x[:, 4] + x[:, 5] + x[:, 6]) / 5)


def test_dense_pairs_keeps_place_and_image():
    image, row, column = torch.meshgrid(torch.arange(2.0), torch.arange(3.0), torch.arange(4.0), indexing="ij")
    student = torch.stack([image, row, column, row * column], dim=1)  # (2, 4, 3, 4)
    prefix = torch.full((2, 2, 3), float("nan"))
    teacher = torch.cat([prefix, torch.stack([image, row, column], dim=-1).flatten(1, 2)], dim=1)  # (2, 2 + 12, 3)
    s, t = dense_pairs(student, teacher, prefix_tokens=(0, 2), grid=(3, 4))
    assert s.shape == (24, 4)
    assert t.shape == (24, 3)
    assert torch.equal(s[:, :3], t)
    assert torch.equal(t[0], torch.tensor([0.0, 0.0, 0.0]))
    assert torch.equal(t[-1], torch.tensor([1.0, 2.0, 3.0]))


def test_dense_pairs_average_onto_the_coarser_grid_of_each_axis():
    student, teacher = torch.randn(2, 3, 8, 2), torch.randn(2, 5, 4, 6)
    s, t = dense_pairs(student, teacher)
    assert s.shape == (2 * 4 * 2, 3)
    assert t.shape == (2 * 4 * 2, 5)
    # Place (row 1, column 0) of image 1: two student rows, and three teacher columns.
    index = 1 * 8 + 1 * 2 + 0
    torch.testing.assert_close(s[index], student[1, :, 2:4, 0].mean(dim=1))
    torch.testing.assert_close(t[index], teacher[1, :, 1, 0:3].mean(dim=1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dense_pairs_of_equal_grids(memory_format):
    student, teacher = (torch.randn(2, c, 3, 3).contiguous(memory_format=memory_format) for c in (4, 6))
    s, t = dense_pairs(student, teacher)
    assert torch.equal(s, student.permute(0, 2, 3, 1).reshape(-1, 4))
    assert torch.equal(t, teacher.permute(0, 2, 3, 1).reshape(-1, 6))


def test_dense_pairs_of_tokens_with_grids_of_their_own():
    student, teacher = torch.randn(2, 1 + 16, 4), torch.randn(2, 8, 6)
    s, t = dense_pairs(student, teacher, prefix_tokens=(1, 0), grid=(None, (2, 4)))
    assert s.shape == (2 * 2 * 4, 4)
    assert torch.equal(t, teacher.reshape(-1, 6))
    torch.testing.assert_close(s[0], (student[0, 1] + student[0, 5]) / 2)


def test_channels_last_on_either_side():
    student, teacher = torch.randn(2, 6, 4, 4), torch.randn(2, 8, 4, 6)
    want = dense_pairs(student, teacher)
    last_s, last_t = (x.permute(0, 2, 3, 1) for x in (student, teacher))
    for pair, chosen in (
        ((last_s, last_t), True),
        ((last_s, teacher), (True, None)),
        ((student, last_t), [False, True]),
    ):
        assert all(map(torch.equal, dense_pairs(*pair, channels_last=chosen), want))
    torch.testing.assert_close(pool(last_t, channels_last=True), pool(teacher))
    assert pool(torch.randn(2, 4, 4, 6), channels_last=False).shape == (2, 4)


def test_tokens_of_equal_grids_are_not_copied():
    """25,088 x 384 rows are 38 MB a side, and the loss needs little more."""
    student, teacher = torch.randn(2, 16, 4), torch.randn(2, 16, 6)
    rows = dense_pairs(student, teacher)
    assert [x.data_ptr() for x in rows] == [student.data_ptr(), teacher.data_ptr()]


def test_pairs_may_be_lists():
    student, teacher = torch.randn(2, 1 + 8, 4), torch.randn(2, 9, 6)
    want = dense_pairs(student, teacher, prefix_tokens=(1, 1), grid=(2, 4))
    assert all(map(torch.equal, dense_pairs(student, teacher, prefix_tokens=[1, 1], grid=[2, 4]), want))
    assert all(map(torch.equal, dense_pairs(student, teacher, prefix_tokens=1, grid=[[2, 4], (2, 4)]), want))
    by_numpy = {"prefix_tokens": np.int64(1), "grid": tuple(np.array([2, 4]))}
    assert all(map(torch.equal, dense_pairs(student, teacher, **by_numpy), want))


def test_any_number_of_tokens_in_one_graph():
    """The grid that a caller gives is not looked for, which the compiler could not follow."""
    compiled = torch.compile(dense_pairs, fullgraph=True, dynamic=True, backend="eager")
    for side in (4, 5):
        tokens = torch.randn(2, side * side, 3)
        got = compiled(tokens, tokens, grid=(side, side))
        assert all(map(torch.equal, got, dense_pairs(tokens, tokens)))


class Pairs(torch.nn.Module):
    def forward(self, feature_map, tokens):
        return dense_pairs(feature_map, tokens, grid=tuple(feature_map.shape[2:]))


def test_an_exported_grid_stays_a_symbol():
    dynamic = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}, {1: torch.export.Dim.DYNAMIC}
    example = torch.randn(2, 3, 4, 4), torch.randn(2, 16, 3)
    exported = torch.export.export(Pairs(), example, dynamic_shapes=dynamic).module()
    larger = torch.randn(2, 3, 5, 5), torch.randn(2, 25, 3)
    torch.testing.assert_close(exported(*larger), Pairs()(*larger))


def test_gradient_reaches_the_features_compiled():
    student = torch.randn(2, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, 6, dtype=torch.float64)

    def total(student, teacher):
        s, t = dense_pairs(student, teacher, prefix_tokens=1)
        return rsd_loss(s, t) + rsd_loss(pool(student), pool(teacher, prefix_tokens=1))

    want = torch.autograd.grad(total(student, teacher), student)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(student, teacher), student)
    torch.testing.assert_close(got, want)
