"""gather_distributed: every process gets the loss of all rows, and its part of that loss's gradient.

The truth is the loss of the concatenated rows in one process, which each process computes for itself.
"""

import functools

import pytest
import torch
from conftest import pair, upstream

from rsd_loss import rsd_loss

IMPLEMENTATIONS = ("reference", "fused")
# Rows in each process, and features: tall and wide, D = B and one more, uneven, processes with one row and fewer than
# two features each, features that do not divide, blocks that are streamed.
SHARES = [
    ((8, 8), 6),
    ((3, 3), 40),
    ((4, 4), 8),
    ((4, 4), 9),
    ((5, 1, 7), 5),
    ((1, 1, 1), 5),
    ((1, 2, 1), 3),
    ((2, 1), 1),
    ((9, 1, 2, 5), 7),
    ((2, 1, 1, 3), 50),
    ((1, 1, 1, 1), 6),
    ((1500, 3, 1100), 4),
]


def shard(rank, rows, x):
    """This process's rows of a whole batch, as a leaf."""
    return x.split(rows)[rank].clone()


def loss_and_gradients(rank, group, rows, features, implementation, reduction, dtype):
    student, teacher = (x.requires_grad_() for x in pair(sum(rows), features))
    settings = {"kappa": 0.1, "reduction": reduction, "return_terms": True}
    want, want_terms = rsd_loss(student, teacher, implementation="reference", **settings)
    # A loss weighted differently in each process: the gradient is that of the sum of all processes' losses.
    weights = [upstream(want.shape, want.dtype, seed=r) for r in range(len(rows))]
    want_grads = torch.autograd.grad(want, (student, teacher), sum(weights))
    ours = [shard(rank, rows, x.detach()).to(dtype).requires_grad_() for x in (student, teacher)]
    got, terms = rsd_loss(
        *ours, implementation=implementation, gather_distributed=True, process_group=group, **settings
    )
    # float64 within rounding; float32 by its own, times the number of terms and the cancellation between them.
    close = functools.partial(
        torch.testing.assert_close,
        check_dtype=False,
        **({"rtol": 1e-9, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}),
    )
    close(got, want)
    close(torch.stack(terms), torch.stack(want_terms))
    assert not any(term.requires_grad for term in terms)
    grads = torch.autograd.grad(got, ours, weights[rank].to(got.dtype))
    for grad, want_grad in zip(grads, want_grads, strict=True):
        assert grad.dtype == dtype
        close(grad, shard(rank, rows, want_grad))
    with torch.no_grad():
        value, _ = rsd_loss(
            *ours, implementation=implementation, gather_distributed=True, process_group=group, **settings
        )
    close(value, want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("rows", "features"), SHARES, ids=str)
def test_loss_and_gradients(pool, rows, features, implementation, reduction):
    pool.run(len(rows), loss_and_gradients, rows, features, implementation, reduction, torch.float64)
