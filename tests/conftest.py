"""Tiny real models and tasks that every test can afford: random Llamas with a character tokenizer, made in a second."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# before torch is imported, here and in subprocesses: tests run side by side, and tiny models gain nothing from threads
os.environ["OMP_NUM_THREADS"] = "1"

LETTERS = "abcdefgh"

# What takes longest, in the order in which workers take it: with --dist loadfile a file is never split, so one of these
# at the end would keep one worker busy and leave the other idle. The first one trains the tiny zoo; test_quickstart.py,
# which needs it, too, comes so late that nobody waits.
LONGEST = (
    "test_notebooks.py",
    "merge/test_flat.py",
    "test_stages.py",
    "evals/test_equality.py",
    "test_quickstart.py",
    "hub/test_parents.py",
    "hub/test_attacks.py",
    "test_tracking.py",
    "hub/test_reproduce.py",
    "hub/test_publish.py",
    "test_proof.py",
    "test_run.py",
    "test_shipped_recipes.py",
    "test_growth.py",
    "test_score.py",
    "test_page.py",
    "hub/test_upload.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take more than a minute")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist: files with the most tests first
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ:
        here = Path(__file__).parent
        rank = {here / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: rank.get(item.path, len(rank)))
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes more than a minute; run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@dataclass(frozen=True)
class Pico:
    """A folder with models `base`, `left`, `right` (one architecture, other weights) and lm-eval tasks in `tasks`."""

    folder: Path

    @property
    def tasks(self) -> Path:
        return self.folder / "tasks"

    def model(self, name: str) -> Path:
        return self.folder / name

    def recipe(self, **changes: object) -> dict[str, object]:
        """A recipe that runs in seconds; keyword arguments replace top-level keys."""
        return {
            "name": "pico",
            "base_model": str(self.model("base")),
            "models": [str(self.model("left")), str(self.model("right"))],
            "merge": {"method": "task_arithmetic", "dtype": "float32"},
            "space": {"shape": "curve", "coefficients": 2},
            "tasks": [{"task": "pico_choice", "metric": "acc"}, {"task": "pico_next", "metric": "acc"}],
            "evaluation": {"include_path": str(self.tasks), "batch_size": 64},
            "search": {"budget": 12, "popsize": 4, "items": 16, "seed": 1},
            "claim": {"resamples": 1000},
        } | changes


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for what shoal keeps, unless the caller names one: built once for all workers, and not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        if "SHOAL_CACHE" not in os.environ:
            base = tmp_path_factory.getbasetemp()
            shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
            patch.setenv("SHOAL_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    folder = tmp_path_factory.mktemp("pico")
    write_models(folder)
    write_tasks(folder / "tasks")
    return Pico(folder)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """The same with four layers, for what works on blocks of layers."""
    folder = tmp_path_factory.mktemp("deep")
    write_models(folder, layers=4)
    write_tasks(folder / "tasks")
    return Pico(folder)


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny zoo with a third of its items: the same models, and tasks by the same generator, in a cache of its own."""
    from shoal import zoo
    from shoal.zoo.folder import build_once
    from shoal.zoo.tiny_tasks import VERSION, write_tasks

    models = zoo.zoo_folder("tiny")
    cache = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(cache))
        zoo.cache_folder().mkdir()
        (zoo.cache_folder() / "tiny").symlink_to(models)
        tasks = zoo.cache_folder() / "tiny-tasks"

        def build(building: Path) -> dict[str, object]:
            write_tasks(building, tasks, splits={"train": 100, "validation": 300, "test": 300})
            return {}

        build_once(tasks, {"zoo": "tiny tasks", "version": VERSION}, build)
        yield


def write_models(folder: Path, layers: int = 3) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {
        token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *LETTERS, " ", ":", "\n", "="])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,  # of which half is what a finalist writes to each prompt of the sanity guard
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    states = {"base": base.state_dict()}
    for seed, name in enumerate(("left", "right"), start=1):
        generator = torch.Generator().manual_seed(seed)
        states[name] = {
            key: value + 0.1 * torch.randn(value.shape, generator=generator)
            for key, value in states["base"].items()
        }
    for name, state in states.items():
        model = LlamaForCausalLM(config)
        model.load_state_dict(state)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)


def write_tasks(folder: Path) -> None:
    """pico_choice (multiple choice), pico_next (one continuation), pico_write (generation): 120 items a split."""
    folder.mkdir()
    rng = random.Random(0)
    seen: set[str] = set()
    for split in ("train", "validation", "test"):
        rows = []
        while len(rows) < 120:
            word = "".join(rng.choice(LETTERS) for _ in range(5))
            if word in seen:
                continue
            seen.add(word)
            options = [word[::-1], word[1:] + word[0], word[::-1][1:] + word[-1], word]
            gold = rng.randrange(4)
            options[0], options[gold] = options[gold], options[0]
            rows.append({"word": word, "answer": word[0], "options": options, "gold": gold, "kind": word[0]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "validation", "test")}
        },
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "doc_to_text": "{{word}}:",
        "metadata": {"version": 1},
    }
    acc = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    tasks = {
        "pico_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": acc,
        },
        "pico_next": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{answer}}",
            "metric_list": [
                *acc,
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        },
        "pico_write": {
            "output_type": "generate_until",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for name, task in tasks.items():
        # JSON is YAML
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **task}, indent=1))
