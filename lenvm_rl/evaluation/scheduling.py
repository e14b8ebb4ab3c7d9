"""What a predicted length is worth to a server: batches of requests that end together waste less padding.

1. A batch of completions runs until its longest one ends. What is computed for those that ended before is waste: its
   share is 1 - tokens / (size * longest), summed over the batches.
2. Requests arrive in an order. Within a window of them, those of similar predicted length form a batch; a window of one
   batch is arrival order, whatever is predicted.
3. The oracle knows each length in advance. No predictor can: the policy draws its tokens at random. What a predictor
   that knows the policy could reach, the mean length of the prompt's other completions shows.

It is a demonstration on recorded rollouts; a server that refills a batch token by token (continuous batching) wastes no
such padding, and uses predicted lengths to order its queue.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """What batches of some order cost."""

    waste: float
    """Share of the computed positions that are padding, in [0, 1)."""
    steps: float
    """Decoding steps: the longest completion of each batch, summed."""
    waste_low: float = math.nan
    waste_high: float = math.nan
    """Middle 95 % of the waste over orders of arrival; nan where one order is looked at."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def form_batches(scores: np.ndarray, batch_size: int, window: int) -> list[np.ndarray]:
    """Requests of similar score together, within windows of those that arrived together.

    Args:
        scores: (N,) of the requests in the order of their arrival.
        batch_size: requests of a batch; the last one may be smaller.
        window: requests that wait together; a multiple of the batch size.

    Returns:
        Positions of each batch's requests. Equal scores keep the order of arrival.

    Raises:
        ValueError: sizes that leave no batches.
    """
    if batch_size < 1 or window < batch_size or window % batch_size:
        raise ValueError(
            f"A window must hold a whole number of batches: got a window of {window} requests for batches of "
            f"{batch_size}."
        )
    batches = []
    for start in range(0, len(scores), window):
        order = start + np.argsort(scores[start : start + window], kind="stable")
        batches += [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches


def padding_waste(lengths: np.ndarray, batches: list[np.ndarray]) -> Schedule:
    """Cost of batches of completions of these lengths."""
    longest = np.array([lengths[batch].max() for batch in batches])
    positions = float(sum(len(batch) * most for batch, most in zip(batches, longest, strict=True)))
    return Schedule(waste=1 - float(lengths.sum()) / positions, steps=float(longest.sum()))


def compare_schedules(
    lengths: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    *,
    batch_size: int = 16,
    window: int = 256,
    arrivals: int = 100,
    seed: int = 0,
) -> dict[str, Schedule]:
    """Padding waste of arrival order, of each prediction and of the oracle, over random orders of arrival.

    Args:
        lengths: (N,) tokens of each request's completion.
        predictions: by name, (N,) predicted lengths, or anything that grows with them.
        batch_size, window: see `form_batches`.
        arrivals: orders of arrival that are averaged over, the same for all.
        seed: of these orders.

    Returns:
        By name, with "arrival order" first and "oracle" last.

    Raises:
        ValueError: no requests, predictions of another number, or impossible sizes.
    """
    if len(lengths) == 0:
        raise ValueError("There are no requests to schedule.")
    for name, predicted in predictions.items():
        if len(predicted) != len(lengths):
            raise ValueError(f"{name!r} predicts {len(predicted)} lengths for {len(lengths)} requests.")
    rng = np.random.default_rng(seed)
    scores = {"arrival order": np.zeros(len(lengths)), **predictions, "oracle": lengths}
    found: dict[str, list[Schedule]] = {name: [] for name in scores}
    for _ in range(arrivals):
        order = rng.permutation(len(lengths))
        for name, score in scores.items():
            found[name].append(padding_waste(lengths[order], form_batches(score[order], batch_size, window)))
    return {name: _mean(schedules) for name, schedules in found.items()}


def leave_one_out_means(lengths: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(N,) mean length of the other completions of the same prompt: what knowing the policy, not the dice, predicts.

    Raises:
        ValueError: a prompt with one completion.
    """
    _, group = np.unique(groups, return_inverse=True)
    count = np.bincount(group)
    if (count < 2).any():
        raise ValueError("A prompt has one completion only, and so no others to take the mean of.")
    return (np.bincount(group, lengths)[group] - lengths) / (count[group] - 1)


def _mean(schedules: list[Schedule]) -> Schedule:
    waste = [one.waste for one in schedules]
    low, high = np.percentile(waste, (2.5, 97.5)) if len(waste) > 1 else (math.nan, math.nan)
    return Schedule(float(np.mean(waste)), float(np.mean([s.steps for s in schedules])), float(low), float(high))
