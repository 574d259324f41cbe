"""Every mistake gets one sentence that names the argument, what came and the way out; none reads a value."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import DEVICE

from rsd_loss import DecouplingProjector, RSDLoss, cross_correlation, rsd_loss
from rsd_loss.features import dense_pairs, pool

S, T = torch.randn(8, 6), torch.randn(8, 6)

EMBEDDINGS = {
    "map": (
        (torch.randn(8, 6, 2, 2), T),
        ValueError,
        r"student must be \(batch, features\), got shape \(8, 6, 2, 2\): pool",
    ),
    "vector": (
        (S, torch.randn(6)),
        ValueError,
        r"teacher must be \(batch, features\), got shape \(6,\): keep the batch",
    ),
    "rows": ((S, torch.randn(7, 6)), ValueError, "student has 8 rows and teacher 7: .*same sample"),
    "no features": ((torch.randn(8, 0), torch.randn(8, 0)), ValueError, "student must have at least one feature"),
    "no rows": (
        (torch.randn(0, 6), torch.randn(0, 6)),
        ValueError,
        "at least 2 rows to correlate over, got 0: .*drop_last",
    ),
    "one row": (
        (torch.randn(1, 6), torch.randn(1, 6)),
        ValueError,
        "at least 2 rows to correlate over, got 1: .*drop_last",
    ),
    "list": (([[1.0, 2.0]], T), TypeError, "student must be a torch.Tensor, got list: convert it"),
    "layers": (([S, S], T), TypeError, "got list: pick .*; for several layers, call the loss once for each"),
    "none": ((S, None), TypeError, "teacher must be a torch.Tensor, got NoneType: pick the embedding out"),
    "outputs": (((S, S), T), TypeError, "student must be a torch.Tensor, got tuple: pick the embedding out"),
    "int": ((S.long(), T), TypeError, "student must be float16, bfloat16, float32 or float64, got torch.int64"),
    "bool": ((S, T > 0), TypeError, "teacher must be float16, .*, got torch.bool"),
    "complex": ((S, T.to(torch.complex64)), TypeError, "teacher must be float16, .*, got torch.complex64"),
    "float8": ((S.to(torch.float8_e5m2), T), TypeError, "student must be float16, .*, got torch.float8_e5m2"),
    "sparse": (
        (S, T.to_sparse()),
        ValueError,
        r"teacher must be a dense tensor, got layout torch.sparse_coo: pass teacher.to_dense\(\)",
    ),
    "device": (
        (S, T.to("meta")),
        ValueError,
        r"student is on cpu and teacher on meta: move the teacher's with .to\(student.device\)",
    ),
}
NUMBERS = {
    "negative": (-0.1, ValueError, "finite number that is not negative, got -0.1"),
    "nan": (math.nan, ValueError, "finite number that is not negative, got nan"),
    "infinite": (math.inf, ValueError, "finite number that is not negative, got inf"),
    "string": ("0.1", TypeError, "must be a number, got str: pass a Python float"),
    "none": (None, TypeError, "must be a number, got NoneType"),
    "bool": (True, TypeError, "must be a number, got bool"),
    "complex": (1j, TypeError, "must be a number, got complex"),
    "tensor": (torch.tensor(0.1), TypeError, "must be a number, got Tensor: pass a Python float"),
    "numpy's infinity": (np.float32("inf"), ValueError, "finite number that is not negative, got inf"),
}


@pytest.mark.parametrize("function", [rsd_loss, cross_correlation, RSDLoss()])
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings(function, case):
    inputs, error, message = EMBEDDINGS[case]
    with pytest.raises(error, match=message):
        function(*inputs)


@pytest.mark.parametrize("widths", [(6, 4), (4, 6)])
def test_widths_name_the_projector(widths):
    student, teacher = (torch.randn(8, width) for width in widths)
    message = (
        f"student has {widths[0]} features and teacher {widths[1]}: .*DecouplingProjector\\({widths[0]}, {widths[1]}\\)"
    )
    with pytest.raises(ValueError, match=message):
        rsd_loss(student, teacher)


@pytest.mark.parametrize("name", ["kappa", "eps"])
@pytest.mark.parametrize("case", NUMBERS)
def test_numbers(name, case):
    value, error, message = NUMBERS[case]
    with pytest.raises(error, match=f"{name} must be a.*{message.removeprefix('must be a ')}"):
        rsd_loss(S, T, **{name: value})
    with pytest.raises(error, match=f"^{name} must be"):
        RSDLoss(**{name: value})
    if name == "eps":
        with pytest.raises(error, match=r"^eps must be"):
            cross_correlation(S, T, eps=value)


def test_any_real_number_will_do():
    want = rsd_loss(S, T, kappa=0.5, eps=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a numpy scalar must not come to where it would be cast
        for number in (np.float32, np.float64, np.float16):
            assert torch.equal(rsd_loss(S, T, kappa=number(0.5), eps=number(0.25)), want)
    assert torch.equal(rsd_loss(S, T, kappa=Fraction(1, 2), eps=Fraction(1, 4)), want)
    assert torch.equal(RSDLoss(kappa=Fraction(1, 2), eps=Fraction(1, 4))(S, T), want)


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("reduction", "batchmean", "'sum', 'mean', 'none'"),
        ("reduction", None, "'sum', 'mean', 'none'"),
        ("implementation", "cuda", "'auto', 'fused', 'triton', 'reference'"),
    ],
)
def test_names(name, value, known):
    for call in (lambda **k: rsd_loss(S, T, **k), RSDLoss):
        with pytest.raises(ValueError, match=f"^{name} must be one of {known}, got {value!r}"):
            call(**{name: value})


def test_settings_are_keywords():
    with pytest.raises(TypeError):
        rsd_loss(S, T, 0.01)
    with pytest.raises(TypeError):
        RSDLoss(0.1)  # a user may mean the loss's weight


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 4), ValueError, "in_features must be at least 1, got 0"),
        ((4, -1), ValueError, "out_features must be at least 1, got -1"),
        ((4.0, 4), TypeError, "in_features must be an int, got float 4.0"),
        ((4, "8"), TypeError, "out_features must be an int, got str '8'"),
        ((True, 4), TypeError, "in_features must be an int, got bool"),
        ((4, 4, 0), ValueError, "expansion must be at least 1, got 0"),
        ((4, 4, 1.5), TypeError, "expansion must be an int, got float 1.5"),
        ((4, 4, torch.tensor(2)), TypeError, "expansion must be an int, got Tensor"),
        ((np.array([4]), 4), TypeError, "in_features must be an int, got ndarray"),
    ],
)
def test_projector_construction(arguments, error, message):
    widths, expansion = arguments[:2], arguments[2:]
    with pytest.raises(error, match=message):
        DecouplingProjector(*widths, **({"expansion": expansion[0]} if expansion else {}))


def test_projector_input():
    projector = DecouplingProjector(4, 6)
    for shape, must, way_out in (
        ((8, 5), "batch, 4", "give in_features"),
        ((8, 4, 2, 2), "batch, features", "pool maps and tokens"),
        ((4,), "batch, features", "keep the batch dimension"),
    ):
        with pytest.raises(ValueError, match=rf"student must be \({must}\), got shape .*: {way_out}"):
            projector(torch.randn(shape))
    with pytest.raises(TypeError, match=r"student must be a torch.Tensor, got tuple: pick the embedding out"):
        projector((torch.randn(8, 4),))
    with pytest.raises(TypeError, match=r"student is torch.bfloat16 and the projector torch.float32: .*autocast"):
        projector(torch.randn(8, 4, dtype=torch.bfloat16))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert projector(torch.randn(8, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"student is on meta and the projector on cpu: move it with"):
        projector(torch.randn(8, 4, device="meta"))
    with pytest.raises(ValueError, match=r"at least 2 rows in training mode, got 1: .*drop_last"):
        projector(torch.randn(1, 4))


MAP, TOKENS = torch.randn(2, 3, 4, 4), torch.randn(2, 17, 3)


FEATURES = {
    "pooled": (
        lambda: pool(S),
        r"x must be a \(B, C, H, W\) map or \(B, N, C\) tokens, got shape \(8, 6\): it is pooled",
    ),
    "five axes": (lambda: pool(MAP[..., None]), r"got shape \(2, 3, 4, 4, 1\): rearrange it"),
    "empty": (lambda: pool(torch.randn(2, 3, 0, 4)), r"x must not be empty, got shape \(2, 3, 0, 4\)"),
    "all prefix": (lambda: pool(TOKENS, prefix_tokens=17), r"at least one of x's 17 tokens \(B, N, C\), got 17"),
    "negative prefix": (lambda: pool(TOKENS, prefix_tokens=-1), "prefix_tokens must be at least 0, got -1"),
    "no square": (
        lambda: dense_pairs(MAP, TOKENS),
        r"teacher has 17 patch tokens .* 4 x 4 grid: pass grid=\(rows, col",
    ),
    "wrong grid": (lambda: dense_pairs(MAP, TOKENS, grid=(3, 5)), r"teacher has 17 patch tokens .* fill a 3 x 5 grid"),
    "batch": (lambda: dense_pairs(MAP[:1], MAP), r"student has a batch of 1 and teacher of 2: pass the same images"),
    "one position": (
        lambda: dense_pairs(torch.randn(2, 3, 7, 7), torch.randn(2, 4, 1, 1)),
        r"student has a grid of 7 x 7 and teacher 1 x 1, whose pairs .* of pool: take an earlier stage's map",
    ),
    "channels last": (
        lambda: dense_pairs(MAP, torch.randn(2, 7, 7, 768)),
        r"teacher looks like a \(B, H, W, C\) map, with shape \(2, 7, 7, 768\): pass channels_last=True, or False",
    ),
    "pool channels last": (
        lambda: pool(torch.randn(2, 7, 7, 768)),
        r"x looks like a \(B, H, W, C\) map, .*: pass channels_last=True, or False",
    ),
    "prefix of a map": (
        lambda: pool(MAP, prefix_tokens=1),
        r"x is a map, .* has no prefix tokens, got 1",
    ),
    "prefix of two maps": (lambda: dense_pairs(MAP, MAP, prefix_tokens=1), r"student is a map, .* no prefix tokens"),
    "prefix of the map": (lambda: dense_pairs(MAP, TOKENS, prefix_tokens=(1, 1)), r"student is a map, .* no prefix"),
    "three prefixes": (
        lambda: dense_pairs(MAP, TOKENS, prefix_tokens=(1, 1, 1)),
        r"prefix_tokens must be one value or a \(student, teacher\) pair, got \(1, 1, 1\)",
    ),
    "negative grid": (
        lambda: dense_pairs(TOKENS, TOKENS, prefix_tokens=1, grid=(-4, -4)),
        "grid must be at least 1, got -4",
    ),
    "dense pooled": (lambda: dense_pairs(MAP, S), r"teacher must be a \(B, C, H, W\) map or \(B, N, C\) tokens"),
}


@pytest.mark.parametrize("case", FEATURES)
def test_features(case):
    call, message = FEATURES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_features_take_tensors():
    with pytest.raises(TypeError, match=r"x must be float16, .*, got torch.int64: pass real-valued embeddings"):
        pool(torch.ones(2, 3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"x must be a torch.Tensor, got list"):
        pool([1.0])
    with pytest.raises(TypeError, match=r"student must be a torch.Tensor, got NoneType"):
        dense_pairs(None, MAP)
    for settings, message in (
        ({"channels_last": "no"}, "channels_last must be True, False or None, got 'no'"),
        ({"prefix_tokens": 0.5}, "prefix_tokens must be an int, got float 0.5"),
        ({"grid": 4}, r"grid must be \(rows, columns\), or a \(student, teacher\) pair of such, got 4 for teacher"),
        ({"grid": (None, (4.0, 4.0))}, r"grid must be \(rows, columns\), .*, got \(4.0, 4.0\) for teacher"),
    ):
        with pytest.raises(TypeError, match=message):
            dense_pairs(MAP, TOKENS, **settings)


def test_no_value_is_read():
    """Meta tensors have no values: any check that looked at one would raise here."""
    for shape in ((8, 6), (6, 8), (1030, 6)):
        student, teacher = (torch.randn(shape, device="meta", requires_grad=True) for _ in range(2))
        for implementation in ("reference", "fused"):
            loss, terms = rsd_loss(student, teacher, implementation=implementation, return_terms=True)
            loss.backward()
            assert loss.device.type == terms.invariance.device.type == student.grad.device.type == "meta"
    assert DecouplingProjector(4, 6, device="meta")(torch.randn(8, 4, device="meta")).shape == (8, 6)
    assert pool(torch.randn(2, 3, 4, 4, device="meta")).shape == (2, 3)
