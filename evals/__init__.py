"""lm-eval tasks in, per-item scores out. Importing this package imports neither torch nor transformers, and makes the
model `shoal` known to lm-eval.

registry    the model `shoal` in lm-eval's registry
catalogue   finds lm-eval tasks by name, their splits, metrics and items
index       lm-eval's index of its own tasks, kept on disk
members     what a group or tag of lm-eval stands for
requests    builds a task's requests once, over a whole split in data-set order
remember    what a task says of an item, asked once, by templates that are compiled once
plan        every request's tokens, saved and used again; what a set of items costs
resident    lm-eval's `hf` model class on a model that stays in memory while its weights change: the model `shoal`
tree        token sequences as one tree, laid out for forward passes
attention   attention over that tree, as an attention function of transformers
abreast     forward passes side by side, each by a share of the threads
engine      log-likelihoods over the tree or in plain batches
picking     log-probabilities of chosen tokens from logits; `head` keeps the logits' memory
generation  generates with continuous batching; `slots` holds keys and values of what runs
scorer      scores a subset of the items, one row per item
writing     what a model writes to prompts of ours
objective   the smooth objective of an item
backward    its gradient with respect to the model's parameters, batch by batch
updates     the protocol by which a scorer elsewhere takes weights
finite      the first module whose output is not finite
limits      memory of a forward pass, and batches that are halved
machine     arithmetic of a forward pass, and the machine's rate; `heap` sets its C library
"""

from shoal.evals.registry import register

register()
