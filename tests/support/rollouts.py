"""Rollouts as an evaluation reads them, with tokens drawn by their own seed."""

import random


def rollout(prompt, length, finished=True, seed=0):
    rng = random.Random(f"{seed} {prompt} {length}")
    return {
        "prompt_ids": prompt,
        "completion_ids": [rng.randint(2, 100) for _ in range(length)],
        "finished": finished,
    }
