"""The output layer writes into kept memory and gives the same numbers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from shoal.evals.head import Head


class Body(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 50, bias=bias)

    def get_output_embeddings(self) -> nn.Module:
        return self.layer


@torch.inference_mode()
def test_same_numbers_in_the_same_memory() -> None:
    model = Body()
    head = Head(model)
    hidden = torch.randn(1, 7, 16)
    expected = model.layer(hidden)
    with head.ready(), head.kept():
        found = model.layer(hidden)
        assert found.equal(expected)
        address = found.data_ptr()
        fewer = model.layer(hidden[:, 2:5])
        assert fewer.shape == (1, 3, 50)
        assert fewer.data_ptr() == address
        torch.testing.assert_close(fewer, expected[:, 2:5])
        more = model.layer(hidden.expand(3, 7, 16))
        torch.testing.assert_close(more, expected.expand(3, 7, 50))
        again = more.data_ptr()
    with head.ready(), head.kept():
        assert model.layer(hidden).data_ptr() == again
    with head.ready():  # outside of a pass
        assert model.layer(hidden).data_ptr() != again
    assert "forward" not in model.layer.__dict__
    head.drop()


@torch.inference_mode()
def test_two_threads_write_into_memories_of_their_own() -> None:
    model = Body()
    head = Head(model)
    hidden = [torch.full((1, 3, 16), float(number)) for number in range(2)]
    meet = threading.Barrier(2)

    @torch.inference_mode()
    def one(number: int) -> torch.Tensor:
        with head.kept():
            found = model.layer(hidden[number])
            meet.wait(10)  # both have written
            return found.clone()

    with head.ready(), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(one, range(2)))
    for number in range(2):
        torch.testing.assert_close(found[number], hidden[number] @ model.layer.weight.t())


@torch.inference_mode()
def test_other_weights_are_used_at_once() -> None:
    model = Body()
    head = Head(model)
    hidden = torch.randn(2, 16)
    with head.ready(), head.kept():
        model.layer(hidden)
    model.layer.weight.mul_(2)
    with head.ready(), head.kept():
        torch.testing.assert_close(model.layer(hidden), hidden @ model.layer.weight.t())


@torch.inference_mode()
def test_other_layers_keep_their_own_forward() -> None:
    model = Body(bias=True)
    hidden = torch.randn(2, 16)
    with Head(model).ready():
        assert "forward" not in model.layer.__dict__
        torch.testing.assert_close(model.layer(hidden), hidden @ model.layer.weight.t() + model.layer.bias)


@torch.inference_mode()
def test_a_forward_that_was_put_there_comes_back() -> None:
    model = Body()
    own = model.layer.forward
    model.layer.forward = lambda hidden: own(hidden)  # type: ignore[method-assign]
    put = model.layer.forward
    with Head(model).ready():
        model.layer(torch.randn(2, 16))
    assert model.layer.forward is put
