"""lm-eval tasks in, per-item scores out. Importing this package imports neither torch nor transformers, and makes the
model `shoal` known to lm-eval.

registry    the model `shoal` in lm-eval's registry
lm          that model: whatever lm-eval's `hf` loads, scored as shoal scores
catalogue   finds lm-eval tasks by name, their splits, metrics and items
members     what a group or tag of lm-eval stands for
requests    builds a task's requests once, over a whole split in data-set order
resident    lm-eval's `hf` model class on a model that stays in memory while its weights change
scorer      scores a subset of the items, one row per item
objective   the smooth objective of an item
"""

from shoal.evals.registry import register

register()
