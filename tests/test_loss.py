"""Values and gradients, against the published code's numbers, an independent oracle and finite differences."""

import copy
import functools
import pickle

import pytest
import torch
from conftest import LOSSES, compiled_loss, golden, named_loss, pair, upstream
from oracle import oracle
from torch.utils.checkpoint import checkpoint

from rsd_loss import RSDLoss, RSDTerms, cross_correlation, rsd_loss

GOLDEN = golden()
# Wide, tall, square, one feature, more rows than one streamed block (a quarter) and not a multiple of it.
SHAPES = [(8, 20), (20, 8), (16, 16), (5, 1), (3, 40), (1100, 6)]


def gradients(loss, *inputs, u=None):
    value = loss(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return value.detach(), torch.autograd.grad(value, wanted, upstream(value.shape, value.dtype) if u is None else u)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_float64(loss, name):
    case = GOLDEN[name]
    student = case["student"].double().requires_grad_()
    value = loss(student, case["teacher"].double(), kappa=case["kappa"].item())
    (grad,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value, case["loss"], rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, case["grad_student"], rtol=0, atol=1e-8 * case["grad_student"].abs().max())


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_float32(loss, name):
    case = GOLDEN[name]
    student = case["student"].clone().requires_grad_()
    value = loss(student, case["teacher"], kappa=case["kappa"].item())
    (grad,) = torch.autograd.grad(value, student)
    assert value.dtype == grad.dtype == torch.float32
    # 2e-6 is sixteen units in the last place of float32, for sums over hundreds of features.
    torch.testing.assert_close(value, case["loss"].float(), rtol=2e-6, atol=0)
    want = case["grad_student"].float()
    torch.testing.assert_close(grad, want, rtol=0, atol=2e-5 * want.abs().max())


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (2, 3)])
@pytest.mark.parametrize("kappa", [0.0, 0.01, 1.0])
def test_oracle(loss, shape, kappa):
    student, teacher = pair(*shape)
    losses, grad = oracle(student.tolist(), teacher.tolist(), kappa)
    student.requires_grad_()
    value = loss(student, teacher, kappa=kappa, reduction="none")
    torch.testing.assert_close(value, torch.tensor(losses, dtype=torch.float64), rtol=1e-11, atol=1e-11)
    (got,) = torch.autograd.grad(value.sum(), student)
    torch.testing.assert_close(got, torch.tensor(grad, dtype=torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_gradcheck(implementation, reduction, shape, wanted):
    inputs = [x.requires_grad_(w) for x, w in zip(pair(*shape), wanted, strict=True)]
    settings = {"kappa": 0.3, "reduction": reduction, "implementation": implementation}
    assert torch.autograd.gradcheck(lambda s, t: rsd_loss(s, t, **settings), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_fused_equals_reference(shape, reduction, wanted):
    # kappa is large, so that the decorrelation term carries its share of the gradient.
    inputs = [x.requires_grad_(w) for x, w in zip(pair(*shape), wanted, strict=True)]
    got, want = (
        gradients(lambda s, t, name=name: rsd_loss(s, t, kappa=0.7, reduction=reduction, implementation=name), *inputs)
        for name in ("fused", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_value_without_gradient_is_the_same(loss, shape):
    student, teacher = pair(*shape)
    with torch.no_grad():
        value = loss(student.requires_grad_(), teacher)
    assert not value.requires_grad
    torch.testing.assert_close(
        value, rsd_loss(student, teacher, implementation="reference").detach(), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_terms(implementation, shape):
    """Compiled they are in test_compile."""
    loss = functools.partial(rsd_loss, implementation=implementation)
    student, teacher = pair(*shape)
    student.requires_grad_()
    for reduction in ("sum", "mean", "none"):
        value, terms = loss(student, teacher, kappa=0.2, reduction=reduction, return_terms=True)
        assert isinstance(terms, RSDTerms)
        assert value.requires_grad
        assert not terms.invariance.requires_grad
        assert not terms.decorrelation.requires_grad
        total = value.sum() if reduction == "none" else value
        torch.testing.assert_close(total.detach(), terms.invariance + 0.2 * terms.decorrelation)
        p = cross_correlation(student, teacher).detach()
        eye = torch.eye(shape[1], dtype=torch.bool)
        scale = shape[1] if reduction == "mean" else 1
        torch.testing.assert_close(terms.invariance, (p[eye] - 1).square().sum() / scale)
        torch.testing.assert_close(terms.decorrelation, p[~eye].square().sum() / scale, rtol=1e-8, atol=1e-12)


def test_cross_correlation_of_unequal_widths():
    student, teacher = pair(9, 4)[0], pair(9, 6, seed=5)[1]
    p = cross_correlation(student, teacher, eps=0.0)
    assert p.shape == (6, 4)
    # Without eps this is Pearson's correlation, which torch computes by itself.
    torch.testing.assert_close(p, torch.corrcoef(torch.cat([teacher, student], dim=1).T)[:6, 6:])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_module_equals_function(implementation, reduction):
    settings = {"kappa": 0.05, "eps": 1e-3, "reduction": reduction, "return_terms": True}
    module = RSDLoss(implementation=implementation, **settings)
    student, teacher = pair(8, 12)
    for a, b in zip(
        module(student, teacher), rsd_loss(student, teacher, implementation=implementation, **settings), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not list(module.parameters())
    assert not module.state_dict()
    assert repr(module) == (
        f"RSDLoss(kappa=0.05, eps=0.001, reduction='{reduction}', gather_distributed=False, "
        f"implementation='{implementation}', return_terms=True)"
    )
    assert repr(copy.deepcopy(module)) == repr(pickle.loads(pickle.dumps(module))) == repr(module)


def test_auto_is_the_default():
    student, teacher = pair(8, 12, torch.float32)
    assert torch.equal(rsd_loss(student, teacher), rsd_loss(student, teacher, implementation="fused"))


@pytest.mark.parametrize("shape", [(8, 20), (1026, 8)])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_memory_layout(implementation, shape, layout):
    rows, features = shape
    student, teacher = pair(rows, features)
    if layout == "transposed":
        views = [x.T.contiguous().T for x in (student, teacher)]
    elif layout == "sliced":
        views = [torch.cat([x, x + 1], dim=1)[:, ::2][:, :features] for x in (student, teacher)]
        student, teacher = (x.clone() for x in views)
    else:  # one column, repeated without memory of its own
        views = [x[:, :1].expand(rows, features) for x in (student, teacher)]
        student, teacher = (x.contiguous() for x in views)
    assert not any(x.is_contiguous() for x in views)
    results = []
    for s, t in ((student, teacher), views):
        s = s.detach().requires_grad_()
        results.append(gradients(lambda a, b: rsd_loss(a, b, implementation=implementation), s, t))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1030, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_dead_features(implementation, shape, dtype, constant):
    dead_features(functools.partial(rsd_loss, implementation=implementation), shape, dtype, constant)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])  # more rows are no other graph: float16 has one block
def test_dead_features_compiled(shape):
    dead_features(compiled_loss(), shape, torch.float16, 0.1)


@pytest.mark.parametrize("eps", [1e-8, 1e-12, 1e-30])
def test_dead_features_and_a_small_eps(implementation, eps):
    loss = functools.partial(rsd_loss, implementation=implementation, eps=eps)
    dead_features(loss, (1030, 8), torch.bfloat16, 0.1)


def dead_features(loss, shape, dtype, constant):
    student, teacher = pair(*shape, dtype)
    student[:, 0] = student[:, 1] = teacher[:, 1] = teacher[:, 2] = constant
    student.requires_grad_()
    teacher.requires_grad_()
    value, grads = gradients(loss, student, teacher)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1030, 8)])
def test_backward_twice(implementation, shape):
    # Eager only: a compiled backward gives away what it saved, and torch raises at the second.
    student, teacher = pair(*shape)
    student.requires_grad_()
    value = rsd_loss(student, teacher, reduction="none", implementation=implementation)
    u = upstream(value.shape, value.dtype)
    (first,) = torch.autograd.grad(value, student, u, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, student, u)
    assert torch.equal(first, second)
    assert torch.equal(first, kept)


def test_teacher_gets_no_gradient_unless_it_asks(loss):
    student, teacher = pair(8, 12)
    student.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1100, 6)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_every_output_is_written(monkeypatch, implementation, shape, dtype):
    def poisoned(name):
        empty = getattr(torch, name)
        return lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan"))

    student, teacher = pair(*shape, dtype)
    student.requires_grad_()
    teacher.requires_grad_()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided")):
        monkeypatch.setattr(owner, name, poisoned(name))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(float("nan")))
    value, grads = gradients(lambda s, t: rsd_loss(s, t, implementation=implementation), student, teacher)
    assert value.isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (1026, 8)])
def test_inputs_are_left_alone(implementation, shape):
    inputs = pair(*shape)
    kept = [x.clone() for x in inputs]
    gradients(lambda s, t: rsd_loss(s, t, implementation=implementation), *(x.requires_grad_() for x in inputs))
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (1100, 5)])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(shape, reentrant, implementation):
    """Which hands out each saved tensor once."""
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    criterion = functools.partial(rsd_loss, implementation=implementation)
    want = torch.autograd.grad(criterion(student, teacher), (student, teacher))
    loss = checkpoint(criterion, student, teacher, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close([student.grad, teacher.grad], [*want])


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (1100, 3)])
def test_function_transforms(shape):
    """The default takes the plain formula there; the fast one says so."""
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    value = rsd_loss(student, teacher, reduction="none")
    rows = [torch.autograd.grad(value, student, u, retain_graph=True)[0] for u in torch.eye(shape[1]).double()]
    x, t = student.detach(), teacher.detach()

    def losses(x):
        return rsd_loss(x, t, reduction="none")

    torch.testing.assert_close(torch.func.grad(lambda x: losses(x).sum())(x), sum(rows))
    torch.testing.assert_close(torch.func.jacrev(losses)(x), torch.stack(rows))
    both = torch.stack([x, 2 * x + 1])
    want = torch.stack([losses(y) for y in both])
    torch.testing.assert_close(torch.func.vmap(losses)(both), want)
    u = upstream(shape, torch.float64)
    _, along = torch.func.jvp(losses, (x,), (u,))
    torch.testing.assert_close(along, torch.stack([(row * u).sum() for row in rows]))
    with pytest.raises(RuntimeError, match=r'"fused" cannot run here: torch.func .*: pass implementation="reference"'):
        torch.func.grad(lambda x: rsd_loss(x, t, implementation="fused"))(x)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (1100, 3)])
def test_batched_gradients(shape, implementation):
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    value = rsd_loss(student, teacher, reduction="none", implementation=implementation)
    upstreams = upstream((2, shape[1]), torch.float64)
    batched = torch.autograd.grad(value, (student, teacher), upstreams, is_grads_batched=True, retain_graph=True)
    for i, u in enumerate(upstreams):
        one = torch.autograd.grad(value, (student, teacher), u, retain_graph=True)
        torch.testing.assert_close([x[i] for x in batched], [*one])
    mapped = torch.func.vmap(lambda u: torch.autograd.grad(value, student, u, retain_graph=True)[0])(upstreams)
    torch.testing.assert_close(mapped, batched[0])
    if implementation != "reference":
        with pytest.raises(RuntimeError, match='have no second derivative: pass implementation="reference"'):
            torch.autograd.grad(value, student, upstreams, is_grads_batched=True, create_graph=True)


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (1100, 3)])
def test_teacher_of_inference_mode(shape, implementation):
    student, teacher = pair(*shape)
    with torch.inference_mode():
        same = teacher.clone()
    student.requires_grad_()
    values = [rsd_loss(student, x, implementation=implementation) for x in (same, teacher)]
    torch.testing.assert_close(*[torch.autograd.grad(value, student)[0] for value in values])


@pytest.mark.parametrize("offset", [100.3, 10000.3])
@pytest.mark.parametrize("shape", [(40, 60), (300, 4), (2000, 4)])  # one block of rows and several
@pytest.mark.parametrize("name", LOSSES)
def test_constant_features_with_an_offset_are_dead(name, shape, offset):
    """Exactly, though their rounded mean is another number."""
    loss = named_loss(name)
    student, teacher = pair(*shape, torch.float32)
    student[:, 0] = teacher[:, 0] = offset
    student.requires_grad_()
    losses = loss(student, teacher, reduction="none")
    assert losses[0] == 1
    assert not cross_correlation(student, teacher)[0].any()
    assert not cross_correlation(student, teacher)[:, 0].any()


def test_rows_in_order_keep_their_digits():
    """A batch whose first rows are not like the rest, as tokens of padding are."""
    student, teacher = pair(20000, 4)
    student[:64] -= 300
    teacher[:64] -= 300
    student.requires_grad_()
    value = rsd_loss(student, teacher, implementation="reference")
    (want,) = torch.autograd.grad(value, student)
    single = student.detach().float().requires_grad_()
    got = rsd_loss(single, teacher.float())
    (grad,) = torch.autograd.grad(got, single)
    plain = rsd_loss(single, teacher.float(), implementation="reference")
    (plain_grad,) = torch.autograd.grad(plain, single)
    # Two large terms cancel: a few times the error of the plain formula is another order of rounding, a hundred is not.
    assert (grad - want).abs().max() <= 4 * (plain_grad - want).abs().max()
    assert (got - value).abs() <= 4 * (plain - value).abs() + 1e-6 * value
