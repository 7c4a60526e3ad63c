"""Which merges are linear in their weights, so that one gradient of the weights gives those of all coefficients.

Linear: merged = constant + sum over sources of weight x (a tensor that no weight changes). No torch in here.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal.errors import RecipeError
from shoal.merge.methods import METHODS, method
from shoal.types import MergePlan

# the deltas of the last three are thinned and rescaled by their densities alone, which a plan fixes; methods that elect
# signs (ties and its kind), select by all deltas together (sce) or measure angles (slerp and its kind) are not linear
LINEAR = ("linear", "task_arithmetic", "breadcrumbs", "dare_linear", "della_linear")


def why_not_linear(operator: str, options: Mapping[str, object]) -> str | None:
    """Why the merge is not linear in its weights, in a few words; None where it is.

    operator: `name` or `name@version`. options: of the group, as in a plan or recipe; what is missing is the default.
    """
    chosen = method(operator)
    if chosen.name not in LINEAR:
        return chosen.name
    # dividing by the sum of the weights makes a quotient of them
    normalize = options.get("normalize", chosen.options.get("normalize", False))
    return f"{chosen.name} with normalize: true" if normalize else None


def check_linear(operator: str, options: Mapping[str, object], where: str) -> None:
    """RecipeError, with what would do, where the merge is not linear in its weights."""
    reason = why_not_linear(operator, options)
    if reason is not None:
        only = [n for n in LINEAR if METHODS[n].options.get("normalize")]
        raise RecipeError(
            f"{where}: needs a merge that is linear in its weights, found {reason}; expected one of"
            f" {', '.join(LINEAR)}, without normalisation (for {' and '.join(only)} that is"
            " merge.parameters: {normalize: false})"
        )


def check_linear_plan(plan: MergePlan) -> None:
    """RecipeError where some group of the plan is not linear in its weights."""
    for group in plan.groups:
        check_linear(group.operator, group.parameters, f"gradient of group {group.name!r}")
