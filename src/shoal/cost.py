"""What scoring will cost: tokens, arithmetic and seconds per candidate and for the whole run, after a short calibration.

The calibration scores some hundred tokens of the run's own requests with the first model, so that what is special about
machine, model and requests is in it. Seconds are estimates: other work on the machine and longer generations move them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import sanity
from shoal.preflight import Prepared
from shoal.sample import search_sample
from shoal.search.ascent import MOST
from shoal.types import ROLES, Role
from shoal.worker import plan_tasks

TOKENS = 1200  # of the calibration
GENERATED = 8  # tokens per prompt of the calibration
PROMPTS = 4


@dataclass(frozen=True)
class RoleCost:
    """One candidate on all items of a role that it meets, of search items an anchor's. generated: tokens at most."""

    tokens: int
    shared: int
    generated: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """candidate: of a generation. roles: on all items of a role. seconds: the whole run. share: of the machine's rate."""

    candidate: RoleCost
    roles: dict[Role, RoleCost]
    seconds: float
    share: float
    engine: str
    notes: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """(topic, sentence) rows for people."""
        one = self.candidate
        text = f"{one.tokens:,} tokens ({one.shared:,} more are shared and not computed), {_flops(one.flops)}"
        if one.generated:
            text += f", at most {one.generated:,} generated"
        return [
            ("candidate", f"{text}: about {_seconds(one.seconds)} of scoring"),
            (
                "",
                f"{self.engine}; {self.share:.0%} of the rate of this machine's matrix products in a short trial",
            ),
            (
                "run",
                f"about {_seconds(self.seconds)} of scoring in all, anchors, finalists, test and sanity guard included",
            ),
            *(("note", note) for note in self.notes),
        ]


def estimate(prepared: Prepared, device: str) -> Estimate:
    """Load the first model, plan the run's requests, score a few of them, and reckon.

    Raises:
        CheckpointError, EvaluationError: the model or a task cannot be loaded.
    """
    from shoal.evals.machine import forward_flops, matmul_rate
    from shoal.evals.plan import Cost, cost, prepare
    from shoal.evals.quiet import quiet_libraries
    from shoal.evals.resident import ResidentLM
    from shoal.merge.runtime import load_runtime
    from shoal.tokenizer import load_tokenizer

    recipe, lock = prepared.recipe, prepared.lock
    arguments = dict(recipe.evaluation.model_args)
    dtype = str(arguments.pop("dtype", "auto"))
    arguments.pop("device", None)
    with quiet_libraries():
        model = load_runtime(Path(lock.models[0].folder), lock.dtype if dtype == "auto" else dtype, device)
        tokenizer = load_tokenizer(Path(lock.models[lock.tokenizer].folder), recipe.output.chat_template)
        lm = ResidentLM(model, tokenizer, recipe.evaluation.batch_size, **arguments)
    tasks = plan_tasks(lock, recipe.evaluation, lm)
    prepare(lm, tasks)
    rate, decoding, share = _calibrate(lm, tasks, matmul_rate, forward_flops)
    searching = recipe.search.objective == "metric"

    def priced(found: Cost) -> RoleCost:
        flops = forward_flops(model, found.tokens, found.pairs / max(1, found.tokens), found.logits)
        flops += forward_flops(model, found.generated, 0.0, found.generated)
        seconds = found.tokens / rate + (found.generated / decoding if found.generated else 0.0)
        return RoleCost(found.tokens, found.shared, found.generated, flops, seconds)

    sample = search_sample(lock)
    roles = {
        role: priced(
            cost(
                lm,
                tasks,
                {
                    (t.task, role): sample[t.task] if role == "search" else t.roles[role].items
                    for t in lock.tasks
                },
                generate=role != "search" or searching,
            )
        )
        for role in ROLES
    }
    some = {(t.task, _SEARCH): t.roles["search"].items[: lock.search.items] for t in lock.tasks}
    candidate = priced(cost(lm, tasks, some, generate=searching))
    baselines = len(prepared.baselines())
    # at most: the best anchor meets the items of a generation that it has not met, and clear losers are no finalists
    seconds = (
        (baselines + 1) * roles["search"].seconds
        + prepared.generations * (lock.popsize + 1) * candidate.seconds
        + (baselines + 2) * roles["select"].seconds
        + (baselines + 1) * roles["test"].seconds
    )
    # finalists and parents write to the prompts of the sanity guard, at most to their last token
    writers = baselines + 2
    seconds += writers * len(sanity.PROMPTS) * sanity.MAX_TOKENS / _writing_rate(lm)
    if lock.search.start == "gradient":
        seconds += MOST * lock.search.start_items / lock.search.items * candidate.seconds
    return Estimate(candidate, roles, seconds, share, lm.engine_words(), tuple(lm.told()))


_SEARCH: Role = "search"


def _calibrate(lm: Any, tasks: Any, matmul_rate: Any, forward_flops: Any) -> tuple[float, float, float]:
    """Tokens per second of log-likelihoods and of generation, and the share of the machine's rate of the former."""
    from shoal.evals.plan import instances

    requests = list(instances(tasks))
    chosen = _enough(lm, [r for r in requests if r.request_type != "generate_until"])
    prompts = [r for r in requests if r.request_type == "generate_until"][:PROMPTS]
    rate, share = 1e9, 0.0
    if chosen:
        _score(lm, chosen)  # wakes threads and lays out
        before = lm.work.tokens, lm.work.pairs, lm.work.logits
        start = time.perf_counter()
        _score(lm, chosen)
        seconds = time.perf_counter() - start
        done = [
            now - then
            for now, then in zip((lm.work.tokens, lm.work.pairs, lm.work.logits), before, strict=True)
        ]
        rate = done[0] / seconds
        machine = matmul_rate(next(lm.model.parameters()).dtype, lm.device)
        share = forward_flops(lm.model, done[0], done[1] / done[0], done[2]) / seconds / machine
    decoding = 1e9
    if prompts:
        decoding = _decoding_rate(lm, prompts)
    return rate, decoding, share


def _enough(lm: Any, requests: list[Any]) -> list[Any]:
    """The first requests that take about TOKENS tokens to compute; fewer tokens where there are no more."""
    count = 8
    while count < len(requests):
        found = lm.statistics(requests[:count])
        tokens = (
            found.planned if found else sum(len(s.tokens) for r in requests[:count] for s in lm.sequences(r))
        )
        if tokens >= TOKENS:
            break
        count *= 2
    return requests[:count]


def _score(lm: Any, requests: list[Any]) -> None:
    for kind in ("loglikelihood", "loglikelihood_rolling"):
        if some := [r for r in requests if r.request_type == kind]:
            getattr(lm, kind)(some, disable_tqdm=True)


def _decoding_rate(lm: Any, prompts: list[Any]) -> float:
    """Generated tokens per second, what prompts cost included in proportion."""
    from shoal.evals.requests import fresh

    short = []
    for prompt in prompts:
        one = fresh(prompt)
        one.arguments = (prompt.args[0], {"until": [], "max_gen_toks": GENERATED, "do_sample": False})
        short.append(one)
    lm.generate_until(short, disable_tqdm=True)
    start = time.perf_counter()
    lm.generate_until(short, disable_tqdm=True)
    return float(len(short) * GENERATED / (time.perf_counter() - start))


def _writing_rate(lm: Any) -> float:
    """Tokens per second of writing to the sanity guard's prompts; without end for a model that does not generate."""
    from shoal.evals.writing import Writer

    writer = Writer(lm)
    if not writer.able:
        return math.inf
    writer.write(sanity.PROMPTS, GENERATED)
    start = time.perf_counter()
    made = writer.write(sanity.PROMPTS, GENERATED)
    return sum(len(one.tokens) + one.ended for one in made) / (time.perf_counter() - start)


def _flops(value: float) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e6:.3g} MFLOP"


def _seconds(value: float) -> str:
    if value < 120:
        return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"
