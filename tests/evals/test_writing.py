"""Texts to prompts: greedy, the same by either way of generating, in the recipe's form, ended by the model or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from shoal.errors import EvaluationError
from shoal.evals.resident import ResidentLM
from shoal.evals.writing import Writer

PROMPTS = ["abc:", "hgfedcba", "a", "a b c d", "The old bakery on the corner opened before sunrise, and"]
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a="


def resident(
    folder: Any, engine: str = "auto", template: str | None = None, ends: Sequence[int] = ()
) -> ResidentLM:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config.eos_token_id = [2, *ends]
    return ResidentLM(model, tokenizer, 16, engine=engine)


@pytest.mark.parametrize("name", ["base", "left", "right"])
def test_both_ways_of_generating_write_the_same(pico: Any, name: str) -> None:
    ours = Writer(resident(pico.model(name))).write(PROMPTS, 24)
    assert ours == Writer(resident(pico.model(name), "plain")).write(PROMPTS, 24)
    assert ours == tuple(Writer(resident(pico.model(name))).write([p], 24)[0] for p in PROMPTS)
    assert all(len(text.tokens) <= 24 for text in ours)
    assert all(text.ended or len(text.tokens) == 24 for text in ours)
    assert all(2 not in text.tokens for text in ours)


def test_an_end_is_the_models_own_only(pico: Any) -> None:
    free = [text.tokens for text in Writer(resident(pico.model("base"))).write(PROMPTS, 24)]
    number, at = next(
        (n, i) for n, text in enumerate(free) for i, t in enumerate(text) if i and t not in text[:i]
    )
    for engine in ("auto", "plain"):
        writer = Writer(resident(pico.model("base"), engine, ends=[free[number][at]]))
        (whole,) = writer.write([PROMPTS[number]], at + 1)
        assert whole.ended and whole.tokens == free[number][:at]
        (cut,) = writer.write([PROMPTS[number]], at)
        assert not cut.ended and cut.tokens == whole.tokens


def test_a_text_gets_half_of_a_short_context(pico: Any) -> None:
    lm = resident(pico.model("base"))
    (text,) = Writer(lm).write(["abc " * 100], 500)
    assert len(text.tokens) == 32  # pico's context is 64 tokens
    assert text == Writer(lm).write([("abc " * 100)[-64:]], 64)[0]
    assert lm.told() == []


def test_prompts_take_the_form_of_the_recipe(pico: Any) -> None:
    lm = resident(pico.model("left"), template=TEMPLATE)
    chat = Writer(lm, chat=True, system="be").write(["abc", "ha"], 16)
    assert chat == Writer(lm).write(["s:be\nu:abc\na=", "s:be\nu:ha\na="], 16)
    assert Writer(lm, chat=True).write(["abc"], 16) == Writer(lm).write(["u:abc\na="], 16)
    assert Writer(lm, system="be").write(["abc"], 16) == Writer(lm).write(["be\n\nabc"], 16)


def test_a_model_that_cannot_generate_says_so(pico: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = resident(pico.model("base"))
    monkeypatch.setattr(type(lm.model), "can_generate", lambda self=None: False)
    writer = Writer(lm)
    assert not writer.able and writer.write([], 16) == ()
    with pytest.raises(EvaluationError, match="LlamaForCausalLM cannot generate"):
        writer.write(["abc"], 16)
