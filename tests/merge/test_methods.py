from __future__ import annotations

import subprocess
import sys

import pytest

from shoal.errors import RecipeError
from shoal.merge import METHODS, check_plan, method, resolved
from shoal.types import MergePlan, OutputGroup, Source


def test_the_table_is_mergekits_own_registry():
    from mergekit.merge_methods.registry import registered_methods

    theirs = {m.spec.name: m.spec for m in registered_methods()}
    assert METHODS.keys() == theirs.keys()
    for name, ours in METHODS.items():
        spec = theirs[name]
        contract = spec.contract
        assert ours.base == {"ignored": "none"}.get(contract.base.value, contract.base.value), name
        outside = int(contract.base.value == "required")  # mergekit's min_inputs counts the base
        lowest = contract.min_non_base or max(1, contract.min_inputs - outside)
        highest = contract.max_non_base or (contract.max_inputs and contract.max_inputs - outside)
        assert (ours.min_sources, ours.max_sources) == (lowest, highest), name
        scopes = {p.name: "group" if p.scope.value == "shared" else "source" for p in spec.parameters}
        mine = {p.name: p.scope for p in ours.parameters} | dict.fromkeys(ours.options, "group")
        # accepted by mergekit's shared code, without an effect on these methods' results
        for idle in ("int8_mask", *(("density", "rescale") if name == "task_arithmetic" else ())):
            scopes.pop(idle, None)
        assert mine == scopes, name
        for parameter in spec.parameters:
            if parameter.name in ours.options:
                assert ours.options[parameter.name] == parameter.default, (name, parameter.name)


def test_search_bounds_lie_in_the_domain_and_around_the_default():
    for chosen in METHODS.values():
        for p in chosen.parameters:
            assert p.low < p.high, (chosen.name, p.name)
            assert p.default is None or p.low <= p.default <= p.high, (chosen.name, p.name)
            assert p.domain is None or p.domain[0] <= p.low <= p.high <= p.domain[1], (chosen.name, p.name)


def test_unknown_names_get_the_nearest_valid_one():
    with pytest.raises(RecipeError, match="unknown merge method 'dare_tie'; did you mean 'dare_ties'"):
        method("dare_tie")
    with pytest.raises(RecipeError, match="version 1 here, not 7"):
        method("ties@7")
    assert method("ties@1") is METHODS["ties"]


def group(operator: str, *parameters: dict[str, float], **shared: float | bool) -> OutputGroup:
    return OutputGroup(
        "embed", operator, tuple(Source(i + 1, "embed", p) for i, p in enumerate(parameters)), (), shared
    )


def test_defaults_are_filled_in_and_mistakes_named():
    filled = resolved(group("ties", {"weight": 0.3}, {}))
    assert filled.per_source == ({"weight": 0.3, "density": 0.5}, {"weight": 0.5, "density": 0.5})
    assert filled.shared == {"lambda": 1.0, "normalize": True, "rescale": False}
    with pytest.raises(
        RecipeError, match=r"group 'embed', method 'ties': unknown parameter 'weigth'; did you mean"
    ):
        resolved(group("ties", {"weigth": 0.3}))
    with pytest.raises(RecipeError, match=r"density must lie in \[0.0, 1.0\], found 1.5"):
        resolved(group("ties", {"density": 1.5}))
    with pytest.raises(RecipeError, match="weight must be a finite number, found nan"):
        resolved(group("ties", {"weight": float("nan")}))
    with pytest.raises(RecipeError, match="expected 1 to 1 sources, found 2"):
        resolved(group("slerp", {}, {}))


def test_plans_without_the_base_they_need_are_refused():
    plan = MergePlan(("a", "b"), None, (group("ties", {}),))
    with pytest.raises(RecipeError, match="needs a base model"):
        check_plan(plan)
    with pytest.raises(RecipeError, match="'b' cannot also be a source"):
        check_plan(MergePlan(("a", "b"), 1, (group("ties", {}),)))
    with pytest.raises(RecipeError, match="source 2 is none of the 2 models"):
        check_plan(MergePlan(("a", "b"), 0, (group("ties", {}, {}),)))


def test_names_and_bounds_cost_no_torch():
    code = "import sys, shoal.merge as m; m.method('ties'); m.to_mergekit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
