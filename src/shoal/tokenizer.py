"""The tokenizer that prompts are rendered with: the one that is written out, chat template included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError


def load_tokenizer(folder: Path, chat_template: str | None = None) -> Any:
    """The tokenizer of a model folder; chat_template in mergekit's words, None keeps its own.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    from shoal.merge.writer import chat_template_text

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {reason}") from None
    template = chat_template_text(chat_template, [folder])
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
