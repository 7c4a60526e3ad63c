"""Trackers: what a run sends to TensorBoard, Weights & Biases or trackio, where it is asked to.

Each through its own package, an extra of ours. The journal stays the truth: what is sent is read from it, what was sent
once is not sent again, and a tracker that fails ends no run. A step is the number of item evaluations that the run had
spent: the one axis on which searches compare.
"""

from shoal.tracking.observer import Tracking
from shoal.tracking.registry import chosen
from shoal.tracking.tracker import TrackerError

__all__ = ["TrackerError", "Tracking", "chosen"]
