"""Other libraries' progress bars and notes off: what matters of them is checked and said by us."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """lm-eval, datasets, transformers and the Hub's client say errors only within this block."""
    import datasets
    import lm_eval.api.task as task_module
    import transformers.utils.logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    data_bars, load_bars = (
        datasets.are_progress_bars_disabled(),
        transformers_logging.is_progress_bar_enabled(),
    )
    progress = task_module.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    task_module.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        task_module.tqdm = progress
        if not data_bars:
            datasets.enable_progress_bars()
        if load_bars:
            transformers_logging.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
