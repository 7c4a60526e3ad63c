"""lm-eval's `hf` model class, made for a model that stays in memory while its weights change.

Takes what `hf` takes and gives the same numbers (tests compare them). Requests are tokenised once and remembered,
shared tokens are computed once over a token tree, logits are computed at target positions only, the log-softmax is
taken in float32, and generation batches continuously. Where a model's attention does not allow that, rows are padded
and batched plainly, which is decided by a comparison on sequences of the run and said in `notes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval import utils
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from shoal.errors import EvaluationError
from shoal.evals import abreast
from shoal.evals.attention import Unsupported
from shoal.evals.engine import (
    Engine,
    PlainEngine,
    TreeEngine,
    Work,
    accepts_tree,
    compare,
    default_budget,
    excerpt,
)
from shoal.evals.generation import Generator, Request, Sampling
from shoal.evals.limits import MemoryLimit, run_halving
from shoal.evals.tree import Scored, Statistics
from shoal.evals.updates import ModuleWeights

T = TypeVar("T")
Encoded = tuple[list[int], list[int]]
ROWS = 64
# generation arguments that are ours; with any other one, transformers' own generate is used
_OURS = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
# what a model's generation_config may set without changing a token here
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "sequence_bias": (None,),
    "guidance_scale": (None, 1.0),
}


class ResidentLM(HFLM):  # type: ignore[misc]
    """As HFLM, with its arguments. pretrained: a name, a folder, or a model object.

    batch_size: rows of a plain batch, and sequences that generate at once; `auto` means 64. max_tokens: tokens that are
    computed at once over a token tree (None: 1280 on a CPU, 2048 in each pass where passes are computed abreast, 16384
    on a GPU). engine: `auto`, `tree` or `plain`.
    memory_limit: bytes that this process may use on a CPU; passes over the tree are made small enough from the start.
    Any batch is halved when memory runs out all the same.
    """

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        batch_size: int | str | None = None,
        max_tokens: int | None = None,
        engine: str = "auto",
        memory_limit: int | None = None,
        **kwargs: Any,
    ) -> None:
        rows = ROWS if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=rows, **kwargs)
        if engine not in ("auto", "tree", "plain"):
            raise EvaluationError(f"engine: expected auto, tree or plain, found {engine!r}")
        self.notes: list[str] = []
        self._pairs: dict[tuple[str, str], Encoded] = {}
        self._scored: dict[tuple[str, str], Scored] = {}
        self._texts: dict[tuple[str, str], list[int]] = {}
        self._windows: dict[str, tuple[Scored, ...]] = {}
        self._prompts: dict[tuple[str, int], tuple[int, ...]] = {}
        self._cut: set[Any] = set()  # requests that were longer than the context, until that is said
        self.work = Work()
        self._plain = PlainEngine(self.model, rows, self.work) if self.backend == "causal" else None
        self._tree: TreeEngine | None = None
        if engine != "plain" and self._plain is not None and accepts_tree(self.model):
            passes = abreast.useful(self.model)
            tokens = max_tokens or default_budget(self.device, passes)
            if self.device.type == "cpu":
                # every token may be a target, and logits are normalised in pieces
                limit, dtype = MemoryLimit(memory_limit), next(self.model.parameters()).dtype
                tokens = limit.tokens(self.model.config, dtype, 1.0, tokens, logit_bytes=dtype.itemsize)
            self._tree = TreeEngine(self.model, tokens, self.work, passes)
        elif engine == "tree":
            raise EvaluationError("engine: tree needs a causal model whose forward takes logits_to_keep")
        self._checked = engine == "tree" or self._tree is None
        ends = [self.eot_token_id, *_listed(getattr(self.model.generation_config, "eos_token_id", None))]
        self.ends = frozenset(e for e in ends if e is not None)  # a text ends after one of these
        self._generator = (
            Generator(
                self.model,
                sorted(self.ends),
                rows,
                min(self._tree.budget, default_budget(self.device)),
                self.work,
            )
            if self._tree is not None
            else None
        )
        self._generates = engine == "tree"

    # --- what a run asks --------------------------------------------------------------------------------------

    def engine_words(self) -> str:
        """How log-likelihoods are computed, for people."""
        engine = self._engine()
        return "lm-eval's own" if engine is None else engine.words()

    def shrink(self) -> int:
        """Halve the batches of everything; what is left of the scoring engine's, 0 when it cannot be smaller."""
        if self._generator is not None:
            self._generator.shrink()
        if self.batch_size_per_gpu > 1:
            self.batch_size_per_gpu //= 2
        engine = self._engine()
        return 0 if engine is None else engine.shrink()

    def settle(self, requests: Sequence[Any]) -> None:
        """Decide how these log-likelihood requests are scored, with the weights of the moment."""
        self._check([s for request in requests for s in self.sequences(request)])

    def told(self) -> list[str]:
        """What there is to say about how requests are scored, and was not said before."""
        said, self.notes = self.notes, []
        if self._cut:
            said.append(
                f"{len(self._cut)} requests are longer than the context of {self.max_length} tokens and lose their"
                " beginning, as in lm-eval"
            )
            self._cut = set()
        return said

    def statistics(self, requests: Sequence[Any]) -> Statistics | None:
        """What the log-likelihoods among `requests` cost over a token tree; None in plain batches."""
        sequences = [s for request in requests for s in self.sequences(request)]
        self._check(sequences)
        return self._tree.plan(sequences) if self._tree is not None else None

    def sequences(self, request: Any) -> tuple[Scored, ...]:
        """What is scored for a log-likelihood request; nothing for generation."""
        if request.request_type == "loglikelihood":
            return (self._scored_pair(*request.args[:2]),)
        if request.request_type == "loglikelihood_rolling":
            return self._rolled(request.args[0])
        return ()

    def forget(self) -> None:
        """Drop everything that was computed with weights that have changed; plans stay."""
        if self._tree is not None:
            self._tree.forget()

    def weights(self) -> ModuleWeights:
        """Where new weights go, in chunks (see `updates`); what was computed with the old ones is dropped."""
        return ModuleWeights(self.model, self.forget)

    # --- tokens -----------------------------------------------------------------------------------------------

    def encode(self, context: str, continuation: str) -> Encoded:
        """Token ids of context and continuation exactly as lm-eval splits them, remembered."""
        key = (context, continuation)
        if key not in self._pairs:
            if context == "":
                tokens = self.tok_encode(continuation, add_special_tokens=False)
                start = self.prefix_token_id
                self._pairs[key] = ([start], tokens) if tokens[0] != start else (tokens[:1], tokens[1:])
            else:
                self._pairs[key] = self._encode_pair(context, continuation)
        return self._pairs[key]

    def tokens_of(self, kind: str, first: str, second: str) -> Encoded:
        """Token ids of a request's texts: of a `pair`, of a `rolling` text, or of a `prompt` (not cut)."""
        if kind == "pair":
            return self.encode(first, second)
        if kind == "rolling":
            return self._rolling_tokens(first), []
        return self._prompt_tokens(first), []

    def remember(self, kind: str, first: str, second: str, tokens: Encoded) -> None:
        """Token ids from a saved plan, so that nothing is tokenised again."""
        if kind == "pair":
            self._pairs[first, second] = tokens
        else:
            self._texts[kind, first] = tokens[0]

    def tokenizing(self) -> list[Any]:
        """Everything but the texts that decides their token ids."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        settings = [self.add_bos_token, self.prefix_token_id, self.truncation, type(self.tokenizer).__name__]
        return [hashlib.sha256(str(words).encode()).hexdigest(), *settings]

    def most_tokens(self, request: Any) -> int:
        """How many tokens a generation request may make."""
        return int(normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"])

    def _rolling_tokens(self, text: str) -> list[int]:
        key = ("rolling", text)
        if key not in self._texts:
            self._texts[key] = self.tok_encode(text)
        return self._texts[key]

    def _prompt_tokens(self, text: str) -> list[int]:
        key = ("prompt", text)
        if key not in self._texts:
            self._texts[key] = self.tok_batch_encode([text], truncation=self.truncation)[0][0].tolist()
        return self._texts[key]

    def _scored_pair(self, context: str, continuation: str) -> Scored:
        key = (context, continuation)
        if key not in self._scored:
            self._scored[key] = self._sequence(key, *self.encode(context, continuation))
        return self._scored[key]

    def _sequence(self, key: Any, context: list[int], continuation: list[int]) -> Scored:
        if not continuation or len(continuation) > self.max_length:
            raise EvaluationError(
                f"a continuation has {len(continuation)} tokens; expected 1 to {self.max_length}, the model's context"
            )
        whole = context + continuation
        if len(whole) > self.max_length + 1:
            self._cut.add(key)
        return Scored(tuple(whole[-(self.max_length + 1) : -1]), tuple(continuation))

    def _rolled(self, text: str) -> tuple[Scored, ...]:
        if text not in self._windows:
            windows = utils.get_rolling_token_windows(
                token_list=self._rolling_tokens(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            self._windows[text] = tuple(self._sequence(text, list(c), list(t)) for c, t in pairs)
        return self._windows[text]

    # --- log-likelihoods --------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        if self.enable_thinking:
            raise EvaluationError(
                "enable_thinking: true works with generation tasks only, not with log-likelihoods"
            )
        if self._plain is None:
            return super().loglikelihood(requests, disable_tqdm)  # type: ignore[no-any-return]
        sequences = [self._scored_pair(*request.args[:2]) for request in requests]
        results = self._within_memory(lambda: self._likelihoods(sequences))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        if self._plain is None:
            return super().loglikelihood_rolling(requests, disable_tqdm)  # type: ignore[no-any-return]
        windows = [self._rolled(request.args[0]) for request in requests]
        values = iter(self._within_memory(lambda: self._likelihoods([w for some in windows for w in some])))
        totals = [sum(next(values)[0] for _ in some) for some in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self._plain is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)  # type: ignore[no-any-return]
        return self._likelihoods(
            [self._sequence((tuple(c), tuple(t)), list(c), list(t)) for _, c, t in requests]
        )

    def _likelihoods(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        self._check(sequences)
        engine = self._engine()
        assert engine is not None
        with self.precision():
            return [(one.value, one.greedy) for one in engine.score(sequences)]

    def _within_memory(self, run: Callable[[], T]) -> T:
        """run(), with the batches halved as often as memory asks for; EvaluationError when they cannot be smaller."""
        return run_halving(
            run, self.shrink, lambda text: self.notes.append(f"{text} ({self.engine_words()})")
        )

    def precision(self) -> Any:
        """The context that forward passes run in: mixed precision where the model arguments ask for it."""
        return torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        )

    def _engine(self) -> Engine | None:
        return self._tree if self._tree is not None else self._plain

    def _check(self, sequences: Sequence[Scored]) -> None:
        """Once: does the token tree give what plain batches give, on a few of these sequences?"""
        if self._checked or not sequences or self._tree is None or self._plain is None:
            return
        self._checked = True
        try:
            with self.precision():
                reason = compare(self._tree, self._plain, sequences)
        except Unsupported as error:
            reason = str(error)
        if reason is not None:
            self.notes.append(f"scored in plain batches, not over a token tree: {reason}")
            self._tree, self._generator = None, None

    # --- generation -------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return self._within_memory(lambda: self._generate(requests, disable_tqdm))

    def _generate(self, requests: list[Any], disable_tqdm: bool) -> list[str]:
        results: list[str | None] = [None] * len(requests)
        ours: list[tuple[int, Request, list[str]]] = []
        theirs: list[int] = []
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        numbers: dict[Any, int] = {}
        for index, request in enumerate(requests):
            context, arguments = request.args
            kwargs = normalize_gen_kwargs(arguments, self.max_gen_toks)
            until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
            sampling = self._sampling(kwargs)
            if sampling is None or self._generator is None:
                theirs.append(index)
                continue
            most = int(kwargs["max_gen_toks"])
            prompt = self._prompt(context, most)
            number = numbers[prompt] = numbers.get(prompt, -1) + 1
            ours.append((index, Request(prompt, most, self._stopper(until), sampling, number), until))
        made = self._made([request for _, request, _ in ours])
        if made is None:
            theirs, ours, made = list(range(len(requests))), [], []
        for (index, _, until), tokens in zip(ours, made, strict=True):
            results[index] = self._text(tokens, until)
            self.cache_hook.add_partial("generate_until", requests[index].args, results[index])
        if theirs:
            texts = HFLM.generate_until(self, [requests[i] for i in theirs], disable_tqdm=disable_tqdm)
            for index, text in zip(theirs, texts, strict=True):
                results[index] = text
        return [text if text is not None else "" for text in results]

    def greedy(self, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]] | None:
        """New tokens after each prompt, an end token included where one was made; no stop strings.

        None: transformers' own generate has to do it.
        """
        sampling = self._sampling({})
        if sampling is None:
            return None
        requests = [Request(tuple(p), most, lambda tokens: False, sampling) for p in prompts]
        return self._within_memory(lambda: self._made(requests))

    def _made(self, requests: Sequence[Request]) -> list[list[int]] | None:
        """New tokens of every request; None where transformers' own generate has to do it."""
        if not requests:
            return []
        if self._generator is not None and not self._generates:
            self._check_generation(requests)
        if self._generator is None:
            return None
        with self.precision():
            return self._generator.generate(requests)

    def _sampling(self, kwargs: dict[str, Any]) -> Sampling | None:
        """How tokens are chosen; None where transformers' own generate has to do it.

        Raises:
            EvaluationError: sampling without a seed, which nobody could repeat.
        """
        if any(n not in (*_OURS, "max_gen_toks") and v is not None for n, v in kwargs.items()):
            return None
        config = self.model.generation_config
        if any(getattr(config, name, None) not in fine for name, fine in _NEUTRAL.items()):
            return None

        def asked(name: str, neutral: Any) -> Any:
            found = kwargs.get(name)
            found = getattr(config, name, None) if found is None else found
            return neutral if found is None else found

        penalty = float(asked("repetition_penalty", 1.0))
        if not kwargs.get("do_sample"):
            return Sampling(repetition_penalty=penalty)
        if kwargs.get("seed") is None:
            raise EvaluationError(
                "generation with do_sample: true needs a seed, or nobody can repeat it; add seed: 1 to gen_kwargs"
            )
        temperature = float(asked("temperature", 1.0))
        return Sampling(
            temperature if temperature > 0 else 1.0,
            int(asked("top_k", 0)),
            float(asked("top_p", 1.0)),
            penalty,
            int(kwargs["seed"]),
        )

    def _prompt(self, context: str, most: int) -> tuple[int, ...]:
        room = self.max_length - most
        if room <= 0:
            raise EvaluationError(
                f"max_gen_toks is {most}, and the model's context {self.max_length} tokens: no room for a prompt"
            )
        if (context, room) not in self._prompts:
            tokens = tuple(self._prompt_tokens(context))
            if len(tokens) > room:
                self._cut.add(context)
            self._prompts[context, room] = tokens[-room:]
        return self._prompts[context, room]

    def _stopper(self, until: Sequence[str]) -> Any:
        """Do the tokens so far hold a stop string? Only their end is decoded, and only after the thinking."""
        stops = [s for s in until if s]
        # a token is a character at least, or a part of one
        window = max((len(s.encode()) for s in stops), default=0) + 4
        thinking = self.think_end_token

        def stopped(tokens: Sequence[int]) -> bool:
            answer = list(tokens)
            if isinstance(thinking, int):
                if thinking not in answer:
                    return False
                answer = answer[len(answer) - answer[::-1].index(thinking) :]
            elif thinking is not None:
                _before, found, text = self.tok_decode(answer, skip_special_tokens=False).rpartition(thinking)
                return bool(found) and any(s in text for s in stops)
            text = self.tok_decode(answer[-window:], skip_special_tokens=False)
            return any(s in text for s in stops)

        return stopped

    def _text(self, tokens: list[int], until: list[str]) -> str:
        thinking = self.think_end_token
        if isinstance(thinking, int) and thinking in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(thinking) :]
            text = self.tok_decode(tokens).lstrip()
        else:
            text = self.tok_decode(tokens)
        return postprocess_generated_text(  # type: ignore[no-any-return]
            generation=text,
            stop=until,
            think_end_token=thinking if isinstance(thinking, str) else None,
        )

    def _check_generation(self, requests: Sequence[Request]) -> None:
        """Once: are the first tokens that are generated those that plain batches find likeliest?"""
        assert self._generator is not None and self._plain is not None
        self._generates = True
        some = [excerpt(p, self.model) for p in sorted({r.prompt for r in requests}, key=len)[:2]]
        most = min(4, *(r.most for r in requests))
        reason = None
        try:
            with self.precision():
                made = self._generator.generate([Request(p, most, lambda tokens: False) for p in some])
                gaps = [g for p, tokens in zip(some, made, strict=True) for g in self._plain.gaps(p, tokens)]
            if max(gaps) > (1e-3 if self._plain.dtype == torch.float32 else 0.5):
                reason = "other tokens than by plain batches"
        except Unsupported as error:
            reason = str(error)
        if reason is not None:
            self.notes.append(f"generated by transformers' own generate: {reason}")
            self._generator = None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
