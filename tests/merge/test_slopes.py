"""Derivatives with respect to merge coefficients: finite differences of a loss of the merged weights are the measure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.errors import CheckpointError, RecipeError
from shoal.merge import Checkpoint, Merger, load_runtime, tensor_groups
from shoal.merge.linearity import LINEAR, check_linear
from shoal.merge.methods import METHODS
from shoal.merge.slopes import Slopes


def opened(paths):
    parents = [Checkpoint.open(p) for p in paths]
    return parents, tensor_groups(parents[0])


def towards(model):
    """A point for every parameter of the model: the loss is half the squared distance to it."""
    generator = torch.Generator().manual_seed(7)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def loss(model, goal):
    return sum(0.5 * ((p.double() - goal[n].double()) ** 2).sum().item() for n, p in model.named_parameters())


def slopes_at(merger, plan, goal, parts=1):
    """Derivatives of the loss from its gradient, handed over in equal parts."""
    merger.materialize(plan)
    slopes = Slopes(merger, plan)
    for _ in range(parts):
        for name, parameter in merger.model.named_parameters():
            slopes.take(parameter, (parameter - goal[name]) / parts)
    return slopes.values()


def moved(plan, slope, step):
    """The plan with the number that the slope is of moved by `step`."""
    groups = list(plan.groups)
    group = groups[slope.group]
    if slope.source is None:
        before = group.parameters.get(slope.parameter, 1.0)
        group = replace(group, parameters={**group.parameters, slope.parameter: before + step})
    else:
        sources = list(group.sources)
        one = sources[slope.source]
        changed = {**one.parameters, slope.parameter: one.parameters[slope.parameter] + step}
        sources[slope.source] = replace(one, parameters=changed)
        group = replace(group, sources=tuple(sources))
    groups[slope.group] = group
    return replace(plan, groups=tuple(groups))


def assert_finite_differences(merger, plan, goal, tolerance=2e-4):
    found = slopes_at(merger, plan, goal)
    scale = max(abs(s.value) for s in found)
    assert scale > 1e-3
    for slope in found:
        ends = []
        for step in (0.25, -0.25):  # the loss is quadratic: any step will do, a large one loses fewest digits
            merger.materialize(moved(plan, slope, step))
            ends.append(loss(merger.model, goal))
        assert (ends[0] - ends[1]) / 0.5 == pytest.approx(slope.value, abs=tolerance * scale)


def thinned(group, source):
    return {"weight": 0.5 - 0.3 * source + 0.02 * group, "density": 0.4 + 0.1 * source}


PLANS = {
    "linear": {"operator": "linear", "base": None, "group_parameters": lambda g: {"normalize": False}},
    "task_arithmetic": {"operator": "task_arithmetic", "group_parameters": lambda g: {"lambda": 0.6 + 0.1 * g}},
    "breadcrumbs": {"operator": "breadcrumbs", "source_parameters": thinned},
    "dare_linear": {"operator": "dare_linear", "source_parameters": thinned},
    "della_linear": {"operator": "della_linear", "source_parameters": thinned},
}  # fmt: skip


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("name", PLANS)
def test_slopes_are_finite_differences_of_the_merge(name, tier, llamas, make_plan):
    parents, groups = opened(llamas[:3])
    model = load_runtime(llamas[0])
    merger = Merger(parents, groups, model, memory=tier, sparse=METHODS[name].drops)
    plan = make_plan(groups, models=3, **PLANS[name])
    assert_finite_differences(merger, plan, towards(model))


@pytest.mark.parametrize("family", ["tied_llamas", "gpt2s", "mixtrals"])
def test_tied_transposed_and_fused_tensors_find_their_gradient(family, make_plan, request):
    paths = request.getfixturevalue(family)
    parents, groups = opened(paths)
    model = load_runtime(paths[0])
    merger = Merger(parents, groups, model)
    assert_finite_differences(merger, make_plan(groups, "task_arithmetic", models=3), towards(model))


def test_gradients_may_come_in_parts(llamas, make_plan):
    parents, groups = opened(llamas[:3])
    model = load_runtime(llamas[0])
    merger, goal = Merger(parents, groups, model), towards(model)
    plan = make_plan(groups, "task_arithmetic", models=3)
    whole, parts = (slopes_at(merger, plan, goal, n) for n in (1, 4))
    assert [s.value for s in parts] == pytest.approx([s.value for s in whole], rel=1e-5)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_that_are_not_linear_are_refused(name, llamas, make_plan):
    if name in LINEAR:
        check_linear(name, {"normalize": False}, "here")
        with pytest.raises(
            RecipeError, match=f"here: .* linear in its weights, found {name} with normalize: true"
        ):
            check_linear(f"{name}@1", {"normalize": True}, "here")
    else:
        with pytest.raises(
            RecipeError, match=f"found {name}; expected one of linear, task_arithmetic"
        ) as error:
            check_linear(name, {"normalize": False}, "here")
        assert "\n" not in str(error.value)


def test_what_a_method_normalises_by_default_counts():
    for name in LINEAR:
        if METHODS[name].options["normalize"]:
            with pytest.raises(RecipeError, match="with normalize: true"):
                check_linear(name, {}, "here")
        else:
            check_linear(name, {}, "here")


def test_a_plan_that_is_not_linear_has_no_slopes(llamas, make_plan):
    parents, groups = opened(llamas)
    merger = Merger(parents, groups, load_runtime(llamas[0]), sparse=True)
    with pytest.raises(RecipeError, match=r"gradient of group 'embed': .* found ties"):
        Slopes(merger, make_plan(groups, "ties", models=4))
    with pytest.raises(CheckpointError, match="without a model"):
        Slopes(Merger(parents, groups), make_plan(groups, "task_arithmetic", models=4))
