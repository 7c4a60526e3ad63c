"""Coefficients from inner products, against mergekit's own functions on the tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import spans
from shoal.merge.chunks import CHUNK, chunks

SIZES = [1, 2, 5, 1000, 70_001]
LARGE = 3_000_017


def made(size, count, spread=0.3, seed=0, dtype=torch.float32):
    """count tensors around a common one, at an angle that grows with `spread`, of different norms."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randn(size, generator=generator) * 0.02
    return [
        ((center + torch.randn(size, generator=generator) * 0.02 * spread) * (1 + 0.1 * i)).to(dtype)
        for i in range(count)
    ]


def combined(coefficients, tensors, base=None):
    """The merge, in float64."""
    origin = 0.0 if base is None else base.double()
    total = torch.zeros(tensors[0].numel(), dtype=torch.float64)
    for coefficient, tensor in zip(coefficients, tensors, strict=True):
        total += coefficient * (tensor.double() - origin)
    return origin + total


def by_mergekit(method, tensors, base_index=None, dtype=torch.float64, **parameters):
    """mergekit's tensor; in float64, as its float32 norms of 3 million elements are off by 1e-5."""
    from mergekit import merge_methods
    from mergekit.merge_methods.base import TensorGroup

    group = TensorGroup.from_tensors([t.to(dtype) for t in tensors], base_index=base_index, name="w")
    (result,) = merge_methods.get(method)((group,), parameters=parameters)
    return result.double()


def weighted(weights, first=0):
    return {first + i: w for i, w in enumerate(weights)}


def assert_close(ours, theirs, tensors, tolerance=1e-9):
    assert float((ours - theirs).abs().max()) <= tolerance * max(float(t.abs().max()) for t in tensors)


# --- the Gram matrix ---


@pytest.mark.parametrize("size", [*SIZES, LARGE])
@pytest.mark.parametrize("with_base", [False, True])
def test_gram_is_the_inner_products_with_any_number_of_threads(size, with_base):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = [t.to(d) for t, d in zip(made(size, 4), dtypes, strict=True)]
    base = made(size, 1, seed=9, dtype=torch.bfloat16)[0] if with_base else None
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(spans.gram(tensors, base))
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(*found)
    rows = np.stack([(t.double() - (0 if base is None else base.double())).numpy() for t in tensors])
    np.testing.assert_allclose(found[0], rows @ rows.T, rtol=1e-12, atol=1e-12 * np.abs(rows @ rows.T).max())
    assert np.array_equal(found[0], found[0].T)
    assert found[0].dtype == np.float64


@pytest.mark.parametrize("size", [1, 5, 70_001, CHUNK, 5 * CHUNK + 70_001])
def test_the_order_of_additions_on_a_gpu_is_that_of_the_cpu(size):
    """What runs there is made of the same additions: here on the CPU, where its bits can be compared."""
    tensors, base = made(size, 3, dtype=torch.bfloat16), made(size, 1, seed=9)[0]
    totals = np.zeros(6)
    for some in chunks(size, spans._BLOCKS * CHUNK):
        for block in spans._halved(spans._at_once(tensors, base, some)).numpy().T:
            totals += block
    assert np.array_equal(totals, spans.gram(tensors, base)[np.triu_indices(3)])


@pytest.mark.gpu
def test_gram_on_a_gpu_has_the_bits_of_the_cpu():
    tensors, base = made(5_000_001, 3, dtype=torch.bfloat16), made(5_000_001, 1, seed=9)[0]
    there = spans.gram([t.cuda() for t in tensors], base.cuda())
    assert np.array_equal(there, spans.gram(tensors, base))


def test_gram_of_nothing_and_of_what_is_no_number():
    assert np.array_equal(spans.gram([torch.zeros(0), torch.zeros(0)]), np.zeros((2, 2)))
    good, bad = torch.ones(40_000), torch.ones(40_000)
    for value in (math.nan, math.inf):
        bad[33_000] = value
        with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
            spans.gram([good, bad])
        with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
            spans.gram([good], bad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gram_leaves_the_tensors_alone(dtype):
    tensors, base = made(70_001, 2, dtype=dtype), made(70_001, 1, seed=9, dtype=dtype)[0]
    before = [t.clone() for t in (*tensors, base)]
    spans.gram(tensors, base)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, base), strict=True))


def test_inference_mode_is_no_obstacle():
    with torch.inference_mode():
        tensors = made(100_000, 2)
        inside = spans.gram(tensors)
    assert np.array_equal(inside, spans.gram(tensors))
    parameters = [torch.nn.Parameter(t.clone()) for t in made(100_000, 2)]
    assert np.array_equal(inside, spans.gram(parameters))


# --- against mergekit ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("spread", [0.005, 0.3, 3.0])
def test_slerp(size, t, spread):
    base, source = made(size, 2, spread)
    ours = combined(spans.slerp(spans.gram([base, source]), t), [base, source])
    theirs = by_mergekit("slerp", [base, source], base_index=0, t=t)
    assert_close(ours, theirs, [base, source])


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("weights", [(0.3, 0.9), (0.5, -0.5), (0.0, 1.0), (-0.2, 1.0)])
@pytest.mark.parametrize("with_base", [False, True])
def test_nuslerp(size, weights, with_base):
    tensors = made(size, 2, 3.0)
    base = made(size, 1, seed=9)[0] if with_base else None
    ours = combined(spans.nuslerp(spans.gram(tensors, base), *weights), tensors, base)
    theirs = by_mergekit(
        "nuslerp",
        tensors if base is None else [base, *tensors],
        base_index=None if base is None else 0,
        weight=weighted(weights, int(with_base)),
        nuslerp_row_wise=False,
        nuslerp_flatten=True,
    )
    assert_close(ours, theirs, tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weights", [(0.3, 0.9), (0.2, 0.5, 0.6, 0.1), (0.5, -0.2, 0.4)])
@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp(size, normalize, weights, with_base):
    tensors = made(size, len(weights), 1.0)
    base = made(size, 1, seed=9)[0] if with_base else None
    ours = combined(spans.multislerp(spans.gram(tensors, base), weights, normalize, 1e-8), tensors, base)
    theirs = by_mergekit(
        "multislerp",
        tensors if base is None else [base, *tensors],
        base_index=None if base is None else 0,
        weight=weighted(weights, int(with_base)),
        normalize_weights=normalize,
        eps=1e-8,
    )
    assert_close(ours, theirs, tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("max_iter", [0, 1, 10])
def test_karcher(size, count, spread, max_iter):
    tensors = made(size, count, spread)
    ours = combined(spans.karcher(spans.gram(tensors), max_iter, 1e-5), tensors)
    theirs = by_mergekit("karcher", tensors, max_iter=max_iter, tol=1e-5)
    assert_close(ours, theirs, tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_model_stock(size, count, spread):
    tensors, base = made(size, count, spread), made(size, 1, seed=9)[0]
    ours = combined(spans.model_stock(spans.gram(tensors, base)), tensors, base)
    theirs = by_mergekit("model_stock", [base, *tensors], base_index=0, filter_wise=False)
    assert_close(ours, theirs, [base, *tensors])


@pytest.mark.parametrize("method", ["karcher", "model_stock", "multislerp", "nuslerp", "slerp"])
def test_bfloat16_tensors_merge_like_their_values_in_float32(method):
    tensors = made(70_001, 2, 1.0, dtype=torch.bfloat16)
    run = {
        "karcher": lambda g: spans.karcher(g, 10, 1e-5),
        "model_stock": spans.model_stock,
        "multislerp": lambda g: spans.multislerp(g, [0.3, 0.7], True, 1e-8),
        "nuslerp": lambda g: spans.nuslerp(g, 0.3, 0.7),
        "slerp": lambda g: spans.slerp(g, 0.3),
    }[method]
    assert run(spans.gram(tensors)) == run(spans.gram([t.float() for t in tensors]))


@pytest.mark.parametrize(
    ("size", "spread", "dtype", "tolerance"),
    [
        (4096, 0.01, torch.float32, 1e-6),
        (4096, 0.3, torch.float32, 1e-6),
        (4096, 3.0, torch.float32, 1e-6),
        (LARGE, 0.3, torch.float64, 1e-9),
    ],
)
def test_from_small_to_large(size, spread, dtype, tolerance):
    """In float32 mergekit differs by its rounding only."""
    tensors = made(size, 3, spread)
    gram = spans.gram(tensors)
    pair, weights = gram[:2, :2], (0.3, 0.5, 0.2)
    several = {"weight": weighted(weights), "normalize_weights": True, "eps": 1e-8}
    for method, coefficients, parameters in (
        ("slerp", spans.slerp(pair, 0.3), {"base_index": 0, "t": 0.3}),
        ("nuslerp", spans.nuslerp(pair, 0.3, 0.9), {"weight": weighted((0.3, 0.9))}),
        ("multislerp", spans.multislerp(gram, weights, True, 1e-8), several),
        ("karcher", spans.karcher(gram, 10, 1e-5), {"max_iter": 10, "tol": 1e-5}),
    ):
        used = tensors[: len(coefficients)]
        theirs = by_mergekit(method, used, dtype=dtype, **parameters)
        assert_close(combined(coefficients, used), theirs, used, tolerance)


# --- where there is no angle ---


def test_zeros():
    size = 1000
    zero, other = torch.zeros(size), made(size, 1)[0]
    for pair in ([zero, other], [other, zero], [zero, zero]):
        gram = spans.gram(pair)
        theirs = by_mergekit("slerp", pair, base_index=0, t=0.3)
        assert_close(combined(spans.slerp(gram, 0.3), pair), theirs, [other])
        theirs = by_mergekit("nuslerp", pair, weight=weighted((0.7, 0.3)))
        assert_close(combined(spans.nuslerp(gram, 0.7, 0.3), pair), theirs, [other])
        theirs = by_mergekit(
            "multislerp", pair, weight=weighted((0.7, 0.3)), normalize_weights=True, eps=1e-8
        )
        assert_close(combined(spans.multislerp(gram, [0.7, 0.3], True, 1e-8), pair), theirs, [other])
        theirs = by_mergekit("karcher", pair, max_iter=10, tol=1e-5)
        assert_close(combined(spans.karcher(gram, 10, 1e-5), pair), theirs, [other])
        theirs = by_mergekit("model_stock", [other, *(other + p for p in pair)], base_index=0)
        ours = combined(spans.model_stock(gram), pair) + other.double()
        assert_close(ours, theirs, [other])


def test_a_tensor_shorter_than_tol_has_no_direction_in_a_karcher_mean():
    long, other = made(1000, 2, 1.0)
    tensors = [long, other, long * 1e-6]
    ours = combined(spans.karcher(spans.gram(tensors), 10, 1e-5), tensors)
    assert_close(ours, by_mergekit("karcher", tensors, max_iter=10, tol=1e-5), tensors)


@pytest.mark.parametrize("factor", [1.0, 2.0, 3.0, 0.7, -1.0, -2.0])
def test_parallel_and_opposite_tensors(factor):
    """With powers of two mergekit's float32 is exact; with others it works with rounding noise there."""
    a = made(1000, 1)[0]
    pair = [a, a * factor]
    gram = spans.gram(pair)
    straight = combined((0.7, 0.3), pair)
    for coefficients in (spans.slerp(gram, 0.3), spans.nuslerp(gram, 0.7, 0.3)):
        assert_close(combined(coefficients, pair), straight, pair)
    if factor > 0:
        ours = combined(spans.karcher(gram, 10, 1e-5), pair)
        assert_close(ours, by_mergekit("karcher", pair, max_iter=10, tol=1e-5), pair)


@pytest.mark.parametrize("factor", [-1.0, -2.0, -3.0, -0.7, -1.0001])
def test_opposite_tensors_stay_finite_and_small(factor):
    a = made(70_001, 1)[0]
    pair = [a, a * factor]
    gram = spans.gram(pair)
    size = max(1.0, -factor)
    for t in (0.25, 0.5, 0.9):
        ours = combined(spans.nuslerp(gram, 1 - t, t), pair)
        assert_close(ours, combined((1 - t, t), pair), pair)
    ours = combined(spans.multislerp(gram, [0.5, 0.5], True, 1e-8), pair)
    assert_close(ours, combined((0.5, 0.5), pair), pair)
    with pytest.raises(RecipeError, match="cancel each other; choose other weights"):
        spans.multislerp(spans.gram([*pair, a * 0]), [0.5, 0.5, 0.0], True, 1e-8)
    ours = combined(spans.karcher(gram, 10, 1e-5), pair)
    assert float(ours.norm()) <= 1.001 * size * float(a.double().norm())
    if factor == -1.0:  # mergekit's float32 is exact
        assert_close(ours, by_mergekit("karcher", pair, max_iter=10, tol=1e-5), pair)


def test_multislerp_says_what_to_do_about_weights_that_sum_to_nothing():
    gram = spans.gram(made(1000, 3))
    with pytest.raises(RecipeError, match="sum to 0; set normalize_weights: false"):
        spans.multislerp(gram, [0.5, -0.25, -0.25], True, 1e-8)


def test_model_stock_keeps_the_base_at_its_singularity():
    a = torch.tensor([1.0, 0.0])
    b = torch.tensor([-0.5, math.sqrt(0.75)])
    c = torch.tensor([-0.5, -math.sqrt(0.75)])
    assert spans.model_stock(spans.gram([a, b, c])) == (0.0, 0.0, 0.0)
