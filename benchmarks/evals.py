"""How fast scoring is: against lm-eval's `hf` and against the machine, on the same items, in the same run.

    python benchmarks/evals.py --json FILE [--data DIR] [--model FOLDER] [--cases a,b] [--items N] [--quick]

Both sides get the same ready-made requests; a measurement is one call of the model class on all of them, in a fresh
instance, so that tokenising and planning are in it. The peer is measured in its best dtype and batch size, ours in its
better dtype, both chosen on a few items first; then they run in turns, and the fastest run of each counts. Beside it:

- the same items by both in float32: largest difference of a log-likelihood, flags and texts that differ;
- a later candidate (other weights, nothing else new) through shoal's scorer, and its time outside forward passes;
- tokens per second, counted in tokens that must be computed (a prefix that requests share counts once), over the
  tokens per second of the network's plain forward pass without logits: `of_limit`; and the share of the machine's
  matrix products that this is. Generation is bound by memory, so there `of_limit` is low on any machine.

Without --model, a random model of the 135M shape with a tokenizer made from the tasks' texts stands in.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eval_tasks import CASES, ITEMS, QUICK, Case, texts, write_cases
from lm_eval.models.huggingface import HFLM
from machine import machine
from shapes import configuration

from shoal.evals import abreast
from shoal.evals.catalogue import Catalogue
from shoal.evals.quiet import quiet_libraries
from shoal.evals.requests import PromptSpec, build_requests, fresh
from shoal.evals.resident import ResidentLM
from shoal.evals.scorer import PlannedTask, Scorer

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = 32  # ours: most rows of a batch


def ours(model: Any, tokenizer: Any, rows: int = ROWS, max_tokens: int | None = None) -> Any:
    with quiet_libraries():
        return ResidentLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, max_tokens=max_tokens)


def peer(model: Any, tokenizer: Any, rows: int) -> Any:
    with quiet_libraries():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows)


@dataclass(frozen=True)
class Work:
    """A case's items, ready to be asked."""

    case: Case
    source: Any
    items: dict[int, Any]

    @property
    def kind(self) -> str:
        return str(next(iter(self.items.values())).instances[0].request_type)

    def requests(self, items: int | None = None) -> list[Any]:
        chosen = list(self.items.values())[:items]
        return [fresh(instance) for item in chosen for instance in item.instances]


# ---- models


def load(folder: Path | None, data: Path | None) -> tuple[dict[str, Any], Any, str]:
    """The model in both dtypes, its tokenizer, and what it is."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_libraries():
        if folder is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            models = {
                name: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
                for name, dtype in DTYPES.items()
            }
            about = models["float32"].config.model_type
            return models, tokenizer, f"{about}, {models['float32'].num_parameters():,} parameters"
        tokenizer = made_tokenizer(data)
        config = configuration("135M")
        config.max_position_embeddings = 2048
        config.bos_token_id, config.eos_token_id = 0, 1
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        coarse = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        coarse.load_state_dict(model.state_dict())
    return {"float32": model, "bfloat16": coarse}, tokenizer, "random, the 135M shape, stand-in tokenizer"


def made_tokenizer(data: Path | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts(data), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")


# ---- the machine


def fastest(run: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def product_rates(quick: bool) -> dict[str, float]:
    """FLOP/s of torch.mm per dtype: the best of a few sizes."""
    rates = {}
    for name, dtype in DTYPES.items():
        rates[name] = 0.0
        for size in (512, 1024) if quick else (512, 1024, 2048, 4096):
            one, other = (torch.randn(size, size).to(dtype) for _ in range(2))
            out = torch.empty_like(one)
            torch.mm(one, other, out=out)
            run = functools.partial(torch.mm, one, other, out=out)
            rates[name] = max(rates[name], 2 * size**3 / fastest(run, 3))
    return rates


@torch.inference_mode()
def dense_rates(models: dict[str, Any], quick: bool) -> dict[str, dict[str, float]]:
    """Tokens per second of the plain forward pass without logits, per dtype and shape (rows x tokens)."""
    shapes = ((4, 64), (1, 256)) if quick else ((1, 256), (1, 1024), (4, 256), (8, 128), (16, 128), (32, 32))
    found: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        found[name] = {}
        for rows, width in shapes:
            ids = torch.randint(10, 1000, (rows, width))

            def run(body: Any = model.base_model, ids: Any = ids) -> None:
                body(input_ids=ids, use_cache=False)

            run()
            found[name][f"{rows}x{width}"] = rows * width / fastest(run, 2)
    return found


@torch.inference_mode()
def dense_abreast_rate(model: Any, shape: str) -> float:
    """Tokens per second of plain forward passes of one shape, as many at once as there are threads, a thread each."""
    count = torch.get_num_threads()
    rows, width = map(int, shape.split("x"))

    def run(ids: Any) -> None:
        model.base_model(input_ids=ids, use_cache=False)

    work = [torch.randint(10, 1000, (rows, width)) for _ in range(count)]
    seconds = fastest(lambda: list(abreast.run(run, work, abreast.Trunks(), count)), 3)
    return count * rows * width / seconds


# ---- what there is to compute


def encoded(lm: Any, kind: str, requests: Sequence[Any]) -> list[tuple[int, ...]]:
    """The token rows that a request's answer depends on, as lm-eval cuts them, each once."""
    rows = []
    for request in requests:
        if kind == "generate_until":
            room = lm.max_length - int(request.args[1].get("max_gen_toks", lm.max_gen_toks))
            rows.append(tuple(lm.tok_encode(request.args[0])[-room:]))
            continue
        context, continuation = request.args
        if context:
            before, after = lm._encode_pair(context, continuation)
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
        rows.append(tuple((before + after)[-(lm.max_length + 1) :][:-1]))
    return rows


def distinct(rows: Sequence[tuple[int, ...]]) -> int:
    """Nodes of the tree of these rows: tokens to compute when a shared prefix is computed once."""
    total, before = 0, ()
    for row in sorted(rows):
        shared = next((i for i, (a, b) in enumerate(zip(row, before, strict=False)) if a != b), None)
        total += len(row) - (min(len(row), len(before)) if shared is None else shared)
        before = row
    return total


# ---- measurements


def ask(lm: Any, work: Work, items: int | None = None) -> tuple[float, list[Any]]:
    """Seconds of one call on all requests, and the answers."""
    requests = work.requests(items)
    with quiet_libraries():
        start = time.perf_counter()
        answers = getattr(lm, work.kind)(requests, disable_tqdm=True)
        return time.perf_counter() - start, list(answers)


def choose(
    make: Callable[[str, int], Any], work: Work, dtypes: Sequence[str], batches: Sequence[int], items: int
) -> tuple[str, int, dict[str, float]]:
    """The fastest dtype and batch size on the first few items, and all seconds measured."""
    found = {(dtype, rows): ask(make(dtype, rows), work, items)[0] for dtype in dtypes for rows in batches}
    best = min(found, key=lambda key: found[key])
    return *best, {f"{dtype} x{rows}": seconds for (dtype, rows), seconds in found.items()}


@contextlib.contextmanager
def forward_clock(model: Any) -> Iterator[list[float]]:
    """Within this block the list's sum is the time spent in the network: any of its modules that is called first.

    The model, its body, the body's children down to single layers, and the head are watched, so that whoever calls
    only parts of the network is measured too.
    """
    seconds: list[float] = []
    depth = 0

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                depth -= 1
                if depth == 0:
                    seconds.append(time.perf_counter() - start)

        return run

    modules = list(dict.fromkeys(module for module in model.modules() if callable(module.forward)))
    for module in modules:
        module.forward = watched(module.forward)
    try:
        yield seconds
    finally:
        for module in modules:
            del module.forward


def later_candidate(lm: Any, work: Work, times: int) -> Row:
    """Seconds of a candidate after the first through the scorer, and how many of them are outside the network."""
    key = (work.case.task, "search")
    scorer = Scorer(lm, {key: PlannedTask(work.source, work.items)})  # type: ignore[dict-item]
    items = {key: list(work.items)}
    scorer.score(items)  # type: ignore[arg-type]
    found = []
    norm = next(p for p in reversed(list(lm.model.parameters())) if p.dim() == 1)
    before = norm.detach().clone()

    def change() -> None:
        """Other weights: nothing of the last candidate's numbers may be used."""
        with torch.no_grad():
            norm.mul_(1.01)
        lm.forget()

    for _ in range(times):
        change()
        start = time.perf_counter()
        scorer.score(items)  # type: ignore[arg-type]
        found.append(time.perf_counter() - start)
    # what is outside is measured with passes one after the other: beside another pass it would hide behind it
    alone = ours(lm.model, lm.tokenizer, max_tokens=abreast.PASS)
    scorer = Scorer(alone, {key: PlannedTask(work.source, work.items)})  # type: ignore[dict-item]
    scorer.score(items)  # type: ignore[arg-type]
    change()
    alone.forget()
    with forward_clock(lm.model) as inside:
        start = time.perf_counter()
        scorer.score(items)  # type: ignore[arg-type]
        watched = time.perf_counter() - start
    with torch.no_grad():
        norm.copy_(before)
    return {
        "candidate_s": min(found),
        "candidate_outside_forward_s": watched - sum(inside),
        "candidate_outside_forward_share": (watched - sum(inside)) / min(found),
        "candidate_one_by_one_s": watched,
    }


def compared(kind: str, found: Sequence[Any], expected: Sequence[Any]) -> Row:
    """How the answers of two sides differ."""
    if kind == "generate_until":
        return {
            "texts": len(expected),
            "texts_that_differ": sum(a != b for a, b in zip(found, expected, strict=True)),
        }
    differences = [abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True)]
    allowed = [max(1e-4, 1e-6 * abs(b[0])) for b in expected]
    return {
        "largest_difference": max(differences),
        "beyond_tolerance": sum(d > a for d, a in zip(differences, allowed, strict=True)),
        "greedy_flips": sum(bool(a[1]) != bool(b[1]) for a, b in zip(found, expected, strict=True)),
    }


def distances_to_truth(
    work: Work, model: Any, tokenizer: Any, found: Sequence[Any], expected: Sequence[Any]
) -> Row:
    """Where the two differ most: how far each is from the same weights in float64 arithmetic, by `hf`, one by one."""
    order = sorted(range(len(found)), key=lambda i: -abs(found[i][0] - expected[i][0]))[:8]
    requests = work.requests()
    exact = peer(copy.deepcopy(model).double(), tokenizer, 1)
    with quiet_libraries():
        truth = exact.loglikelihood([requests[i] for i in order], disable_tqdm=True)
    return {
        "of_the_worst": len(order),
        "ours_to_float64": max(abs(found[i][0] - t[0]) for i, t in zip(order, truth, strict=True)),
        "peer_to_float64": max(abs(expected[i][0] - t[0]) for i, t in zip(order, truth, strict=True)),
    }


def measure(work: Work, models: dict[str, Any], tokenizer: Any, limits: Row, quick: bool) -> Row:
    def make_ours(dtype: str, rows: int) -> Any:
        return ours(models[dtype], tokenizer, rows)

    def make_peer(dtype: str, rows: int) -> Any:
        return peer(models[dtype], tokenizer, rows)

    kind, count = work.kind, len(work.items)
    sample = min(count, {"a": 2, "b": 12, "c": 48, "d": 8, "e": 4}[work.case.key])
    batches = (1, 8) if quick else (1, 8, 32)
    if kind == "generate_until":
        batches = tuple(size for size in batches if size <= max(8, count))
    their_dtype, their_rows, tried = choose(make_peer, work, list(DTYPES), batches, sample)
    my_dtype, _, mine_tried = choose(make_ours, work, list(DTYPES), (ROWS,), sample)

    mine, theirs = [], []
    answers: dict[str, dict[str, list[Any]]] = {"ours": {}, "peer": {}}
    for _ in range(1 if quick else 2):  # in turns: whatever else the machine does meets both
        lm = make_ours(my_dtype, ROWS)
        seconds, answers["ours"][my_dtype] = ask(lm, work)
        mine.append(seconds)
        seconds, answers["peer"][their_dtype] = ask(make_peer(their_dtype, their_rows), work)
        theirs.append(seconds)
    # what our own plan says; None where it scores in plain batches
    planned_by_us = lm.statistics(work.requests()) if kind != "generate_until" else None
    for side, make, rows in (("ours", make_ours, ROWS), ("peer", make_peer, their_rows)):
        if "float32" not in answers[side]:
            _, answers[side]["float32"] = ask(make("float32", rows), work)
    equality = compared(kind, answers["ours"]["float32"], answers["peer"]["float32"])
    if equality.get("beyond_tolerance"):
        pair = answers["ours"]["float32"], answers["peer"]["float32"]
        equality |= distances_to_truth(work, models["float32"], tokenizer, *pair)
    later = later_candidate(make_ours(my_dtype, ROWS), work, 1 if quick else 2)

    rows_ = encoded(make_peer("float32", 1), kind, work.requests())
    written = 0
    if kind == "generate_until":
        written = sum(len(tokenizer.encode(text)) for text in answers["ours"][my_dtype])
    planned = distinct(rows_) + written
    rate = planned / min(mine)
    body = models["float32"].base_model
    embedding = models["float32"].get_input_embeddings().weight.numel()
    flops = 2 * (sum(p.numel() for p in body.parameters()) - embedding)
    return {
        "case": f"{work.case.key}: {work.case.title}",
        "ours_s": min(mine),
        "peer": f"lm-eval hf, {their_dtype}, batch {their_rows}",
        "peer_s": min(theirs),
        "ratio": min(theirs) / min(mine),
        "of_limit": rate / limits["dense_tokens_s"],
        "questions": work.case.source,
        "items": count,
        "requests": len(rows_),
        "prompt_tokens_mean": sum(map(len, rows_)) / len(rows_),
        "tokens_of_all_requests": sum(map(len, rows_)) + written,
        "tokens_to_compute": planned,
        "tokens_s": rate,
        "of_matrix_products": rate * flops / limits["matrix_product_flop_s"][my_dtype],
        "ours_dtype": my_dtype,
        "ours_runs_s": mine,
        "peer_runs_s": theirs,
        "ours_tried_s": mine_tried,
        "peer_tried_s": tried,
        **later,
        "peer_over_candidate": min(theirs) / later["candidate_s"],
        "candidate_of_limit": planned / later["candidate_s"] / limits["dense_tokens_s"],
        "candidate_of_limit_abreast": planned / later["candidate_s"] / limits["dense_abreast_tokens_s"],
        "float32": equality,
        "engine": lm.engine_words(),
        "plan": None if planned_by_us is None else dataclasses.asdict(planned_by_us),
    }


def show(row: Row) -> None:
    print(
        f"{row['case']:52} {row['ours_s']:.2f} s ({row['ours_dtype']}), {row['of_limit']:.0%} of the dense forward;"
        f" {row['peer']} {row['peer_s']:.2f} s, ratio {row['ratio']:.1f};"
        f" a later candidate {row['candidate_s']:.2f} s, {row['candidate_outside_forward_share']:.1%} outside forward;"
        f" float32: {row['float32']}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    data = os.environ.get("SHOAL_DATA")
    parser.add_argument(
        "--data", type=Path, default=Path(data) if data else None, help="public question sets"
    )
    parser.add_argument("--model", type=Path, default=None, help="a model folder, e.g. the zoo's SmolLM2")
    parser.add_argument("--cases", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--items", type=int, default=None, help="items per case")
    parser.add_argument("--quick", action="store_true", help="few items, one run: whether it works at all")
    arguments = parser.parse_args()
    chosen = arguments.cases.split(",")
    if unknown := [key for key in chosen if key not in CASES]:
        parser.error(f"no case {unknown[0]!r}; valid: {', '.join(CASES)}")
    counts = dict(QUICK if arguments.quick else ITEMS)
    if arguments.items is not None:
        counts = dict.fromkeys(counts, arguments.items)
    about = machine()
    models, tokenizer, what = load(arguments.model, arguments.data)
    started = time.perf_counter()
    products, dense = product_rates(arguments.quick), dense_rates(models, arguments.quick)
    rates = {(name, shape): rate for name, shapes in dense.items() for shape, rate in shapes.items()}
    best = max(rates, key=lambda key: rates[key])
    limits: Row = {
        "matrix_product_flop_s": products,
        "dense_abreast_tokens_s": dense_abreast_rate(models[best[0]], best[1]),
        "dense_forward_tokens_s": dense,
        "dense_tokens_s": rates[best],
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as scratch:
        folder = Path(scratch)
        cases = write_cases(folder, arguments.data, "".join(chosen), counts)
        catalogue = Catalogue(folder)
        for case in cases:
            source = catalogue.load(case.task)
            items = build_requests(source, source.eval_split, range(case.items), PromptSpec())
            rows.append(measure(Work(case, source, items), models, tokenizer, limits, arguments.quick))
            show(rows[-1])
            result = {  # after every case: a run that is cut off has not been for nothing
                "machine": about,
                "model": what,
                "data": "public question sets" if arguments.data is not None else "all questions generated",
                "limits": limits,
                "seconds": time.perf_counter() - started,
                "rows": rows,
            }
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
