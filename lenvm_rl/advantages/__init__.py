"""From critic values and rewards to token advantages: the length signal of a LenVM beside any task signal.

`compute_advantages` is the one entry of the trainers; `length_advantages` and `gae` give one part of it.
The conventions (states, bootstrap, holes, signs) are those of `docs` and of LenVM, arXiv 2604.27039, eq. 23-32.
"""

from lenvm_rl.advantages.compute import compute_advantages, gae, length_advantages
from lenvm_rl.advantages.statistics import Pooled, explained_variance, pooled
from lenvm_rl.advantages.types import Advantages, Moments, RowStats, TaskSignal
from lenvm_rl.advantages.whitening import whiten

__all__ = [
    "Advantages",
    "Moments",
    "Pooled",
    "RowStats",
    "TaskSignal",
    "compute_advantages",
    "explained_variance",
    "gae",
    "length_advantages",
    "pooled",
    "whiten",
]
