"""The weight update protocol: its order, its errors, and a scorer in another process that takes weights by it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from shoal.errors import EvaluationError
from shoal.evals.updates import ModuleWeights, WeightSink, push
from shoal.merge import Checkpoint, Merger, load_runtime, tensor_groups
from shoal.tokenizer import load_tokenizer
from shoal.types import MergePlan, OutputGroup, Source

SERVER = Path(__file__).with_name("scoring_process.py")
REQUESTS = [
    (f"{word}:", end) for word in ("abcde", "abcdf", "hgfed", "hgfaa") for end in ("a", "edcba", "h=")
]


def prefix_lm(model: Any, folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("scoring_process", SERVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PrefixLM(model, load_tokenizer(folder))


class Process:
    """The sink on this side of the pipe."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER), str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.sent: list[int] = []

    def close(self) -> None:
        self._process.communicate()

    def begin_update(self) -> None:
        self._call("begin_update")

    def update(self, chunk: Sequence[tuple[str, Tensor]]) -> None:
        self.sent.append(sum(tensor.nbytes for _, tensor in chunk))
        self._call("update", safetensors.torch.save(dict(chunk)))

    def finish_update(self) -> None:
        self._call("finish_update")

    def abort_update(self) -> None:
        self._call("abort_update")

    def score(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        return [(ll, greedy) for ll, greedy in self._call("score", requests=requests)]

    def _call(self, call: str, payload: bytes = b"", **words: Any) -> Any:
        write, read = self._process.stdin, self._process.stdout
        assert write is not None and read is not None
        write.write(json.dumps({"call": call, "bytes": len(payload), **words}).encode() + b"\n" + payload)
        write.flush()
        answer = json.loads(read.readline())
        if "error" in answer:
            raise EvaluationError(answer["error"])
        return answer["answer"]


@pytest.fixture(scope="module")
def process(pico: Any) -> Iterator[Process]:
    started = Process(pico.model("base"))
    yield started
    started.close()


def merger(pico: Any, model: Any = None) -> Merger:
    parents = [Checkpoint.open(pico.model(name)) for name in ("base", "left", "right")]
    return Merger(parents, tensor_groups(parents[0]), model)


def plan(merging: Merger, left: float, right: float) -> MergePlan:
    groups = tuple(
        OutputGroup(
            name,
            "task_arithmetic",
            (Source(1, name, {"weight": left}), Source(2, name, {"weight": right})),
            group.tensors,
        )
        for name, group in merging.groups.items()
    )
    return MergePlan(("base", "left", "right"), 0, groups, "float32", 0)


def test_another_process_scores_every_candidate_to_the_same_bits(pico: Any, process: Process) -> None:
    with pytest.raises(EvaluationError, match="not scored: the model has no weights yet"):
        process.score(REQUESTS)
    merging = merger(pico)
    found, expected = [], []
    for weights in ((0.9, 0.1), (0.2, 0.8)):
        candidate = plan(merging, *weights)
        push(merging.tensors(candidate), process, chunk_bytes=10_000)
        found.append(process.score(REQUESTS))
        # a fresh model and a fresh cache for every candidate: nothing here can be the one before
        model = load_runtime(pico.model("base"))
        merger(pico, model).materialize(candidate, canonical=True)
        lm = prefix_lm(model, pico.model("base"))
        expected.append(lm.score(REQUESTS))
        assert 0 < len(lm.prefixes) < len(REQUESTS)
    assert found == expected
    assert all(one[0] != other[0] for one, other in zip(*found, strict=True))
    assert len(process.sent) > 4 and max(process.sent) <= 10_000


def test_scores_of_the_process_are_those_of_stock_lm_eval(pico: Any, process: Process) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from shoal.evals.quiet import quiet_libraries

    model = load_runtime(pico.model("left"))
    push(model.state_dict().items(), process)
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=r, idx=0) for r in REQUESTS]
    with quiet_libraries():
        lm = HFLM(pretrained=model, tokenizer=load_tokenizer(pico.model("left")), batch_size=4)
        expected = lm.loglikelihood(requests, disable_tqdm=True)
    found = process.score(REQUESTS)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in expected], abs=1e-4)


def test_a_sink_that_keeps_its_prefixes_would_be_noticed(pico: Any) -> None:
    left, right = (load_runtime(pico.model(name)).state_dict() for name in ("left", "right"))
    lm = prefix_lm(load_runtime(pico.model("base")), pico.model("base"))

    def scores(on_finish: Any) -> Any:
        sink = ModuleWeights(lm.model, on_finish)
        push(left.items(), sink)
        lm.score(REQUESTS)
        push(right.items(), sink)
        return lm.score(REQUESTS)

    assert scores(lambda: None) != scores(lm.prefixes.clear)


def test_an_iterator_that_breaks_leaves_a_sink_that_does_not_score(pico: Any, process: Process) -> None:
    state = load_runtime(pico.model("left")).state_dict()

    def breaking() -> Iterator[tuple[str, Tensor]]:
        yield from list(state.items())[:3]
        raise OSError("the disk is gone")

    push(state.items(), process)
    expected = process.score(REQUESTS)
    with pytest.raises(OSError, match="the disk is gone"):
        push(breaking(), process, chunk_bytes=1)
    with pytest.raises(EvaluationError, match=r"not scored: the last weight update was aborted; a complete"):
        process.score(REQUESTS)
    push(state.items(), process)
    assert process.score(REQUESTS) == expected


def sink_of(model: Any) -> tuple[ModuleWeights, list[int]]:
    finished: list[int] = []
    return ModuleWeights(model, lambda: finished.append(1)), finished


def test_misuse_is_one_clear_error(pico: Any) -> None:
    model = load_runtime(pico.model("base"))
    state = {name: tensor.clone() for name, tensor in load_runtime(pico.model("left")).state_dict().items()}
    norm = state["model.norm.weight"]
    sink, finished = sink_of(model)
    sink.require_complete()
    for call in (lambda: sink.update([("model.norm.weight", norm)]), sink.finish_update):
        with pytest.raises(EvaluationError, match=r"weight update: \w+ without begin_update"):
            call()
    sink.require_complete()  # nothing was touched

    misuses = [
        (
            [("model.norms.weight", norm)],
            "unknown tensor 'model.norms.weight'; did you mean 'model.norm.weight'",
        ),
        ([("model.norm.weight", norm[:5])], r"'model.norm.weight': expected shape \(32,\), found \(5,\)"),
        ([("model.norm.weight", norm)] * 2, "'model.norm.weight' came twice"),
    ]
    for chunk, words in misuses:
        sink.begin_update()
        with pytest.raises(EvaluationError, match="not scored: a weight update is under way"):
            sink.require_complete()
        with pytest.raises(EvaluationError, match=words):
            sink.update(chunk)
        with pytest.raises(EvaluationError, match="not scored: the last weight update was aborted"):
            sink.require_complete()

    sink.begin_update()
    sink.update(list(state.items())[:-2])
    with pytest.raises(EvaluationError, match=r"2 tensors did not come, first 'model.norm.weight'"):
        sink.finish_update()
    sink.begin_update()
    with pytest.raises(EvaluationError, match="begin_update while another update is under way, now aborted"):
        sink.begin_update()
    assert finished == []
    push(state.items(), sink)
    sink.require_complete()
    assert finished == [1]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_caches_that_cannot_be_dropped_leave_the_update_aborted(pico: Any) -> None:
    def stuck() -> None:
        raise RuntimeError("no")

    model = load_runtime(pico.model("base"))
    sink = ModuleWeights(model, stuck)
    with pytest.raises(RuntimeError, match="no"):
        push([(name, tensor.clone()) for name, tensor in model.state_dict().items()], sink)
    with pytest.raises(EvaluationError, match="the last weight update was aborted"):
        sink.require_complete()


@pytest.fixture
def tied() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
    )


def test_of_tied_weights_one_is_enough_and_both_must_agree(tied: Any) -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in tied.state_dict().items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    sink, _ = sink_of(tied)
    push(state.items(), sink)
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):
        push([(name, tensor) for name, tensor in state.items() if name != left_out], sink)
        assert torch.equal(tied.lm_head.weight, state["lm_head.weight"])
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(EvaluationError, match=r"are one tensor in the model, but came with other values"):
        push(state.items(), sink)


def test_weights_are_rounded_to_the_modules_dtype(tied: Any) -> None:
    state = {name: torch.randn_like(tensor) for name, tensor in tied.state_dict().items()}
    del state["lm_head.weight"]
    tied.to(torch.bfloat16)
    push(state.items(), sink_of(tied)[0])
    assert all(torch.equal(tied.state_dict()[name], tensor.bfloat16()) for name, tensor in state.items())


def test_names_of_a_checkpoint_may_be_other_than_the_modules(tied: Any) -> None:
    """Fused experts: several checkpoint tensors are parts of one parameter."""
    layer = tied.model.layers[0].mlp.up_proj
    targets = {"first": layer.weight[:3], "second": layer.weight[3:]}
    sink: WeightSink = ModuleWeights(tied, lambda: None, targets)
    push([("first", torch.ones(3, 8)), ("second", torch.full((5, 8), 2.0))], sink)
    assert layer.weight[:, 0].tolist() == [1.0] * 3 + [2.0] * 5
    with pytest.raises(EvaluationError, match="1 tensors did not come, first 'second'"):
        push([("first", torch.ones(3, 8))], sink)
