"""Estimates of memory against measured peaks, and batches that are halved under a real limit."""

from __future__ import annotations

import mmap
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from shoal.errors import EvaluationError
from shoal.evals.limits import MemoryLimit, forward_bytes, out_of_memory, run_halving, tokens_that_fit

linux = pytest.mark.skipif(sys.platform != "linux", reason="measures and limits memory as Linux does")

MODEL = """
import resource, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from shoal.evals.limits import forward_bytes, run_halving

def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def forward(rows, width, keep):
    ids = torch.ones(rows, width, dtype=torch.long)
    with torch.inference_mode():
        logits = model(ids, logits_to_keep=keep, use_cache=False).logits
        return torch.log_softmax(logits.float(), dim=-1)

torch.manual_seed(0)
vocabulary, hidden, inner, attention, dtype = {model}
config = LlamaConfig(
    vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=3,
    num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, attn_implementation=attention,
)
model = LlamaForCausalLM(config).to(dtype).eval()
forward(1, 4, 1)
"""

MEASURE = """
rows, width, keep = {batch}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts again from what is used now
before = status("VmHWM")
forward(rows, width, keep)
print(status("VmHWM") - before)
print(forward_bytes(config, dtype, rows * width, rows * keep, width if attention == "eager" else 0))
"""

HALVE = """
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (160 << 20),) * 2)
tried = []
budget = 16384

def run():
    tried.append(budget)
    return budget, forward(1, budget, 1).shape

def shrink():
    global budget
    if budget // 2 < {least}:
        return 0
    budget //= 2
    return budget

print(*run_halving(run, shrink, print))
print("tried", *tried)
"""


def run_apart(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ("1000, 384, 1024, 'sdpa', torch.float32", "8, 512, 8"),  # the MLP rules
        ("1000, 384, 1024, 'eager', torch.bfloat16", "8, 512, 8"),  # scores
        ("20000, 256, 512, 'sdpa', torch.float32", "8, 256, 128"),  # logits
    ],
)
def test_an_estimate_is_within_a_factor_of_two_of_the_peak(model: str, batch: str) -> None:
    measured, estimate = map(int, run_apart(MODEL.format(model=model) + MEASURE.format(batch=batch)))
    assert measured > 50 << 20
    assert measured / 2 < estimate < measured * 2


def config(**changes: int) -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "vocab_size": 1000,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            **changes,
        }
    )


def test_what_fits_is_the_most_that_the_estimate_allows() -> None:
    for share in (0.0, 0.1, 1.0):
        for limit in (100_000, 10_000_000, 1_000_000_000):
            fit = tokens_that_fit(config(), torch.float32, limit, share)
            needs = [
                forward_bytes(config(), torch.float32, n, max(1, -int(-n * share // 1)))
                for n in (max(1, fit), fit + 1)
            ]
            assert (needs[0] <= limit) == bool(fit)
            assert needs[1] > limit
    assert tokens_that_fit(config(), torch.float32, 1000, 0.5) == 0


def test_estimates_grow_with_everything() -> None:
    def need(tokens: int = 512, targets: int = 8, scores: int = 0, **changes: int) -> int:
        return forward_bytes(config(**changes), torch.float32, tokens, targets, scores)

    assert need(1024) > need() < need(targets=512)
    assert need() < need(scores=512) and need() < need(intermediate_size=1 << 16)
    assert need(targets=512) < need(targets=512, vocab_size=5000)
    assert forward_bytes(config(), torch.bfloat16, 512, 1) < forward_bytes(config(), torch.float32, 512, 1)


def test_configs_of_other_models_have_their_own_words() -> None:
    from transformers import GPT2Config, Qwen3MoeConfig

    for other in (GPT2Config(), GPT2Config(n_inner=1024), Qwen3MoeConfig()):
        assert forward_bytes(other, torch.float32, 512, 8) > 0
    wide = Qwen3MoeConfig(num_experts_per_tok=8, moe_intermediate_size=8192)
    assert forward_bytes(wide, torch.float32, 512, 8) > forward_bytes(Qwen3MoeConfig(), torch.float32, 512, 8)


def test_no_limit_and_a_limit_that_is_passed_already() -> None:
    assert MemoryLimit().left() is None
    assert MemoryLimit().tokens(config(), torch.float32, 1.0, most=4096) == 4096
    assert MemoryLimit(1 << 20).left() == 0
    with pytest.raises(
        EvaluationError, match=r"memory limit of 1.0 MiB: 0.0 MiB are left beside the models, and a"
    ):
        MemoryLimit(1 << 20).tokens(config(), torch.float32, 1.0, most=4096)


def test_a_limit_counts_what_the_process_has_taken() -> None:
    limit = MemoryLimit(1 << 40)
    before = limit.left()
    # not from the heap, which may have that much to spare
    taken = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    taken.write(b"x" * len(taken))
    after = limit.left()
    assert before is not None and after is not None
    assert before - after == pytest.approx(len(taken), rel=0.1)
    assert limit.tokens(config(), torch.float32, 1.0, most=4096) == 4096


@linux
def test_batches_are_halved_until_they_fit_under_a_real_limit() -> None:
    model = MODEL.format(model="1000, 256, 2048, 'sdpa', torch.float32")
    *told, fit, tried = run_apart(model + HALVE.format(least=32))
    sizes = [int(word) for word in tried.split()[1:]]
    assert 2 <= len(sizes) <= 8 and sizes == [16384 >> n for n in range(len(sizes))]
    assert told == [f"out of memory: batch halved to {size}" for size in sizes[1:]]
    assert fit == f"{sizes[-1]} torch.Size([1, 1, 1000])"


@linux
def test_a_least_batch_that_does_not_fit_is_an_error_in_one_line() -> None:
    model = MODEL.format(model="1000, 256, 2048, 'sdpa', torch.float32")
    code = model + "from shoal.errors import EvaluationError\ntry:\n"
    code += "".join(f"    {line}\n" for line in HALVE.format(least=8000).splitlines())
    code += "except EvaluationError as error:\n    print(error)\n"
    assert run_apart(code) == [
        "out of memory: batch halved to 8192",
        "out of memory at the smallest batch; free memory, or use a smaller dtype",
    ]


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, memory: bool) -> None:
    assert out_of_memory(error) is memory


def test_other_errors_are_not_tried_again() -> None:
    tried = []

    def run() -> None:
        tried.append(1)
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_halving(run, lambda: 1, lambda text: None)
    assert tried == [1]


def test_tensors_of_a_failed_batch_are_gone_before_the_next() -> None:
    import weakref

    alive: list[Callable[[], object]] = []
    sizes = iter([20, 10])
    tokens = 40

    def run() -> int:
        assert all(reference() is None for reference in alive)
        held = torch.ones(tokens)
        alive.append(weakref.ref(held))
        if tokens > 10:
            raise MemoryError
        return tokens

    def shrink() -> int:
        nonlocal tokens
        tokens = next(sizes)
        return tokens

    assert run_halving(run, shrink, lambda text: None) == 10
    assert len(alive) == 3
