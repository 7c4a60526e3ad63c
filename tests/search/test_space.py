"""The search space: what genes mean, and that encode undoes decode."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import RecipeError, ShoalError
from shoal.search import SHAPES, Space, lift, make_space, parent_plan, uniform_merge_plan
from shoal.types import MergePlan, ParameterSpec, TensorGroup

WEIGHT = ParameterSpec("weight", "source", -0.2, 1.5, default=None)
DENSITY = ParameterSpec("density", "source", 0.1, 1.0, 0.5, domain=(0.0, 1.0), searched=False)
LAMBDA = ParameterSpec("lambda", "group", 0.5, 1.5, 1.0, searched=False)
T = ParameterSpec("t", "group", 0.0, 1.0, 0.5, domain=(0.0, 1.0))
MODELS = ("base", "math", "code")


def groups_of(layers: int) -> list[TensorGroup]:
    inner = [
        TensorGroup(f"layers.{i}.{kind}", i, kind, (f"l{i}.{kind}.weight",))
        for i in range(layers)
        for kind in ("attn", "mlp", "norm")
    ]
    embed = TensorGroup("embed", None, "embed", ("embed.weight",))
    return [embed, *inner, TensorGroup("norm", None, "norm", ("norm.weight",))]


def space_of(shape: Any = "curve", layers: int = 6, **changes: Any) -> Space:
    arguments: dict[str, Any] = {
        "base": 0,
        "sources": (1, 2),
        "operator": "ties@1",
        "parameters": (WEIGHT, DENSITY, LAMBDA),
        "dtype": "bfloat16",
        "seed": 7,
    }
    return make_space(shape, groups_of(layers), MODELS, **{**arguments, **changes})


def weights(plan: MergePlan, source: int = 0) -> dict[str, float]:
    return {g.name: g.sources[source].parameters["weight"] for g in plan.groups}


spaces = st.builds(
    space_of,
    st.sampled_from(SHAPES),
    st.integers(4, 9),
    tensor_types=st.sampled_from([(), ("attn", "mlp"), ("mlp",), ("attn", "mlp", "norm")]),
    bounds=st.sampled_from([{}, {"density": (0.2, 0.9)}, {"density": (0.2, 0.9), "lambda": (0.5, 2.0)}]),
    coefficients=st.integers(1, 4),
    blocks=st.integers(1, 4),
    fixed=st.sampled_from([{}, {"normalize": True}]),
)


@given(spaces, st.data())
@settings(max_examples=80, deadline=None)
def test_encode_undoes_decode_and_the_plan_survives_json(space: Space, data: st.DataObject) -> None:
    unit = np.array(data.draw(st.lists(st.floats(0, 1), min_size=space.size, max_size=space.size)))
    genome = space.low + unit * (space.high - space.low)
    plan = MergePlan.from_json(space.decode(genome).to_json())
    assert np.abs(space.encode(plan) - genome).max() <= 1e-12
    assert space.project(plan)[1] <= 1e-12
    for parameter, model, low, high in space.ranges():
        source = None if model == "" else MODELS.index(model) - 1
        for group in plan.groups:
            owner = group.parameters if source is None else group.sources[source].parameters
            assert low - 1e-12 <= owner[parameter] <= high + 1e-12


@given(spaces, st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_a_plan_off_the_image_is_refused_with_its_residual_and_projected(space: Space, seed: int) -> None:
    plan = space.decode(space.x0)
    data = plan.to_json().replace(
        '"weight":0.5', '"weight":0.75', 1
    )  # one group of one source: not in the image
    other = MergePlan.from_json(data)
    genome, residual = space.project(other)
    assert 0 < residual < 0.25
    with pytest.raises(ShoalError, match="not in the image"):
        space.encode(other)
    # least squares: no neighbour fits better
    step = np.random.default_rng(seed).normal(0, 1e-3, space.size)
    assert _squares(space, genome, other) <= _squares(space, genome + step, other) + 1e-12


def _squares(space: Space, genome: np.ndarray, plan: MergePlan) -> float:
    ours = space.decode(genome)
    pairs = zip(ours.groups, plan.groups, strict=True)
    total = 0.0
    for a, b in pairs:
        total += sum((a.parameters[k] - b.parameters[k]) ** 2 for k in a.parameters)
        for s, t in zip(a.sources, b.sources, strict=True):
            total += sum((s.parameters[k] - t.parameters[k]) ** 2 for k in s.parameters)
    return total


def test_a_curve_is_the_cosine_series_at_layer_centres() -> None:
    space = space_of("curve", 6, tensor_types=("attn", "mlp"))
    assert space.names[:7] == (
        "weight[math].attn.s",
        "weight[math].attn.c1",
        "weight[math].attn.c2",
        "weight[math].mlp.s",
        "weight[math].mlp.c1",
        "weight[math].mlp.c2",
        "weight[code].attn.s",
    )
    genome = np.zeros(space.size)
    genome[:6] = (0.5, 0.3, -0.1, 0.2, 0.0, 0.05)
    found = weights(space.decode(genome))
    for layer in range(6):
        z = (layer + 0.5) / 6
        attn = 0.5 + 0.3 * math.cos(math.pi * z) - 0.1 * math.cos(2 * math.pi * z)
        mlp = 0.2 + 0.05 * math.cos(2 * math.pi * z)
        assert found[f"layers.{layer}.attn"] == pytest.approx(attn, abs=1e-15)
        assert found[f"layers.{layer}.mlp"] == pytest.approx(mlp, abs=1e-15)
        assert found[f"layers.{layer}.norm"] == pytest.approx((attn + mlp) / 2, abs=1e-15)
    assert found["embed"] == found["norm"] == pytest.approx(0.35, abs=1e-15)


def test_default_bounds_of_a_curve_shrink_with_the_order_and_start_flat() -> None:
    space = space_of("curve")
    assert space.low[:3] == pytest.approx([-0.2, -1.7 / 4, -1.7 / 8])
    assert space.high[:3] == pytest.approx([1.5, 1.7 / 4, 1.7 / 8])
    assert space.x0.tolist() == space.uniform_genome.tolist() == [0.5, 0, 0, 0.5, 0, 0]
    own = space_of("curve", bounds={"weight": (0, 1), "weight_curve": (-0.1, 0.2)})
    assert own.low.tolist() == [0, -0.1, -0.1] * 2 and own.high.tolist() == [1, 0.2, 0.2] * 2
    assert own.ranges()[0][:2] == ("weight", "math")
    assert own.ranges()[0][3] == pytest.approx(1 + 0.2 * (math.cos(math.pi / 12) + math.cos(math.pi / 6)))


def test_decode_does_not_clamp() -> None:
    space = space_of("uniform")
    assert weights(space.decode([-3.0, 9.0])) == dict.fromkeys(weights(space.decode(space.x0)), -3.0)


def test_blocks_are_contiguous_and_outside_is_the_mean_over_layers() -> None:
    space = space_of("blocks", 6, blocks=4)
    assert space.names[:4] == (
        "weight[math].layer0",
        "weight[math].layers1-2",
        "weight[math].layer3",
        "weight[math].layers4-5",
    )
    found = weights(space.decode([0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0]))
    assert [found[f"layers.{i}.mlp"] for i in range(6)] == [0.1, 0.2, 0.2, 0.3, 0.4, 0.4]
    assert found["embed"] == pytest.approx(1.6 / 6)


def test_parameters_with_a_domain_are_uniform_beside_a_curve() -> None:
    space = space_of("curve", bounds={"density": (0.2, 0.9)})
    assert [n for n in space.names if n.startswith("density")] == ["density[math]", "density[code]"]
    slerp = space_of("curve", sources=(1,), operator="slerp@1", parameters=(T,), tensor_types=("attn", "mlp"))
    assert slerp.names == ("t.attn", "t.mlp")
    plan = slerp.decode([0.25, 0.75])
    assert plan.base == 0 and [s.model for s in plan.groups[0].sources] == [1]
    assert {g.name: g.parameters["t"] for g in plan.groups[:4]} == {
        "embed": 0.5,
        "layers.0.attn": 0.25,
        "layers.0.mlp": 0.75,
        "layers.0.norm": 0.5,
    }


def test_fixed_values_go_where_their_scope_says_and_are_not_genes() -> None:
    space = space_of("uniform", fixed={"density": [0.3, 0.6], "lambda": 1.2, "normalize": True})
    group = space.decode(space.x0).groups[0]
    assert [s.parameters for s in group.sources] == [{"density": d, "weight": 0.5} for d in (0.3, 0.6)]
    assert group.parameters == {"lambda": 1.2, "normalize": True}
    assert space.size == 2
    only = space_of("uniform", bounds={"lambda": (0.5, 2)}, fixed={"weight": 0.4})
    assert only.names == ("lambda",)


def test_a_start_outside_the_bounds_moves_to_their_middle() -> None:
    space = space_of("uniform", bounds={"weight": (0.6, 1.0)})
    assert space.x0.tolist() == [0.8, 0.8] and space.uniform_genome.tolist() == [0.5, 0.5]


LIFTS = [
    ({"shape": "uniform"}, {"shape": "curve", "tensor_types": ("attn", "mlp")}),
    ({"shape": "uniform"}, {"shape": "blocks", "blocks": 4}),
    ({"shape": "uniform"}, {"shape": "layers", "tensor_types": ("attn", "mlp")}),
    ({"shape": "blocks", "blocks": 2}, {"shape": "blocks", "blocks": 4}),
    ({"shape": "blocks", "blocks": 4}, {"shape": "layers"}),
    ({"shape": "curve", "coefficients": 2}, {"shape": "curve", "coefficients": 4}),
    ({"shape": "curve", "coefficients": 3}, {"shape": "layers", "tensor_types": ("attn", "mlp")}),
]


@pytest.mark.parametrize(("coarse", "fine"), LIFTS)
@pytest.mark.parametrize("layers", [6, 7])
def test_growing_a_space_keeps_the_plan(coarse: dict[str, Any], fine: dict[str, Any], layers: int) -> None:
    small, large = space_of(layers=layers, **coarse), space_of(layers=layers, **fine)
    genome = np.random.default_rng(layers).uniform(small.low, small.high)
    before, after = small.decode(genome), large.decode(lift(small, large, genome))
    for source in (0, 1):
        old, new = weights(before, source), weights(after, source)
        assert max(abs(old[k] - new[k]) for k in old) <= 1e-12


def test_spaces_that_do_not_nest_refuse_a_lift() -> None:
    with pytest.raises(ShoalError, match="not in the image of this blocks space"):
        lift(space_of("blocks", blocks=2), space_of("blocks", blocks=3), [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "dtype and seed"),
        ({"operator": "dare_ties@1"}, "operator of embed: expected dare_ties@1, found ties@1"),
        ({"sources": (2, 1)}, "sources of embed"),
        ({"fixed": {"density": 0.5}}, "parameters of embed"),
        ({"fixed": {"normalize": False}}, "normalize of embed: expected False, found True"),
    ],
)
def test_a_plan_of_another_space_is_refused_with_what_differs(change: dict[str, Any], message: str) -> None:
    fixed = {"normalize": True}
    space = space_of(fixed=fixed)
    with pytest.raises(ShoalError, match=message):
        space_of(**{"fixed": fixed, **change}).encode(space.decode(space.x0))


def test_another_fixed_value_is_part_of_the_residual() -> None:
    plan = space_of(fixed={"density": 0.5}).decode([0.5, 0, 0, 0.4, 0, 0])
    other = space_of(fixed={"density": 0.7})
    genome, residual = other.project(plan)
    assert residual == pytest.approx(0.2) and genome == pytest.approx([0.5, 0, 0, 0.4, 0, 0])
    with pytest.raises(ShoalError, match=r"differs by 0\.2"):
        other.encode(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "curv"}, "did you mean 'curve'"),
        ({"bounds": {"wieght": (0, 1)}}, "did you mean 'weight'"),
        ({"bounds": {"weight": (1.0, 1.0)}}, r"low < high; found \[1.0, 1.0\]"),
        ({"bounds": {"density": (0.5, 1.2)}}, "leaves the domain"),
        ({"bounds": {"weight_curve": (0.1, 0.2)}}, "must contain 0"),
        ({"bounds": {"density": (0.1, 1)}, "fixed": {"density": 0.5}}, "not both"),
        ({"fixed": {"density": 1.5}}, r"in \[0.0, 1.0\], found 1.5"),
        ({"fixed": {"density": [0.5]}}, "expected 2 values"),
        ({"fixed": {"lambda": [1.0, 1.0]}}, "give one value"),
        ({"fixed": {"weight": 0.5}}, "nothing to search"),
        ({"tensor_types": ("atn",)}, "no layer has 'atn'"),
        ({"tensor_types": ("attn", "attn")}, "named once"),
        ({"coefficients": 7}, "expected 1 to 6"),
        ({"shape": "blocks", "blocks": 0}, "expected 1 to 6"),
        ({"shape": "layers", "layers": 0}, "needs a model with layers"),
        ({"sources": (1, 3)}, "not all among the 3 models"),
    ],
)
def test_what_does_not_fit_together_is_an_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        space_of(**change)


def test_a_tensor_type_that_some_layers_lack_needs_fewer_genes() -> None:
    groups = [g for g in groups_of(6) if g.kind != "attn" or g.layer in (1, 4)]
    arguments: Any = ((*MODELS,), 0, (1, 2), "ties@1", (WEIGHT,))
    with pytest.raises(RecipeError, match="only 2 of 6 layers have 'attn' tensors, too few for 3 genes"):
        make_space("curve", groups, *arguments, tensor_types=("attn", "mlp"), dtype="float32", seed=0)
    space = make_space(
        "curve", groups, *arguments, coefficients=2, tensor_types=("attn", "mlp"), dtype="float32", seed=0
    )
    genome = np.random.default_rng(0).uniform(space.low, space.high)
    assert space.encode(space.decode(genome)) == pytest.approx(genome, abs=1e-12)


@pytest.mark.parametrize("genome", [[0.0], [math.nan] * 6, np.zeros((1, 6))])
def test_a_genome_of_wrong_shape_or_nan_is_refused(genome: Any) -> None:
    with pytest.raises(ShoalError, match="expected 6 finite numbers"):
        space_of().decode(genome)


def test_a_table_has_a_row_per_gene_set_and_a_column_per_layer() -> None:
    space = space_of("blocks", 4, blocks=2, tensor_types=("attn", "mlp"))
    table = space.values([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    assert table.rows == ("weight[math].attn", "weight[math].mlp", "weight[code].attn", "weight[code].mlp")
    assert table.columns == ("0", "1", "2", "3", "embed", "norm")
    assert table.values[1] == pytest.approx([0.3, 0.3, 0.4, 0.4, 0.25, 0.25])


def test_baselines_are_linear_and_name_every_group() -> None:
    groups = groups_of(3)
    uniform = uniform_merge_plan(groups, MODELS, (0, 1, 2), "float32", 0)
    assert [g.name for g in uniform.groups] == [g.name for g in groups] and uniform.base is None
    for group in uniform.groups:
        assert group.operator == "linear@1" and group.parameters == {"normalize": True}
        assert [(s.model, s.parameters["weight"]) for s in group.sources] == [(m, 1 / 3) for m in range(3)]
    parent = parent_plan(groups, MODELS, 2, "float32")
    assert {(s.model, s.parameters["weight"]) for g in parent.groups for s in g.sources} == {(2, 1.0)}
    with pytest.raises(ShoalError, match="no model 3"):
        parent_plan(groups, MODELS, 3, "float32")
