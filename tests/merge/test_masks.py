from __future__ import annotations

import math

import pytest
import torch

from shoal.merge import chunks, masks, spans
from shoal.merge.keeps import KeepRandom
from shoal.merge.measurements import l1_ratio
from shoal.merge.selection import MagnitudeHistogram


def splitmix64(key: int, index: int) -> int:
    """The reference: SplitMix64's finaliser in Python's integers."""
    mask = (1 << 64) - 1
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_uniform_bits_are_splitmix64():
    key = masks.mask_key(7, 2, "model.norm.weight")
    bits = masks.uniform_bits(key, start=1000, length=50)
    assert bits.tolist() == [splitmix64(key, 1000 + i) >> 40 for i in range(50)]


def test_random_masks_have_their_density_and_nest():
    n = 1 << 18
    key = masks.mask_key(0, 1, "a")
    drawn = {d: masks.keep_random(key, 0, n, d) for d in (0.1, 0.25, 0.5, 0.9)}
    for density, mask in drawn.items():
        deviation = abs(float(mask.double().mean()) - density)
        assert deviation < 4 * math.sqrt(density * (1 - density) / n)
    for small, large in ((0.1, 0.25), (0.25, 0.5), (0.5, 0.9)):
        assert bool((drawn[large] | ~drawn[small]).all())
    assert not masks.keep_random(key, 0, n, 0.0).any()


@pytest.mark.parametrize("other", [(1, 1, "a"), (0, 2, "a"), (0, 1, "b")], ids=["seed", "parent", "tensor"])
def test_random_masks_are_independent(other):
    n = 1 << 18
    first = masks.keep_random(masks.mask_key(0, 1, "a"), 0, n, 0.5).double()
    second = masks.keep_random(masks.mask_key(*other), 0, n, 0.5).double()
    correlation = float(((first - 0.5) * (second - 0.5)).mean()) * 4
    assert abs(correlation) < 4 / math.sqrt(n)


def test_random_masks_do_not_depend_on_how_the_tensor_is_cut():
    key = masks.mask_key(3, 1, "a")
    whole = masks.keep_random(key, 0, 1000, 0.3)
    parts = [masks.keep_random(key, start, 250, 0.3) for start in range(0, 1000, 250)]
    assert torch.equal(whole, torch.cat(parts))
    assert 200 < int(whole.sum()) < 400


@pytest.mark.parametrize("density", [0.0001, 0.1, 0.37, 0.5, 0.999])
def test_exactly_k_are_kept_lowest_index_first_among_equals(density):
    delta = torch.tensor([3.0, -1.0, 2.0, 2.0, -2.0, 0.0, 1.0, -3.0] * 25)
    k = max(1, int(density * delta.numel()))
    order = sorted(range(delta.numel()), key=lambda i: (-abs(float(delta[i])), i))
    expected = torch.zeros(delta.numel(), dtype=torch.bool)
    expected[order[:k]] = True
    (cut,) = MagnitudeHistogram.of(delta, torch.zeros_like(delta)).cuts(delta, torch.zeros_like(delta), [k])
    parts = [masks.keep_top(delta[s : s + 7], s, cut) for s in range(0, delta.numel(), 7)]
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, chunks.CHUNK])
def test_tree_sum_is_accurate_and_blind_to_threads(size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    exact = math.fsum(values.tolist())
    threads = torch.get_num_threads()
    sums = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            sums.append(chunks.tree_sum(values))
    finally:
        torch.set_num_threads(threads)
    assert sums[0] == sums[1] == pytest.approx(exact, rel=1e-12, abs=1e-9)


def test_rescale_restores_the_l1_norm():
    delta = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    keep = KeepRandom(("random", 0, 0.3), masks.mask_key(0, 1, "a"), 0.3)
    ratio = l1_ratio(delta, torch.zeros_like(delta), keep)
    kept = delta * keep.mask(0, delta) * ratio
    assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    assert l1_ratio(torch.zeros(10), torch.zeros(10), keep) == 1.0


def test_slerp_keeps_the_norm_and_goes_straight_between_parallels():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    ca, cb = spans.slerp(spans.gram([a, b]), 0.25)
    assert ca * ca + cb * cb == pytest.approx(1.0)
    assert spans.slerp(spans.gram([a, 2 * a]), 0.25) == (0.75, 0.25)


@pytest.mark.parametrize("size", [1, 5, chunks.LANES, 3 * chunks.LANES + 17, chunks.CHUNK + 12_345])
def test_the_gram_matrix_is_accurate_and_blind_to_threads(size):
    generator = torch.Generator().manual_seed(size)
    base, *tensors = (torch.randn(size, generator=generator) for _ in range(4))
    exact = torch.stack([t.double() - base.double() for t in tensors])
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(spans.gram(tensors, base))
    finally:
        torch.set_num_threads(threads)
    assert (found[0] == found[1]).all()
    torch.testing.assert_close(torch.from_numpy(found[0]), exact @ exact.T, rtol=1e-12, atol=1e-9)
