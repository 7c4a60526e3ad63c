"""lm-eval tasks in, per-item scores out. Importing this package imports neither torch nor lm_eval.

catalogue   finds lm-eval tasks by name, their splits, metrics and items
requests    builds a task's requests once, over a whole split in data-set order
resident    lm-eval's `hf` model class on a model that stays in memory while its weights change
scorer      scores a subset of the items, one row per item
objective   the smooth objective of an item
"""
