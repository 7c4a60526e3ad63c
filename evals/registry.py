"""The model `shoal` in lm-eval's registry, by a lazy placeholder: nothing heavy is imported until lm-eval asks for it.

lm-eval 0.4 reads no entry points, so a package has to be imported for its models to be known. Its registry module is
light (about 20 ms, neither torch nor transformers), so `import shoal.evals` simply imports and fills it: no import hook.
lm-eval fills the registry with its own placeholders only while it is empty, so those come first.
"""

from __future__ import annotations

MODEL = "shoal"
TARGET = "shoal.evals.resident:ResidentLM"


def register() -> None:
    """Make `lm_eval.simple_evaluate(model="shoal", ...)` and `--model shoal` work in this process. Idempotent."""
    import lm_eval.models  # noqa: F401 - lm-eval's own models: it would not add them to a registry with ours
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)
