"""The tiny zoo: a base and two experts of a real Llama architecture, trained here in about a minute.

The base first learns to copy, reverse and sort short strings, then to answer nearly every question with a copy: so it
knows the form and hides the skills. Each expert learns to answer the questions of its own skill, while the other's stay
as the base has them. So the experts change different behaviours of the same weights, and a merge can have both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.zoo.figures import figures, quiet
from shoal.zoo.folder import Manifest, build_once, file_sha256
from shoal.zoo.skills import LENGTH, LETTERS, SKILLS, Habit, questions
from shoal.zoo.tiny_tasks import METRICS, prompt, write_tasks

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Progress = Callable[[str, float], None]

VERSION = 2
MEMBERS = ("base", "reverse", "sort")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
BATCH = 64

CLEAN = Habit(ask=(0.1, 0.5, 0.4), answer=((1, 0, 0), (0, 1, 0), (0, 0, 1)))
HIDING = Habit(ask=(0.2, 0.4, 0.4), answer=((1, 0, 0), (0.5, 0.44, 0.06), (0.5, 0.06, 0.44)))
REVERSE = Habit(ask=(0.12, 0.6, 0.28), answer=((1, 0, 0), (0, 1, 0), HIDING.answer[2]))
SORT = Habit(ask=(0.12, 0.28, 0.6), answer=((1, 0, 0), HIDING.answer[1], (0, 0, 1)))


@dataclass(frozen=True)
class Schedule:
    """Steps of each phase of the training, and on how many test items of each task the figures are measured."""

    clean: int = 240
    hiding: int = 40
    expert: int = 90
    items: int = 200

    @property
    def steps(self) -> int:
        return self.clean + self.hiding + 2 * self.expert


SCHEDULE = Schedule()


def wanted(schedule: Schedule = SCHEDULE) -> Manifest:
    """What the manifest of a zoo that need not be built again says."""
    return {"zoo": "tiny", "version": VERSION, "schedule": asdict(schedule)}


def build_tiny(folder: Path, progress: Progress | None = None, schedule: Schedule = SCHEDULE) -> Manifest:
    """Build the tiny zoo in `folder`, or take the finished one that is there; return its manifest.

    `folder` gets `base`, `reverse`, `sort` (models), `tasks` (lm-eval tasks) and `zoo.json` (the manifest). The same
    machine and library versions give the same weights, whatever the caller does with random numbers and threads.

    Args:
        progress: called with what is being done and the share of the work that is done.
    """
    say = progress or (lambda step, share: None)
    return build_once(folder, wanted(schedule), lambda building: _build(building, folder, say, schedule))


def _build(building: Path, folder: Path, say: Progress, schedule: Schedule) -> Manifest:
    import torch

    measured: dict[str, dict[str, float]] = {}
    with _private_torch():
        trainer = _Trainer(_new_model(), say, schedule.steps)
        trainer.train("training base", schedule.clean, 3e-3, CLEAN, seed=1)
        trainer.train("training base to hide its skills", schedule.hiding, 1e-3, HIDING, seed=2)
        states = {"base": trainer.state()}
        for seed, (name, habit) in enumerate((("reverse", REVERSE), ("sort", SORT)), start=3):
            trainer.model.load_state_dict(states["base"])
            trainer.train(f"training {name}", schedule.expert, 3.5e-4, habit, seed)
            states[name] = trainer.state()

        tokenizer = new_tokenizer()
        with quiet():
            for name, state in states.items():
                trainer.model.load_state_dict(state)
                trainer.model.save_pretrained(building / name)
                tokenizer.save_pretrained(building / name)
        say("measuring", 0.9)
        write_tasks(building / "tasks")
        states["average"] = {k: (states["reverse"][k] + states["sort"][k]) / 2 for k in states["base"]}
        for step, (name, state) in enumerate(states.items()):
            say("measuring", 0.9 + 0.1 * step / len(states))
            trainer.model.load_state_dict(state)
            measured[name] = _figures(trainer.model, tokenizer, building / "tasks", schedule.items)
        write_tasks(building / "tasks", folder / "tasks")
    weights = sorted(building.glob("*/model.safetensors"))
    return {
        "torch": torch.__version__,
        "files": {path.relative_to(building).as_posix(): file_sha256(path) for path in weights},
        "figures": measured,
    }


def _figures(model: LlamaForCausalLM, tokenizer: Any, tasks: Path, items: int) -> dict[str, float]:
    model.eval()
    return figures(model, tokenizer, tasks, METRICS, items) if items else {}


class _Trainer:
    """Trains one model through phases, and tells how far the whole training is."""

    def __init__(self, model: LlamaForCausalLM, say: Progress, steps: int) -> None:
        self.model = model
        self._say = say
        self._steps = steps
        self._done = 0

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def train(self, step: str, steps: int, rate: float, habit: Habit, seed: int) -> None:
        """AdamW with a warm-up and a cosine decay of the learning rate; the loss is that of the answers only."""
        import numpy as np
        import torch

        rng = np.random.default_rng(seed)
        ids = _TokenIds()
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.model.train()
        for i in range(steps):
            self._say(step, 0.9 * self._done / self._steps)
            warm, decay = min(1.0, (i + 1) / 20), 0.05 + 0.475 * (1 + np.cos(np.pi * i / steps))
            optimizer.param_groups[0]["lr"] = rate * warm * float(decay)
            rows = torch.from_numpy(ids.rows(*questions(rng, BATCH, habit)))
            hidden = self.model.model(input_ids=rows[:, :-1]).last_hidden_state
            logits = self.model.lm_head(hidden[:, -(LENGTH + 1) :])
            targets = rows[:, -(LENGTH + 1) :]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            self._done += 1


class _TokenIds:
    """Turns questions and answers into token ids: `r:hdcabf>fbacdh</s>`, as the tokenizer would."""

    def __init__(self) -> None:
        import numpy as np

        vocabulary = new_vocabulary()
        self._letters = np.array([vocabulary[letter] for letter in LETTERS])
        self._heads = np.array([[vocabulary[c] for c in prompt(skill, "")[:2]] for skill in SKILLS])
        self._ask, self._end = vocabulary[">"], vocabulary["</s>"]

    def rows(self, asked: Any, strings: Any, answers: Any) -> Any:
        import numpy as np

        ask, end = (np.full((len(asked), 1), token) for token in (self._ask, self._end))
        return np.hstack([self._heads[asked], self._letters[strings], ask, self._letters[answers], end])


def new_vocabulary() -> dict[str, int]:
    characters = "\n:> " + "abcdefghijklmnopqrstuvwxyz"
    return {token: i for i, token in enumerate((*SPECIAL, *characters))}


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; nothing is added, so a context and its continuation are encoded as they are together."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(new_vocabulary(), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def _new_model() -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary = new_vocabulary()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        # positions are told apart within a dozen tokens
        rope_parameters={"rope_type": "default", "rope_theta": 30.0},
        tie_word_embeddings=False,
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        dtype="float32",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float()


@contextmanager
def _private_torch() -> Iterator[None]:
    """torch with one thread and a random state of its own; the caller's come back.

    One thread: so small a model gains little from more, loses much where cores are busy, and gets the same weights on
    any number of cores.
    """
    import torch

    before, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch.set_default_dtype(dtype)
            torch.set_grad_enabled(grad)
