"""What must hold for any embeddings, found by hypothesis."""

import pytest
import torch
from conftest import DEVICE, IMPLEMENTATIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from rsd_loss import cross_correlation, rsd_loss

# Rows and features on both sides of each other, so that the wide and the tall path both come up.
shapes = st.tuples(st.integers(2, 24), st.integers(1, 24))
kappas = st.floats(0, 2)
seeds = st.integers(0, 2**31)
pytestmark = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
checked = settings(max_examples=40, deadline=None)


def embeddings(shape, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64, device="cpu").to(DEVICE)
    return student, teacher


@checked
@given(shape=shapes, kappa=kappas, seed=seeds)
def test_order_of_the_batch_changes_nothing(implementation, shape, kappa, seed):
    student, teacher = embeddings(shape, seed)
    order = torch.randperm(shape[0], generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    a = rsd_loss(student, teacher, kappa=kappa, implementation=implementation)
    b = rsd_loss(student[order], teacher[order], kappa=kappa, implementation=implementation)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@checked
@given(shape=shapes, kappa=kappas, seed=seeds, by=st.floats(-1e3, 1e3))
def test_shifting_a_feature_changes_nothing(implementation, shape, kappa, seed, by):
    student, teacher = embeddings(shape, seed)
    moved = student.clone()
    moved[:, -1] += by
    a = rsd_loss(student, teacher, kappa=kappa, implementation=implementation)
    b = rsd_loss(moved, teacher, kappa=kappa, implementation=implementation)
    # A shift by 1e3 costs float64 three of its sixteen digits; with two nearly equal rows, eps is felt a little more.
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@checked
@given(shape=shapes, kappa=kappas, seed=seeds, by=st.floats(0.5, 100))
def test_scaling_changes_only_what_eps_does(implementation, shape, kappa, seed, by):
    student, teacher = embeddings(shape, seed)
    a = rsd_loss(student, teacher, kappa=kappa, eps=0.0, implementation=implementation)
    b = rsd_loss(student * by, teacher, kappa=kappa, eps=0.0, implementation=implementation)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@checked
@given(shape=shapes, seed=seeds)
def test_identical_embeddings_are_invariant(implementation, shape, seed):
    student, _ = embeddings(shape, seed)
    _, terms = rsd_loss(student, student, eps=0.0, implementation=implementation, return_terms=True)
    torch.testing.assert_close(terms.invariance, torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-20)


@checked
@given(shape=shapes, kappa=kappas, seed=seeds)
def test_reductions_agree(implementation, shape, kappa, seed):
    student, teacher = embeddings(shape, seed)
    none, mean, total = (
        rsd_loss(student, teacher, kappa=kappa, reduction=reduction, implementation=implementation)
        for reduction in ("none", "mean", "sum")
    )
    assert none.shape == (shape[1],)
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(none.mean(), mean)


@checked
@given(shape=shapes, seed=seeds)
def test_swapping_the_sides_transposes_the_matrix(implementation, shape, seed):
    student, teacher = embeddings(shape, seed)
    torch.testing.assert_close(cross_correlation(student, teacher), cross_correlation(teacher, student).T)
    a, b = (rsd_loss(*x, implementation=implementation) for x in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
