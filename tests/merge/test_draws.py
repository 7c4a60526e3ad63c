"""Methods that draw at random: given our draws, mergekit's own code must make the same tensor."""

from __future__ import annotations

import pytest
import torch

from shoal.merge import masks, method, resolved
from shoal.merge.measurements import Measurements, Tensors
from shoal.merge.tensors import InMemory, merge_tensor
from shoal.types import OutputGroup, Source

SEED = 11
NAME = "model.layers.0.mlp.up_proj.weight"


def made(shape, count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator) * 0.02
    steps = [torch.randn(shape, generator=generator) * 0.003 for _ in range(count)]
    return base.to(dtype), [(base + step).to(dtype) for step in steps]


def by_mergekit(operator, base, sources, per_source, shared, draws, monkeypatch):
    """The tensor by mergekit's method, with `draws` (one uniform tensor per source, in order) for its randomness."""
    from mergekit import merge_methods, sparsify
    from mergekit.merge_methods.base import TensorGroup

    waiting = iter(draws)

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        @staticmethod
        def bernoulli(probabilities):
            uniform = next(waiting).view(probabilities.shape)
            return (uniform < probabilities.to(torch.float32)).to(probabilities.dtype)

    monkeypatch.setattr(sparsify, "torch", Torch())
    group = TensorGroup.from_tensors([base, *sources], base_index=0, name=NAME)
    parameters = {name: {i + 1: v[name] for i, v in enumerate(per_source)} for name in per_source[0]}
    (result,) = merge_methods.get(operator)((group,), parameters={**parameters, **shared})
    return result


@pytest.mark.parametrize("shape", [(40, 33), (257,), (6, 5, 4), (1, 70_000)])
@pytest.mark.parametrize("operator", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize(
    "shared", [{}, {"normalize": True, "lambda": 0.8}, {"rescale": False, "normalize": False}]
)
def test_with_our_draws_mergekit_makes_our_tensor(operator, shape, shared, monkeypatch):
    base, sources = made(shape)
    per_source = [{"weight": 0.6 - 0.5 * i, "density": 0.4 + 0.1 * i} for i in range(3)]
    if operator.startswith("della"):
        per_source = [{**values, "epsilon": 0.2} for values in per_source]
    models = tuple(Source(i + 1, "g", values) for i, values in enumerate(per_source))
    group = OutputGroup("g", operator, models, (NAME,), shared)
    tensors = [base, *sources]
    ingredients = Tensors(
        NAME,
        shape,
        (0, NAME),
        tuple((i + 1, NAME) for i in range(3)),
        SEED,
        lambda o: tensors[o[0]].reshape(-1),
    )
    terms = Measurements().terms(method(operator).name, resolved(group), ingredients)
    ours = torch.empty(shape)
    merge_tensor(terms, base.reshape(-1), [s.reshape(-1) for s in sources], InMemory(ours), torch.float32)

    draws = [
        masks.uniform_bits(masks.mask_key(SEED, i + 1, NAME), 0, base.numel()).to(torch.float64) / 2**24
        for i in range(3)
    ]
    theirs = by_mergekit(operator, base, sources, per_source, resolved(group).shared, draws, monkeypatch)
    assert float((ours - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())


@pytest.mark.parametrize("operator", ["dare_linear", "della_linear"])
def test_masks_of_two_parents_are_independent_and_nest_in_density(operator):
    shape = (64, 4096)
    base, sources = made(shape, count=2)
    tensors = [base, *sources]
    ingredients = Tensors(
        NAME, shape, (0, NAME), ((1, NAME), (2, NAME)), SEED, lambda o: tensors[o[0]].reshape(-1)
    )

    def drawn(density):
        values = {"weight": 0.5, "density": density, "epsilon": 0.1}
        if operator == "dare_linear":
            del values["epsilon"]
        group = OutputGroup("g", operator, (Source(1, "g", values), Source(2, "g", values)), (NAME,))
        terms = Measurements().terms(operator, resolved(group), ingredients)
        deltas = [(s - base).reshape(-1) for s in sources]
        return [keep.mask(0, delta) for keep, delta in zip(terms.keeps, deltas, strict=True)]

    first, second = drawn(0.5)
    n = first.numel()
    correlation = float(((first.double() - 0.5) * (second.double() - 0.5)).mean()) * 4
    assert abs(correlation) < 4 / n**0.5
    assert abs(float(first.double().mean()) - 0.5) < 3 / n**0.5
    for fewer, more in zip(drawn(0.3), drawn(0.5), strict=True):
        assert bool((more | ~fewer).all())
    for again, same in zip(drawn(0.5), (first, second), strict=True):
        assert torch.equal(again, same)
