"""Every selection against a plain sort, and against mergekit 0.1.5's own functions."""

from __future__ import annotations

import itertools
import math

import mergekit.sparsify as mergekit
import pytest
import torch
from mergekit.merge_methods.sce import sce_mask, sce_weight

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import chunks, masks, selection
from shoal.merge.selection import MagnitudeHistogram

SIZES = [1, 2, 5, 1000, 70_001]
DTYPES = [torch.float32, torch.bfloat16]
KINDS = ["normal", "ties", "zeros", "tiny"]


def tensors(size: int, dtype: torch.dtype = torch.float32, kind: str = "normal", count: int = 2):
    """A base (last) and count - 1 sources, flat."""
    g = torch.Generator().manual_seed(size + len(kind))
    base = torch.randn(size, generator=g).to(dtype)
    if kind == "zeros":
        return [base] * count
    if kind == "ties":  # quarters, so that a delta has few values, exactly
        base = (base * 4).round() / 4
        steps = [torch.randint(-5, 6, (size,), generator=g) / 4 for _ in range(count - 1)]
    else:
        scale = 1e-40 if kind == "tiny" else 0.01  # subnormal deltas are numbers too
        base = base * 0 if kind == "tiny" else base
        steps = [torch.randn(size, generator=g) * scale for _ in range(count - 1)]
    return [(base.float() + step).to(dtype) for step in steps] + [base.to(dtype)]


def delta_of(source, base):
    return source.float() - base.float()


def largest(size, count):
    """Mask of the `count` largest magnitudes, lowest index first among equals, by a stable sort."""
    mask = torch.zeros(size.numel(), dtype=torch.bool)
    mask[size.abs().sort(descending=True, stable=True).indices[:count]] = True
    return mask


def top_magnitudes(delta, count):
    """The cut by a partial sort: (magnitude, last index kept among its equals)."""
    size = delta.abs()
    threshold = size.kthvalue(size.numel() - count + 1).values
    equal = (size == threshold).nonzero().reshape(-1)
    return float(threshold), int(equal[count - int((size > threshold).sum()) - 1])


def kept_by(cut, delta, step=chunks.CHUNK):
    return torch.cat([masks.keep_top(delta[p], p.start, cut) for p in chunks.chunks(delta.numel(), step)])


@pytest.fixture
def on_threads():
    before = torch.get_num_threads()

    def call(work):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(work())
        return found

    yield call
    torch.set_num_threads(before)


# --- the largest --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_cuts_keep_exactly_the_largest(size, dtype, kind):
    source, base = tensors(size, dtype, kind)
    delta = delta_of(source, base)
    counts = sorted({0, 1, size // 3, size // 2, size - 1, size})
    cuts = MagnitudeHistogram.of(source, base).cuts(source, base, counts)
    for count, cut in zip(counts, cuts, strict=True):
        assert torch.equal(kept_by(cut, delta, 4096), largest(delta, count)), count
        if count:
            assert cut == top_magnitudes(delta, count)
    assert cuts[0] == (math.inf, -1)


@pytest.mark.parametrize("kind", ["normal", "ties"])
def test_cuts_of_several_blocks_do_not_depend_on_threads(on_threads, kind):
    size = 2 * chunks.CHUNK + 12_345
    source, base = tensors(size, torch.bfloat16, kind)
    delta = delta_of(source, base)
    counts = [size // 1000, size // 5, size - 2]
    first, second = on_threads(lambda: MagnitudeHistogram.of(source, base).cuts(source, base, counts))
    assert first == second
    for count, cut in zip(counts, first, strict=True):
        assert torch.equal(kept_by(cut, delta), largest(delta, count))


@pytest.mark.parametrize("density", [1e-9, 0.1, 0.37, 0.999])
@pytest.mark.parametrize("size", SIZES)
def test_cuts_are_mergekit_but_for_equals(size, density):
    source, base = tensors(size)
    delta = delta_of(source, base)
    (cut,) = MagnitudeHistogram.of(source, base).cuts(source, base, [max(1, int(density * size))])
    kept = kept_by(cut, delta)
    # mergekit takes any of equals: the magnitudes are the same, and where these differ the elements too
    theirs = mergekit.magnitude(delta, density)
    assert torch.equal((delta * kept).abs().sort().values, theirs.abs().sort().values)


def test_other_dtypes_are_rounded_to_float32_before_the_difference():
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(5000, generator=g, dtype=torch.float64) for _ in range(2)]
    for first in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for second in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            source, base = made[0].to(first), made[1].to(second)
            delta = delta_of(source, base)
            (cut,) = MagnitudeHistogram.of(source, base).cuts(source, base, [1234])
            assert torch.equal(kept_by(cut, delta), largest(delta, 1234))


def test_histogram_is_compact_and_counts_everything():
    source, base = tensors(70_001)
    histogram = MagnitudeHistogram.of(source, base)
    assert int(histogram.kept[-1]) == 70_001
    assert histogram.bins.nbytes + histogram.kept.nbytes < 40_000
    for count in (-1, 70_002):
        with pytest.raises(ValueError, match="no"):
            histogram.cuts(source, base, [count])


def test_a_histogram_of_other_tensors_is_refused():
    (source, base), (other, root) = tensors(1000), tensors(1000, kind="ties")
    with pytest.raises(ValueError, match="not of these tensors"):
        MagnitudeHistogram.of(source, base).cuts(other, root, [500])


def test_nothing_of_nothing():
    empty = torch.zeros(0)
    assert MagnitudeHistogram.of(empty, empty).cuts(empty, empty, [0]) == [selection.NOTHING]
    assert selection.della_mask(empty, empty, (0, 3), 0.5, 0.1, 0).shape == (0,)
    mask, weights = selection.sce([empty, empty], empty, 0.5)
    assert mask is not None and mask.shape == (0,) and weights == (0.5, 0.5)


# --- breadcrumbs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_breadcrumbs_keeps_the_ranks_that_mergekit_keeps(size, dtype, kind):
    check_breadcrumbs(*tensors(size, dtype, kind), [(0.5, 0.01), (0.9, 0.3), (1e-6, 0.2), (0.999, 0.0)])


def test_breadcrumbs_of_several_blocks():
    check_breadcrumbs(*tensors(2_999_999, torch.bfloat16), [(0.5, 0.01)])


def check_breadcrumbs(source, base, pairs):
    delta = delta_of(source, base)
    size = delta.numel()
    histogram = MagnitudeHistogram.of(source, base)
    for density, gamma in pairs:
        lower, upper = selection.breadcrumbs_range(histogram, source, base, density, gamma)
        kept = kept_by(lower, delta) & ~kept_by(upper, delta)
        assert int(kept.sum()) == int(density * size)
        theirs = mergekit.magnitude_outliers(delta, density, gamma=gamma)
        assert torch.equal((delta * kept).abs().sort().values, theirs.abs().sort().values)
        n_bot = max(0, size - int(density * size) - int(gamma * size))
        rising = torch.arange(size - 1, -1, -1)[delta.abs().flip(0).sort(stable=True).indices]
        expected = torch.zeros(size, dtype=torch.bool)
        expected[rising[n_bot : n_bot + int(density * size)]] = True
        assert torch.equal(kept, expected)


# --- DELLA --------------------------------------------------------------------------------------------------


def mergekit_della(monkeypatch, delta, density, epsilon, stream):
    """mergekit's flat mask with our uniform numbers, equals ranked by index."""
    bits = masks.uniform_bits(stream, 0, delta.numel())
    argsort = torch.argsort
    drawn = []

    def bernoulli(probabilities):
        assert probabilities.dtype == torch.float32
        drawn.append(bits.view(probabilities.shape).double() / (1 << 24) < probabilities.double())
        return drawn[-1].to(probabilities.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(mergekit.torch, "bernoulli", bernoulli)
        patch.setattr(mergekit.torch, "argsort", lambda x, **options: argsort(x, stable=True, **options))
        mergekit.della_magprune(delta, density, epsilon)
    return drawn[0].reshape(-1)


SHAPES = [
    (5,),
    (1000,),
    (70_001,),
    (1, 2),
    (7, 5),
    (300, 1001),
    (3, 50_000),
    (4, 6, 5),
    (2, 40_000, 3),
    (3, 2, 4, 5),
]


@pytest.mark.parametrize("kind", ["normal", "ties"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_della_is_mergekit_with_our_draws(monkeypatch, shape, dtype, kind):
    source, base = tensors(math.prod(shape), dtype, kind)
    delta = delta_of(source, base)
    for density, epsilon in ((0.5, 0.2), (0.05, 0.04), (0.95, 0.04)):
        ours = selection.della_mask(source, base, shape, density, epsilon, stream=77)
        theirs = mergekit_della(monkeypatch, delta.view(shape), density, epsilon, 77)
        assert ours.dtype == torch.bool and ours.shape == (delta.numel(),)
        assert torch.equal(ours, theirs)


def test_della_of_a_large_matrix(monkeypatch, on_threads):
    source, base = tensors(1000 * 2000)
    delta = delta_of(source, base)
    first, second = on_threads(lambda: selection.della_mask(source, base, (1000, 2000), 0.4, 0.3, 5))
    assert torch.equal(first, second)
    theirs = mergekit_della(monkeypatch, delta.view(1000, 2000), 0.4, 0.3, 5)
    assert torch.equal(first, theirs)


def test_della_keeps_a_subset_with_a_smaller_density():
    source, base = tensors(60_000, kind="ties")
    masks = [selection.della_mask(source, base, (300, 200), d, 0.1, 9) for d in (0.2, 0.201, 0.5, 0.89)]
    for small, large in itertools.pairwise(masks):
        assert not bool((small & ~large).any())
        assert int(large.sum()) > int(small.sum())


@pytest.mark.parametrize("shape", [(20_000, 1), (20_000, 1, 1)])
def test_an_element_alone_in_its_row_is_kept_with_the_density(monkeypatch, shape):
    source, base = tensors(20_000)
    mask = selection.della_mask(source, base, shape, 0.3, 0.2, 1)
    assert float(mask.float().mean()) == pytest.approx(0.3, abs=0.02)
    with pytest.raises(RuntimeError, match="p_in"):  # mergekit: 0 / 0
        mergekit.della_magprune(delta_of(source, base).view(shape), 0.3, 0.2)
    one, root = tensors(1)
    assert selection.della_mask(one, root, (), 0.3, 0.2, 1).shape == (1,)


def test_della_prefers_large_magnitudes():
    source, base = tensors(100_000)
    mask = selection.della_mask(source, base, (100, 1000), 0.5, 0.4, 3)
    size = delta_of(source, base).abs()
    assert float(mask[size > size.quantile(0.9)].float().mean()) > 0.8
    assert float(mask[size < size.quantile(0.1)].float().mean()) < 0.2
    assert float(mask.float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("density, epsilon", [(0.5, 0.5), (0.1, 0.1), (0.9, 0.2), (0.1, 0.3)])
def test_della_needs_probabilities(density, epsilon):
    source, base = tensors(5)
    with pytest.raises(RecipeError, match="epsilon"):
        selection.della_mask(source, base, (5,), density, epsilon, 0)


# --- SCE ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_sce_is_mergekit_but_for_equals(size, dtype, kind):
    check_sce(tensors(size, dtype, kind, count=4), (0.0, 1e-6, 0.1, 0.999, 1.0))


def test_sce_of_several_blocks():
    check_sce(tensors(2_999_999, count=3), (0.3,))


def check_sce(models, shares):
    *sources, base = models
    size = base.numel()
    deltas = torch.stack([delta_of(s, base) for s in sources])
    variance = torch.var(deltas, dim=0, unbiased=False)
    for topk in shares:
        mask, weights = selection.sce(sources, base, topk)
        expected = torch.ones(size)
        if topk >= 1:
            assert mask is None
        else:
            assert mask is not None and mask.dtype == torch.bool
            theirs = sce_mask(deltas, topk, torch.float32)
            assert torch.equal((variance * mask).sort().values, (variance * theirs).sort().values)
            assert torch.equal(mask, largest(variance, int(theirs.sum())))
            expected = mask.float()
        assert weights == pytest.approx(sce_weight(deltas * expected).tolist(), rel=1e-4)


def test_sce_counts_only_variances_that_are_not_zero():
    base = torch.zeros(1000)
    first = torch.zeros(1000)
    first[500:600] = torch.arange(1, 101) / 128
    second = first.clone()
    second[500:510] += 1  # elsewhere the deltas agree
    mask, _ = selection.sce([first, second], base, 0.5)
    assert mask is not None and mask.nonzero().reshape(-1).tolist() == [500, 501, 502, 503, 504]
    theirs = sce_mask(torch.stack([first, second]), 0.5)
    assert int(theirs.sum()) == 5


def test_sce_does_not_depend_on_threads(on_threads):
    *sources, base = tensors(2 * chunks.CHUNK + 333, torch.bfloat16, count=4)
    (mask, weights), (again, same) = on_threads(lambda: selection.sce(sources, base, 0.25))
    assert mask is not None and again is not None
    assert torch.equal(mask, again) and weights == same and sum(weights) == pytest.approx(1)
    exact = [float(((s.double() - base.double()) * mask).square().sum()) for s in sources]
    assert weights == pytest.approx([x / sum(exact) for x in exact], rel=1e-6)


def test_sce_of_equal_models_has_equal_weights():
    *sources, base = tensors(1000, kind="zeros", count=4)
    mask, weights = selection.sce(sources, base, 0.5)
    assert mask is not None and not mask.any() and weights == (1 / 3,) * 3
    mask, weights = selection.sce(sources[:1], base + 1, 0.5)  # one delta does not vary
    assert mask is not None and not mask.any() and weights == (1.0,)


# --- what is refused, and where it runs ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deltas_that_are_no_numbers_are_refused(bad, dtype):
    source, base = tensors(70_001, dtype)
    source[65_000] = bad
    good = base.clone()
    calls = (
        lambda: MagnitudeHistogram.of(source, base),
        lambda: selection.della_mask(source, base, (70_001,), 0.5, 0.1, 0),
        lambda: selection.sce([good, source], base, 0.5),
        lambda: selection.sce([good, source], base, 0.0),
        lambda: selection.sce([good, source], base, 1.0),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
            call()


def test_runs_in_inference_mode_on_threads(on_threads):
    """Worker threads do not inherit the mode; an inference tensor cannot be written outside of it."""
    source, base = tensors(chunks.CHUNK + 5)

    def work():
        with torch.inference_mode():
            mask, weights = selection.sce([source, base], base, 0.5)
            assert mask is not None
            della = selection.della_mask(source, base, (source.numel(),), 0.5, 0.1, 3)
            return int(mask.sum()), weights, int(della.sum())

    first, second = on_threads(work)
    assert first == second


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros"])
def test_a_gpu_finds_the_same(kind):
    *sources, base = tensors(2_000_003, torch.bfloat16, kind, count=4)
    there = [s.cuda() for s in sources], base.cuda()
    counts = [1, 1000, 1_999_999]
    here_cuts = MagnitudeHistogram.of(sources[0], base).cuts(sources[0], base, counts)
    assert MagnitudeHistogram.of(there[0][0], there[1]).cuts(there[0][0], there[1], counts) == here_cuts
    della = selection.della_mask(there[0][0], there[1], (base.numel(),), 0.5, 0.2, 4)
    assert torch.equal(della.cpu(), selection.della_mask(sources[0], base, (base.numel(),), 0.5, 0.2, 4))
    (mask, weights), (expected, same) = selection.sce(*there, 0.3), selection.sce(sources, base, 0.3)
    assert mask is not None and expected is not None
    assert torch.equal(mask.cpu(), expected) and weights == same
