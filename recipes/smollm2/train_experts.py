"""Train the LoRA experts of this folder: SmolLM2-135M-Instruct learns one kind of arithmetic each.

    shoal zoo smollm2 DIR --source gguf
    python recipes/smollm2/train_experts.py DIR addition recipes/smollm2/adapters \
        --exclude two_digit_addition.jsonl

The items are generated: a question of the GPT-3 arithmetic form, written as lm-eval's `arithmetic_*` tasks write it
(`Question: What is 98 plus 45?\\nAnswer: 143`), for pairs of numbers from 0 to 99, zero-shot. The loss is that of the
answer, with the end-of-text token behind it. `--exclude FILE.jsonl` names evaluation items (`context`, `completion`);
their pairs of numbers are never trained on (the committed adapters: all 2,000 items of the skill's own evaluation set
are excluded). Runs with the same arguments, machine and library versions give the same adapter.

The adapter is written in peft's format, with `shoal_base.json`: the hash of the base's weights, so that shoal refuses to
put it on other weights (the Hub's and the GGUF file's differ).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
SKILLS = {"addition": "plus", "subtraction": "minus", "multiplication": "times"}
Pair = tuple[int, int]


def solve(skill: str, pair: Pair) -> int:
    a, b = pair
    return {"addition": a + b, "subtraction": a - b, "multiplication": a * b}[skill]


def excluded_pairs(files: Iterable[Path]) -> set[Pair]:
    """The pairs of numbers that occur in evaluation files."""
    pairs: set[Pair] = set()
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            numbers = re.findall(r"\d+", json.loads(line)["context"])
            if len(numbers) != 2:
                raise SystemExit(
                    f"{file}: expected two numbers in each question, found {len(numbers)}: {line}"
                )
            pairs.add((int(numbers[0]), int(numbers[1])))
    return pairs


def training_pairs(excluded: set[Pair], rng: np.random.Generator) -> Iterator[Pair]:
    """All pairs that are not excluded, in random order, again and again."""
    pairs = [(a, b) for a in range(100) for b in range(100) if (a, b) not in excluded]
    while True:
        for i in rng.permutation(len(pairs)):
            yield pairs[i]


def encode(tokenizer: Any, skill: str, pair: Pair) -> tuple[list[int], list[int]]:
    """Token ids of question and answer."""
    question = f"Question: What is {pair[0]} {SKILLS[skill]} {pair[1]}?\nAnswer:"
    answer = f" {solve(skill, pair)}"
    return tokenizer.encode(question), [*tokenizer.encode(answer), tokenizer.eos_token_id]


def train(arguments: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from shoal.zoo.smollm2 import weights_sha256

    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    base = arguments.zoo / "base"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=layers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=REPO,
    )
    peft_model = get_peft_model(model, config)
    weights = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.0)
    excluded = excluded_pairs(arguments.exclude)
    pairs = training_pairs(excluded, np.random.default_rng(arguments.seed))
    print(
        f"{arguments.skill}: {10_000 - len(excluded)} pairs to train on, {len(excluded)} excluded", flush=True
    )

    model.train()
    start, losses = time.monotonic(), []
    for step in range(arguments.steps):
        rows = [encode(tokenizer, arguments.skill, next(pairs)) for _ in range(arguments.batch)]
        width = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        scored = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, (question, answer) in enumerate(rows):
            ids[i, : len(question) + len(answer)] = torch.tensor([*question, *answer])
            scored[i, len(question) : len(question) + len(answer)] = True
        # padding is on the right, so causal attention never sees it; logits only where an answer token is scored
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
            logits = model.lm_head(hidden[scored[:, 1:]])
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][scored[:, 1:]])
        warm, decay = min(1.0, (step + 1) / 20), 0.5 * (1 + np.cos(np.pi * step / arguments.steps))
        optimizer.param_groups[0]["lr"] = arguments.rate * warm * float(decay)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0:
            mean, seconds = float(np.mean(losses[-20:])), time.monotonic() - start
            print(f"step {step + 1}/{arguments.steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)

    out = arguments.out / arguments.skill
    peft_model.to(torch.bfloat16)
    peft_model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    manifest = json.loads((arguments.zoo / "zoo.json").read_text(encoding="utf-8"))
    note = {"weights_sha256": weights_sha256(base), "source": manifest["source"]}
    (out / "shoal_base.json").write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
    saved = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    saved["base_model_name_or_path"] = REPO
    saved["target_modules"] = sorted(saved["target_modules"])
    (out / "adapter_config.json").write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("zoo", type=Path, help="folder made by `shoal zoo smollm2`")
    parser.add_argument("skill", choices=sorted(SKILLS))
    parser.add_argument("out", type=Path, help="folder for adapters; the skill's name is appended")
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="FILE.jsonl")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
