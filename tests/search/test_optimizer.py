"""Ask/tell: order, scaling, failures, replay, and that cma touches nothing outside itself."""

import importlib.util
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import RecipeError, ShoalError
from shoal.search import CMAES, Optimizer, RandomSearch, default_popsize, default_sigma0, make_space
from shoal.search.baselines import Grid, common_directions
from shoal.search.cmaes import _Randn
from shoal.search.lq import LQCMAES
from shoal.search.nsga2 import NSGA2
from shoal.search.optimizer import OPTIMIZERS, Start, make_optimizer, warm_sigma0
from shoal.search.surrogate import LQModel
from shoal.types import ParameterSpec, TensorGroup

LOW, HIGH = np.array([-0.2, 0.1, -1.0]), np.array([1.5, 1.0, 3.0])
X0 = np.array([0.4, 0.5, 0.0])
GOAL = np.array([0.9, 0.2, 2.0])


def sphere(genomes: np.ndarray) -> np.ndarray:
    return -(((genomes - GOAL) / (HIGH - LOW)) ** 2).sum(axis=1)


def run(
    optimizer: Optimizer, fitness: Callable[[np.ndarray], np.ndarray], generations: int
) -> list[np.ndarray]:
    asked = []
    for _ in range(generations):
        asked.append(optimizer.ask())
        optimizer.tell(asked[-1], fitness(asked[-1]))
    return asked


def test_defaults_follow_the_design() -> None:
    assert [default_popsize(n) for n in (1, 6, 12, 24, 48, 96)] == [4, 9, 11, 13, 15, 17]
    assert default_sigma0(4) == 1 / 6 and default_sigma0(100) == 0.05


def test_cmaes_finds_the_optimum_in_natural_units_and_returns_its_mean() -> None:
    optimizer = CMAES(LOW, HIGH, X0, seed=1)
    assert optimizer.popsize == 7 and optimizer.mean == pytest.approx(X0, abs=1e-12)
    assert optimizer.stds == pytest.approx((HIGH - LOW) / 6, rel=1e-3)
    asked = run(optimizer, sphere, 80)
    assert optimizer.generation == 80
    assert optimizer.mean == pytest.approx(GOAL, abs=1e-3)
    assert all((a >= LOW).all() and (a <= HIGH).all() and a.shape == (7, 3) for a in asked)


def test_ranks_lose_nothing_against_cma_told_the_values() -> None:
    import cma

    options = {
        "randn": _Randn(5),
        "seed": math.nan,
        "bounds": [[0.0] * 3, [1.0] * 3],
        "popsize": 7,
        "minstd": 1e-6,
        "verbose": -10,
        "verb_log": 0,
    }
    plain = cma.CMAEvolutionStrategy((X0 - LOW) / (HIGH - LOW), 1 / 6, options)
    ours = CMAES(LOW, HIGH, X0, seed=5)
    for _ in range(25):
        solutions, asked = plain.ask(), ours.ask()
        assert np.array_equal(LOW + np.array(solutions) * (HIGH - LOW), asked)
        plain.tell(solutions, (-sphere(asked)).tolist())
        ours.tell(asked, sphere(asked))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["flat", "sphere", "edge"])
def test_long_runs_neither_stop_nor_break(n: int, kind: str) -> None:
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "flat": lambda g: np.zeros(len(g)),
        "sphere": lambda g: -((g - 0.3) ** 2).sum(axis=1),
        "edge": lambda g: g.sum(axis=1),
    }
    optimizer = CMAES(np.zeros(n), np.ones(n), np.full(n, 0.5), seed=n)
    asked = run(optimizer, functions[kind], 300)
    assert len(asked) == 300 and all(len(np.unique(a[:, 0])) > 1 for a in asked)
    if kind != "flat":
        assert optimizer.mean == pytest.approx(np.full(n, 0.3 if kind == "sphere" else 1.0), abs=1e-3)


def test_a_start_on_the_bounds_can_be_searched() -> None:
    optimizer = CMAES([0, 0], [1, 1], [0, 1], seed=0)
    assert optimizer.mean == pytest.approx([0, 1], abs=1e-9)
    run(optimizer, lambda g: -((g - 0.5) ** 2).sum(axis=1), 60)
    assert optimizer.mean == pytest.approx([0.5, 0.5], abs=1e-3)


def test_nothing_outside_the_optimizer_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cma  # noqa: F401  (importing it adds filters for its dependencies; making a strategy must not)

    monkeypatch.chdir(tmp_path)
    Path("cma_signals.in").write_text("{'timeout': 0}")
    np.random.seed(3)
    before, filters = np.random.get_state()[1].copy(), list(warnings.filters)
    first = run(CMAES(LOW, HIGH, X0, seed=2), sphere, 10)
    assert (np.random.get_state()[1] == before).all()
    assert warnings.filters == filters
    assert [p.name for p in tmp_path.iterdir()] == ["cma_signals.in"]

    np.random.seed(4)

    def noisy(genomes: np.ndarray) -> np.ndarray:
        np.random.random(100)
        return sphere(genomes)

    assert np.array_equal(first, run(CMAES(LOW, HIGH, X0, seed=2), noisy, 10))
    assert not np.array_equal(first, run(CMAES(LOW, HIGH, X0, seed=3), sphere, 10))


REPLAY = """
import json, sys
import numpy as np
from shoal.search import CMAES
state = json.load(sys.stdin)
optimizer = CMAES(state["low"], state["high"], state["x0"], seed=state["seed"])
for genomes, fitness in state["journal"]:
    optimizer.ask()
    optimizer.tell(genomes, fitness)
json.dump(optimizer.ask().tolist(), sys.stdout)
"""


@pytest.mark.parametrize("n", [1, 3])
def test_replaying_a_journal_in_a_fresh_process_asks_the_same_genomes(n: int) -> None:
    low, high, x0 = LOW[:n], HIGH[:n], X0[:n]
    optimizer = CMAES(low, high, x0, seed=11)
    noise = np.random.default_rng(0)
    journal = []
    for generation in range(30):
        genomes = optimizer.ask()
        fitness = np.round(noise.normal(size=optimizer.popsize), 1)  # ties
        fitness[noise.random(optimizer.popsize) < (1.0 if generation == 4 else 0.1)] = math.nan
        optimizer.tell(genomes, fitness)
        journal.append((genomes.tolist(), fitness.tolist()))
    state = {"low": low.tolist(), "high": high.tolist(), "x0": x0.tolist(), "seed": 11, "journal": journal}
    done = subprocess.run(
        [sys.executable, "-c", REPLAY], input=json.dumps(state), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == optimizer.ask().tolist()


def test_a_failed_candidate_counts_as_worse_than_the_worst() -> None:
    told = {}
    for name, failed in (("nan", math.nan), ("worst", -1e9), ("better", 0.7)):
        optimizer = CMAES(LOW, HIGH, X0, seed=1)
        genomes = optimizer.ask()
        optimizer.tell(genomes, [0.0, 1.0, failed, 0.2, 0.8, 0.6, 0.1])
        told[name] = optimizer.mean.tolist()
    assert told["nan"] == told["worst"] != told["better"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_failed_candidates_shape_nothing_and_attract_nothing(diagonal: bool) -> None:
    # where failed candidates lie must not matter: neither to the negative update nor, where too few are left, to the mean
    for alive in (5, 2, 1):
        after = []
        for moved in (0.0, 0.3):
            optimizer = CMAES(LOW, HIGH, X0, seed=1, diagonal=diagonal)
            genomes = optimizer.ask()
            for solution in optimizer._solutions[alive:]:
                solution += moved * (0.5 - solution)
            shifted = optimizer._asked.ask(np.array(optimizer._solutions))
            optimizer.tell(shifted, [float(i) for i in range(alive)] + [math.nan] * (7 - alive))
            after.append((optimizer.mean, optimizer.covariance, genomes[:alive]))
        assert np.allclose(after[0][0], after[1][0], rtol=0, atol=1e-12)
        assert np.allclose(after[0][1], after[1][1], rtol=0, atol=1e-12)
        if alive == 1:  # towards the only one that is known, not onto it
            step, way = after[0][0] - X0, after[0][2][0] - X0
            assert 0 < step @ way < way @ way


def test_a_generation_that_failed_as_a_whole_leaves_the_distribution_and_draws_again() -> None:
    optimizer = CMAES(LOW, HIGH, X0, seed=1)
    first = run(optimizer, sphere, 3)[-1]
    mean, stds = optimizer.mean, optimizer.stds
    failed = run(optimizer, lambda g: np.full(len(g), math.nan), 1)[0]
    assert optimizer.generation == 4
    assert np.array_equal(optimizer.mean, mean) and np.array_equal(optimizer.stds, stds)
    again = optimizer.ask()
    assert not np.array_equal(again, failed) and not np.array_equal(again, first)


def _grid(low: np.ndarray, high: np.ndarray, x0: np.ndarray, seed: int = 0) -> Optimizer:
    return Grid(low, high, x0, directions=np.eye(3)[:2])


@pytest.mark.parametrize("make", [CMAES, RandomSearch, _grid])
def test_order_and_shapes_are_checked(make: Callable[..., Optimizer]) -> None:
    optimizer = make(LOW, HIGH, X0, seed=0)
    with pytest.raises(RuntimeError, match="nothing was asked"):
        optimizer.tell(np.zeros((7, 3)), np.zeros(7))
    genomes = optimizer.ask()
    with pytest.raises(RuntimeError, match="not told yet"):
        optimizer.ask()
    with pytest.raises(
        ShoalError, match=r"expected genomes \(7, 3\) and fitness \(7,\), found \(7, 3\) and \(6,\)"
    ):
        optimizer.tell(genomes, np.zeros(6))
    with pytest.raises(ShoalError, match=r"found \(6, 3\)"):
        optimizer.tell(genomes[:6], np.zeros(7))
    other = genomes.copy()
    other[2, 1] = np.nextafter(other[2, 1], 1)
    with pytest.raises(ShoalError, match="genome 2 is not the one asked"):
        optimizer.tell(other, np.zeros(7))
    with pytest.raises(ShoalError, match=r"\+inf is no score"):
        optimizer.tell(genomes, [math.inf] + [0.0] * 6)
    optimizer.tell(genomes, np.arange(7.0))
    assert optimizer.generation == 1


def test_changing_what_was_asked_does_not_change_the_optimizer() -> None:
    optimizer = CMAES(LOW, HIGH, X0, seed=0)
    genomes = optimizer.ask()
    kept = genomes.copy()
    genomes[:] = 0
    optimizer.tell(kept, np.arange(7.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": [0.4, 2.0, 0.0]}, "within the bounds"),
        ({"x0": [0.4]}, r"found \(3,\), \(3,\), \(1,\)"),
        ({"low": LOW, "high": LOW}, "low < high"),
        ({"popsize": 3}, "at least 4"),
        ({"sigma0": 0.0}, r"in \(0, 1\]"),
    ],
)
def test_what_cannot_be_searched_is_an_error(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"low": LOW, "high": HIGH, "x0": X0, "seed": 0, **change}
    low, high, x0 = (arguments.pop(k) for k in ("low", "high", "x0"))
    with pytest.raises(ShoalError, match=message):
        CMAES(low, high, x0, **arguments)  # type: ignore[arg-type]


def test_negative_weights_can_be_turned_off_for_racing() -> None:
    # without them the order of the losers (ranks 4 to 7 of 7) decides nothing
    fitness = np.array([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    shuffled = np.array([7.0, 6.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    for active, same in ((False, True), (True, False)):
        asked = []
        for told in (fitness, shuffled):
            optimizer = CMAES(LOW, HIGH, X0, seed=0, active=active)
            optimizer.tell(optimizer.ask(), told)
            asked.append(run(optimizer, sphere, 5)[-1])
        assert np.allclose(*asked, rtol=0, atol=1e-9) is same


def test_random_search_keeps_the_best_and_repeats_by_seed() -> None:
    optimizer = RandomSearch(LOW, HIGH, X0, seed=0)
    assert optimizer.mean.tolist() == X0.tolist()
    run(optimizer, lambda g: np.full(len(g), math.nan), 1)
    assert optimizer.mean.tolist() == X0.tolist()
    asked = np.concatenate(run(optimizer, sphere, 20))
    assert optimizer.mean.tolist() == asked[np.argmax(sphere(asked))].tolist()
    assert (asked >= LOW).all() and (asked <= HIGH).all()
    assert asked.mean(axis=0) == pytest.approx((LOW + HIGH) / 2, abs=0.3)
    again = RandomSearch(LOW, HIGH, X0, seed=0)
    again.tell(again.ask(), np.zeros(7))
    assert np.array_equal(again.ask(), asked[:7])


def test_cma_beats_random_search_at_equal_cost() -> None:
    scores = []
    for make in (CMAES, RandomSearch):
        optimizers: list[Optimizer] = [make(LOW, HIGH, X0, seed=s) for s in range(5)]
        for optimizer in optimizers:
            run(optimizer, sphere, 30)
        scores.append([float(sphere(o.mean[None])[0]) for o in optimizers])
    assert min(scores[0]) > max(scores[1])


def test_importing_search_imports_neither_cma_nor_torch() -> None:
    code = "import sys, shoal.search; sys.exit(bool({'cma', 'torch', 'scipy.stats'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


NEEDS_PYMOO = pytest.mark.skipif(
    importlib.util.find_spec("pymoo") is None, reason="needs pymoo: pip install 'shoal[pareto]'"
)
NAMES = [pytest.param(n, marks=NEEDS_PYMOO) if n == "nsga2" else n for n in OPTIMIZERS]


def start(**changes: object) -> Start:
    arguments: dict[str, object] = {
        "low": LOW,
        "high": HIGH,
        "x0": X0,
        "seed": 5,
        "directions": np.eye(3)[[0, 2]],
    }
    return Start(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_replays_with_failures_and_leaves_numpys_random_numbers_alone(name: str) -> None:
    noise, journal = np.random.default_rng(0), []
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    optimizer = make_optimizer(name, start())
    for generation in range(12):
        genomes = optimizer.ask()
        fitness = np.round(noise.normal(size=(optimizer.popsize, 2)), 1)
        fitness[noise.random(optimizer.popsize) < (1.0 if generation == 4 else 0.2), 0] = math.nan
        told = fitness if name == "nsga2" else fitness[:, 0]
        optimizer.tell(genomes, told)
        journal.append((json.loads(json.dumps(genomes.tolist())), told.tolist()))
        assert genomes.shape == (7, 3) and (genomes >= LOW).all() and (genomes <= HIGH).all()
    assert optimizer.generation == 12 and (LOW <= optimizer.mean).all() and (optimizer.mean <= HIGH).all()
    np.random.seed(4)
    again = make_optimizer(name, start())
    for told_genomes, told in journal:
        again.ask()
        again.tell(told_genomes, told)
    assert np.array_equal(again.ask(), optimizer.ask()) and np.array_equal(again.mean, optimizer.mean)
    np.random.seed(3)
    assert (np.random.get_state()[1] == before).all()


def test_an_unknown_optimizer_is_an_error_that_lists_the_valid_names() -> None:
    with pytest.raises(RecipeError, match=r"search.algorithm: unknown 'cmaes'; did you mean 'cma-es'"):
        make_optimizer("cmaes", start())


def test_a_warm_start_begins_nearer() -> None:
    warm = make_optimizer("cma-es", start(sigma0=warm_sigma0(3))).ask() - X0
    cold = make_optimizer("cma-es", start()).ask() - X0
    assert np.allclose(warm, 0.3 * cold, rtol=0.05)
    assert warm_sigma0(3) == pytest.approx(0.3 * default_sigma0(3))


def test_separable_cmaes_learns_scales_faster_and_no_interactions() -> None:
    n = 40
    scale = 10 ** np.linspace(0, 1.5, n)

    def worth(genomes: np.ndarray) -> np.ndarray:
        return -((scale * (genomes - 0.4)) ** 2).sum(axis=1)

    found = []
    for diagonal in (False, True):
        optimizer = CMAES(np.zeros(n), np.ones(n), np.full(n, 0.6), seed=0, diagonal=diagonal)
        run(optimizer, worth, 120)
        found.append(float(worth(optimizer.mean[None])[0]))
    assert found[1] > found[0]
    assert np.array_equal(optimizer.covariance, np.diag(np.diag(optimizer.covariance)))


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_given_covariance_is_what_is_sampled(diagonal: bool) -> None:
    wanted = np.array([[0.02, 0.01, 0.0], [0.01, 0.03, 0.0], [0.0, 0.0, 0.1]])
    asked = np.concatenate(
        [CMAES(LOW, HIGH, X0, seed=s, diagonal=diagonal, covariance=wanted).ask() for s in range(400)]
    )
    expected = np.diag(np.diag(wanted)) if diagonal else wanted
    assert np.allclose(
        CMAES(LOW, HIGH, X0, seed=0, diagonal=diagonal, covariance=wanted).covariance, expected
    )
    assert np.allclose(np.cov(asked.T), expected, rtol=0.15, atol=0.002)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"covariance": np.eye(2)}, r"positive definite matrix \(3, 3\), found shape \(2, 2\)"),
        ({"covariance": -np.eye(3)}, "positive definite"),
        ({"covariance": np.eye(3), "sigma0": 0.1}, "give one of the two"),
    ],
)
def test_a_covariance_that_is_none_is_an_error(change: dict[str, object], message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        make_optimizer("cma-es", start(**change))


def test_the_grid_covers_common_weights_evenly_however_long_it_runs() -> None:
    optimizer = Grid(LOW, HIGH, X0, directions=np.eye(3)[[0, 2]])
    asked = np.concatenate(run(optimizer, sphere, 12))
    assert (asked[:, 1] == 0.0).all() if X0[1] == 0.0 else (asked[:, 1] == X0[1]).all()
    unit = (asked[:, [0, 2]] - LOW[[0, 2]]) / (HIGH - LOW)[[0, 2]]
    for count in (16, 40, 84):
        counts = np.histogram2d(*unit[:count].T, bins=2, range=[[0, 1], [0, 1]])[0]
        assert counts.max() - counts.min() <= 4
    assert optimizer.mean.tolist() == asked[np.argmax(sphere(asked))].tolist()


def test_a_common_weight_reaches_every_group_of_every_shape() -> None:
    groups = [TensorGroup(f"layers.{i}.{k}", i, k, (f"{i}.{k}",)) for i in range(4) for k in ("attn", "mlp")]  # type: ignore[arg-type]
    groups.append(TensorGroup("embed", None, "embed", ("embed",)))
    weight = ParameterSpec("weight", "source", -0.2, 1.5, default=None)
    density = ParameterSpec("density", "source", 0.1, 1.0, 0.5, domain=(0.0, 1.0))
    for shape in ("uniform", "blocks", "layers", "curve"):
        space = make_space(
            shape,  # type: ignore[arg-type]
            groups, ("base", "a", "b"), 0, (1, 2), "ties@1", (weight, density),
            tensor_types=("attn", "mlp"), dtype="float32", seed=0,
        )  # fmt: skip
        optimizer = Grid(space.low, space.high, space.x0, directions=common_directions(space))
        for genome in optimizer.ask():
            plan = space.decode(genome)
            for source in (0, 1):
                values = [g.sources[source].parameters["weight"] for g in plan.groups]
                assert np.ptp(values) <= 1e-12 and -0.2 <= values[0] <= 1.5
                assert {g.sources[source].parameters["density"] for g in plan.groups} == {0.5}


@pytest.mark.parametrize("directions", [[], [[1, 0]], [[1, 1, 0], [0, 1, 0]], [[0, 0, 0]], [[-1, 0, 0]]])
def test_directions_that_do_not_fit_are_an_error(directions: list[object]) -> None:
    with pytest.raises(ShoalError, match="grid: "):
        make_optimizer("grid", start(directions=directions))


@NEEDS_PYMOO
def test_nsga2_spreads_over_the_front_of_two_goals() -> None:
    goals = np.array([[0.2, 0.3, 0.0], [1.2, 0.3, 0.0]])

    def worth(genomes: np.ndarray) -> np.ndarray:
        return np.stack([-((genomes - g) ** 2).sum(axis=1) for g in goals], axis=1)

    optimizer = NSGA2(LOW, HIGH, X0, objectives=2, popsize=16, seed=1)
    run(optimizer, worth, 60)
    genomes, values = optimizer.front
    assert len(genomes) == 16 and np.array_equal(values, worth(genomes))
    assert np.abs(genomes[:, 1:] - goals[0, 1:]).max() < 0.1
    assert np.histogram(genomes[:, 0], bins=4, range=(0.2, 1.2))[0].min() >= 1
    for a in values:
        assert not ((values >= a).all(axis=1) & (values > a).any(axis=1)).any()
    assert optimizer.mean.tolist() == genomes[np.argmax(values.sum(axis=1))].tolist()


@NEEDS_PYMOO
def test_nsga2_checks_its_objectives_and_survives_failures_of_all() -> None:
    with pytest.raises(ShoalError, match="two or more objectives, found 1; use cma-es"):
        make_optimizer("nsga2", start(objectives=1))
    optimizer = make_optimizer("nsga2", start())
    genomes = optimizer.ask()
    with pytest.raises(ShoalError, match=r"fitness \(7, 2\), found \(7, 3\) and \(7,\)"):
        optimizer.tell(genomes, np.zeros(7))
    optimizer.tell(genomes, np.full((7, 2), math.nan))
    assert optimizer.mean.tolist() == X0.tolist()
    genomes = optimizer.ask()
    optimizer.tell(genomes, [[math.nan, 1.0]] * 6 + [[0.0, 0.0]])
    assert optimizer.mean == pytest.approx(genomes[6], abs=1e-12)


def test_nsga2_without_pymoo_names_the_extra() -> None:
    code = """
import sys
sys.modules["pymoo.algorithms.moo.nsga2"] = None
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "pymoo" or name.startswith("pymoo."):
            raise ModuleNotFoundError(f"No module named {name!r}", name="pymoo")
sys.meta_path.insert(0, Missing())
del sys.modules["pymoo.algorithms.moo.nsga2"]
from shoal.errors import ShoalError
from shoal.search.lq import LQCMAES
from shoal.search.nsga2 import NSGA2
try:
    NSGA2([0, 0], [1, 1], [0.5, 0.5], objectives=2, seed=0)
except ShoalError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "nsga2 needs pymoo: pip install 'shoal[pareto]'"


def test_the_surrogate_chooses_only_while_its_forecasts_agree_with_scores() -> None:
    rng = np.random.default_rng(0)
    optimizer = LQCMAES(LOW, HIGH, X0, seed=1)
    run(optimizer, sphere, 30)
    # of 26 that three forecasts precede
    assert 13 < optimizer.chosen <= 26
    assert optimizer.mean == pytest.approx(GOAL, abs=0.05)
    # scores turned round: the forecasts of the next generation are as wrong as can be
    chosen = optimizer.chosen
    run(optimizer, lambda g: -sphere(g), 1)
    run(optimizer, lambda g: -1e3 * sphere(g), 3)
    assert optimizer.chosen < chosen + 4
    blind = LQCMAES(LOW, HIGH, X0, seed=1)
    run(blind, lambda g: rng.normal(size=len(g)), 60)
    assert blind.chosen < 45
    flat = LQCMAES(LOW, HIGH, X0, seed=1)
    asked = run(flat, lambda g: np.zeros(len(g)), 10)
    plain = CMAES(LOW, HIGH, X0, seed=1)
    assert flat.chosen == 0
    assert np.array_equal(asked, run(plain, lambda g: np.zeros(len(g)), 10))


def test_what_the_surrogate_chooses_is_what_it_expects_most_of() -> None:
    model = lambda genomes: -np.abs(genomes[:, 0])
    chosen = CMAES(LOW, HIGH, X0, seed=1).ask(model, 14)
    pool = np.concatenate([CMAES(LOW, HIGH, X0, seed=1, popsize=21).ask()])
    assert {g.tobytes() for g in chosen} <= {g.tobytes() for g in pool}
    best = sorted(np.abs(pool[:, 0]))[:7]
    assert sorted(np.abs(chosen[:, 0])) == best


def test_with_a_surrogate_a_smooth_optimum_is_found_with_fewer_candidates() -> None:
    n, seeds = 12, 6
    scale = np.linspace(1.0, 4.0, n)

    def reached(make: Callable[..., Optimizer], seed: int) -> float:
        noise = np.random.default_rng([9, seed])
        optimizer = make(np.zeros(n), np.ones(n), np.full(n, 0.5), seed=seed)

        def worth(genomes: np.ndarray) -> np.ndarray:
            return -((scale * (genomes - 0.62)) ** 2).sum(axis=1)

        run(optimizer, lambda g: worth(g) + 0.02 * noise.normal(size=len(g)), 25)
        return float(worth(optimizer.mean[None])[0])

    plain, helped = ([reached(make, s) for s in range(seeds)] for make in (CMAES, LQCMAES))
    assert np.mean(helped) > np.mean(plain)


def test_the_surrogate_starts_with_a_given_covariance_and_keeps_failures_out() -> None:
    wanted = np.array([[0.02, 0.01, 0.0], [0.01, 0.03, 0.0], [0.0, 0.0, 0.1]])
    optimizer = make_optimizer("lq-cma-es", start(covariance=wanted))
    assert isinstance(optimizer, LQCMAES) and np.allclose(optimizer.covariance, wanted)
    for generation in range(8):
        genomes = optimizer.ask()
        fitness = sphere(genomes)
        fitness[: (2, 5, 6, 7)[generation % 4]] = (
            math.nan
        )  # of 7: too few are left to learn from in two of four
        optimizer.tell(genomes, fitness)
    assert optimizer.generation == 8 and np.isfinite(optimizer.ask()).all()


def test_the_model_finds_a_quadratic_function_under_noise_and_under_the_shifts_of_generations() -> None:
    rng = np.random.default_rng(3)
    slopes, curves = rng.normal(size=6), -rng.uniform(0.2, 1.0, 6)

    def truth(points: np.ndarray) -> np.ndarray:
        return points @ slopes + np.square(points) @ curves

    points, generations = rng.normal(size=(120, 6)), np.repeat(np.arange(12), 10)
    shifts = 20.0 * rng.normal(size=12)[generations]
    exact = LQModel(points, truth(points) + shifts, generations.tolist())
    new = rng.normal(size=(200, 6))
    # of a shift, which is all that may differ, and a rest that comes from the smallest noise allowed
    assert np.std(exact(new) - truth(new)) < 0.02 * np.std(truth(new))
    noisy = LQModel(points, truth(points) + shifts + 2.0 * rng.normal(size=120), generations.tolist())
    assert 0.7 < np.corrcoef(noisy(new), truth(new))[0, 1] < 1
    # it shrinks where there is nothing to learn
    nothing = LQModel(points, rng.normal(size=120), generations.tolist())
    assert np.std(nothing(new)) < 0.5
    assert np.array_equal(LQModel(points[:2], [1.0, 1.0], [0, 1])(new), np.zeros(200))
