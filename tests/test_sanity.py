"""A finalist that repeats itself, never ends or writes garbage is turned away; one as bad as a parent is not."""

import json
from dataclasses import replace

import pytest

from shoal.errors import EvaluationError
from shoal.sanity import (
    MAX_TOKENS,
    PROMPTS,
    Sanity,
    Written,
    degenerate,
    disqualified,
    is_broken,
    measure,
    read_written,
)
from shoal.sanity import written as written_by
from shoal.types import Generated

TEXT = "The soup is hot and the bread is fresh."


def written(count: int = 16, length: int = 40, ended: int = 16, seed: int = 0) -> list[Generated]:
    """Texts in which no 4-gram comes twice."""
    return [
        Generated(TEXT, tuple(range(seed + i * length, seed + (i + 1) * length)), i < ended)
        for i in range(count)
    ]


FINE = measure(written())


def test_the_prompts_are_sixteen_different_ones() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 16
    assert all(p == p.strip() and p.isascii() for p in PROMPTS)


def test_what_is_measured() -> None:
    texts = [
        Generated("a b", (1, 2), True),
        Generated("a b a b a b", (1, 2, 1, 2, 1, 2), False),  # 4-grams 1212, 2121, 1212
        Generated("", (), True),
        Generated("a b c d", (1, 2, 1, 2), True),  # 1212 again
    ]
    assert measure(texts) == Sanity(texts=4, ended=0.75, distinct=0.5, length=3.0, broken=0.25)
    assert measure([Generated("Seven.", (7,), True)]).distinct == 1.0
    assert FINE == Sanity(16, 1.0, 1.0, 40.0, 0.0)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        (TEXT, False),
        ("日本語も文章です。\n\tはい。", False),
        ("naïve café — “quoted” 🙂", False),
        ("", True),
        ("  \n", True),
        ("!!!!!!!!!!!! ... ,,,", True),
        ("a\ufffdb\ufffdc\ufffd", True),
        ("word \x00\x01\x02 word", True),
        ("private \ue000\ue001\ue002", True),
        ("one slip\ufffd in a text that is long enough to be readable all the same", False),
    ],
)
def test_what_is_no_text(text: str, broken: bool) -> None:
    assert is_broken(Generated(text, (1,), True)) is broken


def test_half_a_character_at_the_cut_is_not_broken() -> None:
    assert is_broken(Generated("caf\ufffd", (1,), True))
    assert not is_broken(Generated("caf\ufffd", (1,), False))


def test_a_model_that_writes_as_its_parents_do_is_fine() -> None:
    assert degenerate(FINE, [FINE, FINE]) is None
    assert degenerate(measure(written(ended=12, seed=7)), [FINE]) is None  # at the margin, not beyond


def test_a_model_that_repeats_itself() -> None:
    looping = measure([Generated("go on and on", (5, 6, 7) * 13 + (5,), True) for _ in range(16)])
    reason = degenerate(looping, [FINE, replace(FINE, distinct=0.6)])
    assert reason == "repeats itself: 0.01 of its 4-grams are distinct, of the parents' 0.60 to 1.00"
    assert degenerate(looping, [FINE, looping]) is None


def test_one_answer_to_every_prompt_is_repetition_too() -> None:
    same = measure([Generated(TEXT, tuple(range(40)), True)] * 16)
    assert "repeats itself" in str(degenerate(same, [FINE]))


def test_a_model_that_never_ends() -> None:
    endless = measure(written(length=MAX_TOKENS, ended=0))
    assert degenerate(endless, [FINE]) == "ends 0 of 16 texts, parents 16"
    assert degenerate(endless, [FINE, replace(FINE, ended=3 / 16)]) == "ends 0 of 16 texts, parents 3 to 16"
    assert degenerate(endless, [FINE, replace(FINE, ended=1 / 16)]) is None
    assert degenerate(measure(written(ended=11)), [FINE]) == "ends 11 of 16 texts, parents 16"


def test_a_model_that_writes_next_to_nothing_or_without_end() -> None:
    assert degenerate(measure(written(length=9)), [FINE]) == "writes 9 tokens a text, parents 40 to 40"
    assert degenerate(measure(written(length=10)), [FINE]) is None
    assert "writes 161 tokens" in str(degenerate(measure(written(length=161)), [FINE]))
    assert degenerate(measure(written(length=161)), [FINE, replace(FINE, length=60.0)]) is None


def test_parents_that_write_nothing_are_no_measure_of_length_and_repetition() -> None:
    silent = measure([Generated("", (), True)] * 16)
    looping = Generated("go go go", (5,) * 400, True)
    assert degenerate(measure([looping, *[Generated("", (), True)] * 15]), [silent]) is None
    assert "repeats itself" in str(degenerate(measure([looping] * 16), [silent, FINE]))
    assert "writes 400 tokens" in str(degenerate(measure([looping] * 16), [silent]))


def test_what_was_written_comes_back_from_json() -> None:
    ours = [
        written_by("mean@3", written(ended=9)),
        Written("best@3", (), (), None, "no memory"),
    ]
    events = json.loads(json.dumps([one.event() for one in ours]))
    assert read_written(events) == {one.candidate: one for one in ours}
    assert events[0]["texts"]["15"] == TEXT


def test_who_is_turned_away_and_why() -> None:
    fine, endless = written_by("left", written()), written_by("mean@3", written(ended=0))
    mute = Written("best@3", (), (), None, "no memory")
    assert disqualified([endless, mute, replace(fine, candidate="uniform merge")], [fine]) == {
        "mean@3": "ends 0 of 16 texts, parents 16",
        "best@3": "could not write: no memory",
    }
    with pytest.raises(EvaluationError, match="best@3 wrote nothing to compare with: no memory"):
        disqualified([endless], [fine, mute])


def test_a_model_that_writes_garbage() -> None:
    def garbled(count: int) -> Sanity:
        texts = written()
        return measure([replace(g, text="\ufffd\ufffd x") if i < count else g for i, g in enumerate(texts)])

    assert degenerate(garbled(1), [FINE]) is None
    assert degenerate(garbled(2), [FINE]) == "2 of 16 texts are broken, parents 0"
    assert degenerate(garbled(2), [FINE, garbled(1)]) is None
    assert degenerate(garbled(3), [FINE, garbled(1)]) == "3 of 16 texts are broken, parents 0 to 1"
    assert degenerate(garbled(8), [FINE, garbled(6)]) is None
    assert degenerate(garbled(9), [FINE, garbled(6)]) == "9 of 16 texts are broken, parents 0 to 6"


def test_all_reasons_are_given() -> None:
    bad = measure([Generated("\ufffd" * 9, (3,) * MAX_TOKENS, False)] * 16)
    reason = str(degenerate(bad, [FINE]))
    assert all(part in reason for part in ("ends 0 of 16", "repeats itself", "16 of 16 texts are broken"))
    assert "\n" not in reason


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="found none"):
        measure([])
    with pytest.raises(EvaluationError, match=r"expected parents with 16 texts each, found \[\]"):
        degenerate(FINE, [])
    with pytest.raises(EvaluationError, match=r"found \[8\]"):
        degenerate(FINE, [measure(written(count=8))])
