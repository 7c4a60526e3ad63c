"""The same numbers as stock lm-eval `hf`, item by item and metric by metric, for every kind of request.

The models are tiny and random, with weights large enough that the context decides what comes next. Greedy decoding
and greedy flags are comparable between two implementations only where the best token leads by more than rounding:
`lead` measures that on the model itself, and the tests assert it.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from shoal.evals.quiet import quiet_libraries
from shoal.evals.resident import ResidentLM

WINDOW = 240  # tokens of context of every model; the few long items, and long documents, are longer
SLIDING = 12  # tokens of a sliding window: shorter than any prompt
LEAD = 5e-4  # in logits; rounding moves a logit by less than 2e-5
ROWS = 6  # rows per batch of both sides: items of unequal length meet in one batch

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<model>", "<system>"]
THINGS = [
    "tree",
    "stone",
    "river",
    "cloud",
    "lamp",
    "bird",
    "boat",
    "door",
    "field",
    "glass",
    "horse",
    "island",
]
TRAITS = ["red", "old", "small", "quiet", "bright", "cold", "round", "heavy"]
VERBS = ["sees", "finds", "holds", "follows", "likes"]
REST = ["the", "a", "and", "near", "is", "what", "it", "who", "answer", "in", "one", "word"]
LETTERS = ["A", "B", "C", "D", "Q"]
CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'user': '<user>', 'assistant': '<model>', 'system': '<system>'}[m.role] }}{{ m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)

FAMILIES: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "llama": {"num_key_value_heads": 2},
        "qwen2": {"num_key_value_heads": 2},
        "gemma2": {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": SLIDING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 20.0,
        },
        "gpt2": {"n_positions": WINDOW},
        "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
        "qwen3_moe": {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
        },
        "gemma3_text": {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        "mistral": {"num_key_value_heads": 2, "sliding_window": SLIDING},
        "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gpt_neox": {},
        "phi3": {"num_key_value_heads": 2},
        "olmo2": {"num_key_value_heads": 2},
    }
)
FULL = ("llama", "qwen2", "gemma2", "gpt2")  # also metrics; the others: log-likelihoods and texts
WITH_BOS = ("llama", "gemma2", "gemma3_text", "mistral")  # the tokenizer writes <bos> before every prompt


def vocabulary() -> list[str]:
    words = [*THINGS, *TRAITS, *VERBS, *REST, *LETTERS]
    signs = [" ", ":", ".", "?", "?!", ",", "\n", *"0123456789"]
    return [*SPECIAL, *words, *(f" {word}" for word in words), *signs]


@cache
def tokenizer(bos: bool) -> Any:
    """Words with the space before them, as BPE tokenizers have it; decoding gives back the text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[a-z]+| ?[A-Z]|\?!|."), behavior="isolated")
    core.decoder = decoders.Fuse()
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = CHAT
    return fast


@cache
def network(family: str, seed: int = 1) -> Any:
    """A random model of a family in float32, eager enough to disagree with its neighbours: weights of scale 0.3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
        "vocab_size": len(vocabulary()),
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    with quiet_libraries():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(size | FAMILIES[family])))
    model.generation_config.eos_token_id = 2
    return model.float().eval()


def ours(model: Any, tokenizer: Any, rows: int = ROWS, **options: Any) -> Any:
    # not `auto`, which may fall back to plain batches
    return ResidentLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, engine="tree", **options)


def pair(family: str, model: Any = None, **options: Any) -> tuple[Any, Any]:
    """Ours and stock lm-eval on one model object."""
    model, words = model or network(family), tokenizer(family in WITH_BOS)
    with quiet_libraries():
        return (
            ours(model, words, **options),
            HFLM(pretrained=model, tokenizer=words, batch_size=ROWS, **options),
        )


def requests(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, argument, 0, ("direct", i, 1)) for i, argument in enumerate(arguments)]  # type: ignore[arg-type]


def run(lm: Any, kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    with quiet_libraries():
        return list(getattr(lm, kind)(requests(kind, arguments), disable_tqdm=True))


def tolerance(value: float) -> float:
    return max(1e-4, 1e-6 * abs(value))


def assert_same_logliks(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(found) == len(expected)
    for i, ((value, greedy), (wanted, flag)) in enumerate(zip(found, expected, strict=True)):
        assert value == pytest.approx(wanted, rel=0, abs=tolerance(wanted)), f"request {i}"
        assert bool(greedy) == bool(flag), f"request {i}"


# ---- how far the best token leads, measured without either of the two


@torch.inference_mode()
def all_logits(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits at every position of each row, [tokens, vocabulary]; what pads a row comes after it, so it is not seen."""
    found = []
    for start in range(0, len(rows), 16):
        batch = rows[start : start + 16]
        width = max(len(row) for row in batch)
        logits = model(torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])).logits
        found += [logits[i, : len(row)] for i, row in enumerate(batch)]
    return found


def flag_lead(lm: Any, arguments: Sequence[tuple[str, str]]) -> float:
    """The least distance, over all target tokens, of a target's logit to the best other one."""
    rows, targets = [], []
    for context, continuation in sorted(set(arguments), key=lambda pair: len(pair[0])):
        if context:
            before, after = lm._encode_pair(context, continuation)
        else:
            before, after = [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
        rows.append((before + after)[-(lm.max_length + 1) :][:-1])
        targets.append(torch.tensor(after).unsqueeze(1))
    least = math.inf
    for logits, target in zip(all_logits(lm.model, rows), targets, strict=True):
        logits = logits[-len(target) :]
        others = logits.scatter(1, target, -math.inf).max(dim=1).values
        least = min(least, float((logits.gather(1, target).squeeze(1) - others).abs().min()))
    return least


def text_lead(lm: Any, prompts: Sequence[str], tokens: int) -> float:
    """The least lead of the best over the second-best token while each prompt is continued greedily."""
    rows = [lm.tok_encode(prompt)[-(lm.max_length - tokens) :] for prompt in prompts]
    least = math.inf
    for _ in range(tokens):
        for row, logits in zip(rows, all_logits(lm.model, rows), strict=True):
            best = logits[-1].topk(2)
            least = min(least, float(best.values[0] - best.values[1]))
            row.append(int(best.indices[0]))
        rows = [row for row in rows if row[-1] != lm.eot_token_id]
    return least


# ---- requests made by hand


def sentence(rng: random.Random) -> str:
    return (
        f"the {rng.choice(TRAITS)} {rng.choice(THINGS)} {rng.choice(VERBS)} a {rng.choice(TRAITS)}"
        f" {rng.choice(THINGS)}."
    )


def passage(rng: random.Random, sentences: int) -> str:
    return " ".join(sentence(rng) for _ in range(sentences))


def phrase(rng: random.Random, words: int) -> str:
    return " ".join([*rng.choices(TRAITS, k=words - 1), rng.choice(THINGS)])


def questions() -> list[tuple[str, str]]:
    """Contexts that several continuations share, of every length, and the seams that tokenizers are split at."""
    rng = random.Random(1)
    made = []
    for sentences in (1, 1, 2, 3, 5, 8, 20, 40):  # the last two exceed the context
        context = passage(rng, sentences) + " what is it?"
        made += [(context, f" {phrase(rng, words)}") for words in (1, 1, 2, 3, 4)]
    made += [("", "the red tree sees a bird."), ("", " it is"), ("", "a")]
    made += [("the bird is ", "old"), ("the bird is\n", "red and cold"), ("the bird is  ", "small")]
    made += [("who is it?", "! the horse"), ("the bird", "s red"), ("<bos>the boat is", " red boat")]
    made += made[:3]  # the same request twice
    shuffled = made[:]
    rng.shuffle(shuffled)
    return shuffled


@pytest.mark.parametrize("family", FAMILIES)
def test_loglikelihoods_and_greedy_flags(family: str) -> None:
    lm, stock = pair(family)
    asked = questions()
    # continuations that the model itself would write, so that some flags are true
    written = run(stock, "generate_until", [(c, {"until": [], "max_gen_toks": 3}) for c, _ in asked[:16]])
    for (context, _), text in zip(asked[:16], written, strict=True):
        if context and text and stock._encode_pair(context, text)[1]:
            asked.append((context, text))
    assert flag_lead(stock, asked) > LEAD
    expected = run(stock, "loglikelihood", asked)
    assert {flag for _, flag in expected} == {False, True}
    assert_same_logliks(run(lm, "loglikelihood", asked), expected)
    assert_same_logliks(run(lm, "loglikelihood", asked), expected)  # whatever it remembers of the first time


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_loglikelihoods(family: str) -> None:
    lm, stock = pair(family)
    rng = random.Random(2)
    documents = [(passage(rng, sentences),) for sentences in (1, 3, 26, 30, 60, 100, 2)]
    assert len(stock.tok_encode(documents[5][0])) > 3 * WINDOW
    expected = run(stock, "loglikelihood_rolling", documents)
    found = run(lm, "loglikelihood_rolling", documents)
    for value, wanted in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, rel=0, abs=tolerance(wanted))


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_texts(family: str) -> None:
    lm, stock = pair(family)
    rng = random.Random(3)
    prompts = [passage(rng, sentences) + " what" for sentences in (1, 1, 1, 2, 3, 6, 20, 40)]
    prompts.append(prompts[0])
    assert text_lead(stock, prompts, 12) > LEAD
    free = run(stock, "generate_until", [(p, {"until": [], "max_gen_toks": 12}) for p in prompts])
    assert run(lm, "generate_until", [(p, {"until": [], "max_gen_toks": 12}) for p in prompts]) == free
    long = [(i, text) for i, text in enumerate(free) if len(text) > 12]
    assert len(long) > len(free) // 2
    asked: list[tuple[Any, ...]] = []
    for i, text in long:
        middle = text[len(text) // 2 :]
        asked += [
            (prompts[i], {"until": [text[:3]], "max_gen_toks": 12}),  # at once
            (
                prompts[i],
                {"until": ["who is who", middle[:5], "\n\n"], "max_gen_toks": 12, "do_sample": False},
            ),
            (prompts[i], {"until": "who is who", "max_gen_toks": 1 + i % 4}),
            (prompts[i], {"until": ["<eos>", "\n"], "max_gen_toks": 5, "temperature": 0.0}),
        ]
    expected = run(stock, "generate_until", asked)
    assert expected[::4] == [""] * len(long)
    assert any(0 < len(text) < len(free[i]) for (i, _), text in zip(long, expected[1::4], strict=True))
    assert run(lm, "generate_until", asked) == expected
    # a prompt that brings its own <bos>, in a call of its own: hf asks only the first prompt of a batch whether it does
    alone = [("<bos>the bird is", {"until": ["."], "max_gen_toks": 6})]
    assert run(lm, "generate_until", alone) == run(stock, "generate_until", alone)


def test_generation_keeps_to_hf_on_arguments_of_its_own() -> None:
    """`max_length` counts the prompt; a model that is told to begin with <bos> gets it; all through one batch."""
    for options in ({"add_bos_token": True}, {"max_length": 60}, {"prefix_token_id": 5}):
        lm, stock = pair("qwen2", **options)
        rng = random.Random(4)
        prompts = [passage(rng, sentences) for sentences in (1, 2, 12)]
        assert text_lead(stock, prompts, 8) > LEAD or "add_bos_token" in options
        asked = [(prompt, {"until": ["\n"], "max_gen_toks": 8}) for prompt in prompts]
        assert run(lm, "generate_until", asked) == run(stock, "generate_until", asked)
        pairs = [(prompt, " it is") for prompt in prompts] + [("", "the bird")]
        assert_same_logliks(run(lm, "loglikelihood", pairs), run(stock, "loglikelihood", pairs))


# ---- lm-eval's own evaluation, with tasks of every output type


def metric(name: str, aggregation: str = "mean", better: bool = True) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": better}


TASKS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "same_phrases": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{passage}} what is it?",
            "doc_to_choice": "{{phrases}}",
            "doc_to_target": "gold",
            "metric_list": [
                metric("acc"),
                metric("acc_norm"),
                metric("acc_mutual_info"),
                metric("brier_score", "brier_score", False),
                metric("exact_match"),
                metric("mcc", "matthews_corrcoef"),
            ],
        },
        "same_letters": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}\nA: {{phrases[0]}}\nB: {{phrases[1]}}\nC: {{phrases[2]}}\nanswer:",
            "doc_to_choice": ["A", "B", "C"],
            "doc_to_target": "{{gold % 3}}",
            "metric_list": [metric("acc"), metric("acc_norm")],
        },
        # the options are contexts, which share one continuation: winogrande's form
        "same_blanks": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{gold % 2}}",
            "doc_to_choice": "{{[question + ' ' + phrases[0], question + ' ' + phrases[1]]}}",
            "doc_to_target": "{{ending}}",
            "metric_list": [metric("acc")],
        },
        "same_next": {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}\nanswer: ",
            "doc_to_target": "{{phrases[gold]}}",
            "target_delimiter": "",
            "metric_list": [metric("acc"), metric("perplexity", "perplexity", False)],
        },
        "same_rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{document}}",
            "num_fewshot": 0,
            "metric_list": [
                metric("word_perplexity", "weighted_perplexity", False),
                metric("byte_perplexity", "weighted_perplexity", False),
                metric("bits_per_byte", "bits_per_byte", False),
            ],
        },
        "same_writing": {
            "output_type": "generate_until",
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_target": "{{phrases[gold]}}",
            "generation_kwargs": {
                "until": ["\n", "?!", " the old", "Q:"],
                "max_gen_toks": 10,
                "do_sample": False,
            },
            "filter_list": [
                {
                    "name": "strict",
                    "filter": [
                        {"function": "regex", "regex_pattern": "([a-z]+)"},
                        {"function": "take_first"},
                    ],
                },
                {"name": "raw", "filter": [{"function": "take_first"}]},
            ],
            "metric_list": [metric("exact_match"), metric("chrf", "chrf")],
        },
    }
)
# what is a smooth function of log-likelihoods is as close as those are
SMOOTH = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score")


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """lm-eval's tasks above, over local files: 12 items, two of them longer than the context."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("same")
    rng = random.Random(8)
    files = {}
    for split, count in (("train", 8), ("test", 12)):
        rows = []
        for i in range(count):
            phrases: list[str] = []
            while len(phrases) < 4:
                made = phrase(rng, rng.randint(2, 4))
                phrases += [made] if made not in phrases else []
            long = split == "test" and i % 6 == 3
            rows.append(
                {
                    "passage": passage(rng, 30 if long else 1),
                    "question": sentence(rng) + " what is it?",
                    "phrases": phrases,
                    "ending": f"is {rng.choice(TRAITS)}.",
                    "gold": rng.randrange(4),
                    "document": passage(rng, 50 if long else rng.randint(1, 6)),
                }
            )
        files[split] = folder / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
            "training_split": "train",
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    with quiet_libraries():
        return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def loaded(manager: Any) -> Any:
    with quiet_libraries():
        return manager.load(list(TASKS))


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """lm-eval bootstraps in a pool of processes unless it is told not to."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    yield


def evaluated(lm: Any, loaded: Any, shots: int, **prompts: Any) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate

    for name, task in loaded["tasks"].items():
        task.set_config(key="num_fewshot", value=0 if name == "same_rolling" else shots)
        task.set_fewshot_seed(seed=1234)
    with quiet_libraries():
        results = evaluate(lm, loaded, bootstrap_iters=20, **prompts)
    assert results is not None
    return dict(results)


def assert_same_results(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every response, every metric of every item, every aggregate and its standard error."""
    assert found["samples"].keys() == expected["samples"].keys() == found["results"].keys()
    for name, samples in expected["samples"].items():
        loosest = 1e-4
        for mine, theirs in zip(found["samples"][name], samples, strict=True):
            where = f"{name}, item {theirs['doc_id']}, filter {theirs['filter']}"
            assert mine["arguments"] == theirs["arguments"], where
            for (answer,), (wanted,) in zip(mine["resps"], theirs["resps"], strict=True):
                if isinstance(wanted, str):
                    assert answer == wanted, where
                elif isinstance(wanted, tuple):
                    assert_same_logliks([answer], [wanted])
                    loosest = max(loosest, tolerance(wanted[0]))
                else:
                    assert answer == pytest.approx(wanted, rel=0, abs=tolerance(wanted)), where
                    loosest = max(loosest, tolerance(wanted))
            for key in theirs["metrics"]:
                if key not in SMOOTH:  # of those, the responses are the metric
                    assert mine[key] == theirs[key], f"{where}, {key}"
        close = math.expm1(4 * loosest)
        for key, wanted in expected["results"][name].items():
            if not isinstance(wanted, float):
                assert found["results"][name][key] == wanted, f"{name}, {key}"
                continue
            base = key.partition(",")[0].removesuffix("_stderr")
            size = abs(expected["results"][name][key.replace("_stderr", "")])
            allowed = close * max(1.0, size) if base in SMOOTH else 1e-6 * abs(wanted)
            value = found["results"][name][key]
            assert value == pytest.approx(wanted, rel=0, abs=allowed), f"{name}, {key}"


def assert_comparable(lm: Any, results: dict[str, Any]) -> None:
    """Greedy texts and flags, and the choice between options, are decided by more than rounding."""
    for name, samples in results["samples"].items():
        if name == "same_writing":
            assert text_lead(lm, [s["arguments"][0][0] for s in samples], 10) > LEAD
            continue
        if name == "same_rolling":
            continue
        assert flag_lead(lm, [args for s in samples for args in s["arguments"]]) > LEAD / 10
        if name == "same_next":
            continue
        for sample in samples:
            values = [response[0][0] for response in sample["resps"]]
            half = values[: len(values) // 2] if name == "same_phrases" else values
            lists = [half]
            if name == "same_phrases":
                lists.append([v / len(p) for v, p in zip(half, sample["doc"]["phrases"], strict=True)])
                lists.append([a - b for a, b in zip(half, values[len(half) :], strict=True)])
            for options in lists:
                first, second = sorted(options)[:-3:-1]
                assert first - second > 2e-4


SETTINGS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "0-shot": {"shots": 0},
        "5-shot": {"shots": 5},
        "5-shot system": {"shots": 5, "system_instruction": "answer in one word."},
        "0-shot chat": {"shots": 0, "apply_chat_template": True},
        "5-shot chat": {"shots": 5, "apply_chat_template": True},
        "5-shot chat turns system": {
            "shots": 5,
            "apply_chat_template": True,
            "fewshot_as_multiturn": True,
            "system_instruction": "answer in one word.",
        },
    }
)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", FULL)
def test_an_evaluation_gives_the_same_metrics(family: str, setting: str, loaded: Any) -> None:
    lm, stock = pair(family)
    expected = evaluated(stock, loaded, **SETTINGS[setting])
    assert_comparable(stock, expected)
    assert_same_results(evaluated(lm, loaded, **SETTINGS[setting]), expected)


def test_simple_evaluate_takes_ours_as_a_model(manager: Any) -> None:
    from lm_eval import simple_evaluate

    results = []
    for lm in pair("llama"):
        with quiet_libraries():
            found = simple_evaluate(
                lm,
                tasks=list(TASKS),
                num_fewshot=2,
                limit=6,
                bootstrap_iters=20,
                fewshot_as_multiturn=False,
                task_manager=manager,
            )
        assert found is not None
        results.append(dict(found))
    assert_same_results(*results)


# ---- other precisions, other sizes


def test_bfloat16_is_no_farther_from_the_truth_than_stock() -> None:
    """Truth: the same bfloat16 weights in float32 arithmetic."""
    import copy

    coarse = copy.deepcopy(network("llama")).to(torch.bfloat16)
    truth = copy.deepcopy(coarse).float()
    asked = [(c, t) for c, t in questions() if c]
    _, reference = pair("llama", truth)
    lm, stock = pair("llama", coarse)
    wanted = [value for value, _ in run(reference, "loglikelihood", asked)]

    def error(model: Any) -> float:
        found = [value for value, _ in run(model, "loglikelihood", asked)]
        return sum(abs(a - b) for a, b in zip(found, wanted, strict=True)) / len(wanted)

    theirs = error(stock)
    assert theirs > 1e-3  # coarse arithmetic it is
    assert error(lm) <= 1.05 * theirs


@pytest.mark.slow
def test_smollm2_scores_as_in_stock_lm_eval() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoal.zoo import cache_folder
    from shoal.zoo.folder import read_manifest

    folder = cache_folder() / "smollm2"
    if read_manifest(folder) is None:
        pytest.skip(
            "the zoo smollm2 is not in the cache that SHOAL_CACHE names; build it with: shoal zoo smollm2"
        )
    with quiet_libraries():
        words = AutoTokenizer.from_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        lm, stock = ours(model, words), HFLM(pretrained=model, tokenizer=words, batch_size=ROWS)
    shots = "".join(
        f"Question: What is {a} plus {b}?\nAnswer: {a + b}\n\n" for a, b in ((3, 9), (20, 14), (51, 27))
    )
    asked = []
    for a, b in ((7, 12), (33, 41), (80, 5), (19, 26)):
        prompt = f"{shots}Question: What is {a} plus {b}?\nAnswer:"
        asked += [(prompt, f" {a + b + shift}") for shift in (0, 1, 10)]
    asked += [
        ("", "Who have those men revealed they helped?"),
        ("", "Who have those men revealed who helped?"),
    ]
    asked += [
        ("The capital of France is", f" {city}, not Rome.") for city in ("Paris", "Antananarivo", "a city")
    ]
    assert flag_lead(stock, asked) > 1e-3
    assert_same_logliks(run(lm, "loglikelihood", asked), run(stock, "loglikelihood", asked))
    documents = [(passage(random.Random(6), 12),)]
    (value,), (wanted,) = (run(each, "loglikelihood_rolling", documents) for each in (lm, stock))
    assert value == pytest.approx(wanted, rel=0, abs=tolerance(wanted))
    prompts = [prompt for prompt, _ in asked[:12:3]] + ["The capital of France is"]
    assert text_lead(stock, prompts, 12) > 1e-3
    writing = [(prompt, {"until": ["\n\n", "Question:"], "max_gen_toks": 12}) for prompt in prompts]
    assert run(lm, "generate_until", writing) == run(stock, "generate_until", writing)
