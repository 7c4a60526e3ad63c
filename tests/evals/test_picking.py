"""Log-probabilities and greedy flags of chosen tokens are those of a log-softmax and an argmax over all of them."""

from __future__ import annotations

import pytest
import torch

from shoal.evals import picking
from shoal.evals.picking import picked


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ties", [False, True])
def test_as_over_all_of_them(dtype: torch.dtype, ties: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picking, "CHUNK", 7 * 50)  # 7 rows of 50 at once; 23 rows
    torch.manual_seed(0)
    logits = torch.randn(23, 50) * 3
    if ties:
        logits = logits.round()
    logits = logits.to(dtype)
    index = torch.randint(0, 23, (80,))  # in any order, some rows by nobody
    token = torch.randint(0, 50, (80,))
    likeliest = logits.argmax(dim=-1)  # on a CPU the first of equal ones, see below
    token[::2] = likeliest[index[::2]]
    values, best = picked(logits, index, token)
    expected = torch.log_softmax(logits.float(), dim=-1)[index, token]
    torch.testing.assert_close(values, expected, rtol=0, atol=0)
    assert best.tolist() == (likeliest[index] == token).tolist()
    assert best.any() and not best.all()


def test_of_equal_logits_the_first_token_is_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 1.0, 3.0], [0.0, 0.0, 1.0]])
    assert logits.argmax(dim=-1).tolist() == [1, 0, 2]
    index = torch.arange(3).repeat_interleave(3)
    _, best = picked(logits, index, torch.arange(3).repeat(3))
    assert best.view(3, 3).tolist() == [[False, True, False], [True, False, False], [False, False, True]]


def test_a_row_that_is_not_finite_stays_so() -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, 2.0]])
    values, best = picked(logits, torch.tensor([0, 1]), torch.tensor([2, 2]))
    assert values.isnan().tolist() == [True, False]
    assert best.tolist() == [False, True]


def test_nothing_is_asked_for() -> None:
    none = torch.zeros(0, dtype=torch.long)
    values, best = picked(torch.zeros(0, 5), none, none)
    assert len(values) == len(best) == 0
