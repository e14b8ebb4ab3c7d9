"""Rollouts, as a critic is fitted to them and an evaluation reads them."""

import random

END = 1
"""Id of the end token."""


def rollout(prompt, length, finished=True, seed=0):
    """Tokens are drawn by their own seed."""
    rng = random.Random(f"{seed} {prompt} {length}")
    return {
        "prompt_ids": prompt,
        "completion_ids": [rng.randint(2, 100) for _ in range(length)],
        "finished": finished,
    }


def countdown(start, cut=None):
    """A rollout whose every token says how many are left: n, n - 1, ..., 1, <eos>. The number k has the id k + 3."""
    completion = [*range(start + 2, 3, -1), END]
    return {
        "prompt_ids": [start + 3],
        "completion_ids": completion[:cut],
        "finished": cut is None,
    }


MIXED = [countdown(3), countdown(9, cut=4), {**countdown(5), "prompt_ids": [9, 8]}, countdown(1), countdown(7, cut=1)]
"""Finished and cut, with prompts of one and two tokens."""
