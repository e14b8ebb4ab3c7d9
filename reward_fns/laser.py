"""LASER and LASER-D (arXiv 2505.15612): a bonus for correct completions within a target length.

LASER's target is fixed; LASER-D has one for each of three levels of difficulty, and finds them anew all the time.
Left out: LASER-DE, whose test for repetitions is not described in our source.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_count, check_number

LEVELS = ("high", "medium", "low")
"""Levels of a prompt by the share of its completions that are correct: at least 2/3, at least 1/3, less."""


class LaserReward(LengthReward):
    """Length term of LASER: the bonus if correct and at most `target` tokens, else 0.

    Args:
        target: tokens; published 2048, 4096 and 8192.
        correctness: reward function that says what is correct.
        bonus: published 0.5.

    Raises:
        ValueError: a setting outside its range.

    The published base reward is +1 or -0.5: set `reward_weights=[1.5, 1.0]`; the constant cancels in the advantage.
    """

    grouped = False

    def __init__(self, target: int, correctness: Any = accuracy_reward, bonus: float = 0.5) -> None:
        super().__init__("laser_reward", correctness)
        self.target = check_count("target", target, "a number of tokens")
        self.bonus = check_number("bonus", bonus, "what a short correct completion earns on top")

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        return [self.bonus * (c.correct and c.tokens <= self.target) for c in completions]


class LaserDReward(LengthReward):
    """Length term of LASER-D: the bonus if correct and at most as long as the target of the prompt's level.

    Every `update_every` batches, the target of a level becomes the least of `shortest`, `shortest + spacing`, ...,
    `longest` within which at least 1/int(2n/3) (level "high"), 1/int(n/3) ("medium") or all ("low") of the level's
    completions stay, n the group size; a level without completions keeps its target. All start at `longest`.

    Args:
        correctness: reward function that says what is correct.
        shortest: lower bound of the targets, published 1024, 2048 and 4096 (the L in the names of the models).
        longest: upper bound, published 16384.
        spacing: published 1024.
        bonus: published 0.5.
        update_every: training batches between two updates, published 20.
        group_size: n, the trainer's `num_generations`; published 8.

    Raises:
        ValueError: a setting outside its range.

    The lengths are those of the training batches since the last update, where the paper samples 500 other prompts: a
    reward function cannot sample. Targets change in training only; save them with the checkpoint (`state_dict`).

    Logs `laser_d_reward/target_high`, `..._medium` and `..._low`.
    """

    def __init__(
        self,
        correctness: Any = accuracy_reward,
        shortest: int = 1024,
        longest: int = 16384,
        spacing: int = 1024,
        bonus: float = 0.5,
        update_every: int = 20,
        group_size: int = 8,
    ) -> None:
        super().__init__("laser_d_reward", correctness)
        self.shortest = check_count("shortest", shortest, "a number of tokens")
        self.longest = check_count("longest", longest, "a number of tokens, no less than shortest", at_least=shortest)
        self.spacing = check_count("spacing", spacing, "the tokens between two possible targets")
        self.bonus = check_number("bonus", bonus, "what a short correct completion earns on top")
        self.update_every = check_count("update_every", update_every, "a number of training batches")
        self.group_size = check_count("group_size", group_size, "the trainer's num_generations")
        self._batches = 0
        self._targets = dict.fromkeys(LEVELS, self.longest)
        self._lengths: dict[str, list[int]] = {level: [] for level in LEVELS}

    @property
    def targets(self) -> dict[str, int]:
        """Target of each level, in tokens."""
        return dict(self._targets)

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        terms = [0.0] * len(completions)
        seen: dict[str, list[int]] = {level: [] for level in LEVELS}
        for members in by_prompt(completions).values():
            level = _level(sum(completions[index].correct for index in members), len(members))
            for index in members:
                tokens = completions[index].tokens
                terms[index] = self.bonus * (completions[index].correct and tokens <= self._targets[level])
                seen[level].append(tokens)
        if call.log_metric is not None:
            for level, target in self._targets.items():
                call.log_metric(f"{self.__name__}/target_{level}", float(target))
        if call.training:
            for level, lengths in seen.items():
                self._lengths[level] += lengths
            self._batches += 1
            if self._batches % self.update_every == 0:
                self._update()
        return terms

    def fingerprint(self) -> tuple[int, ...]:
        # enough to notice a state that was loaded in some processes only
        return self._batches, *self._targets.values()

    def state_dict(self) -> dict[str, Any]:
        """Targets, and the lengths since the last update, made of what JSON can hold."""
        lengths = {level: list(tokens) for level, tokens in self._lengths.items()}
        return {"batches": self._batches, "targets": dict(self._targets), "lengths": lengths}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is none.
        """
        try:
            batches = int(state["batches"])
            targets = {level: int(state["targets"][level]) for level in LEVELS}
            lengths = {level: [int(tokens) for tokens in state["lengths"][level]] for level in LEVELS}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is no state of a LaserDReward ({type(error).__name__}: {error}): pass what state_dict() "
                "returned."
            ) from error
        self._batches, self._targets, self._lengths = batches, targets, lengths

    def _update(self) -> None:
        needed = {"high": self.group_size * 2 // 3, "medium": self.group_size // 3, "low": 1}
        for level, lengths in self._lengths.items():
            if lengths:
                candidates = itertools.chain(range(self.shortest, self.longest, self.spacing), [self.longest])
                self._targets[level] = next(
                    (c for c in candidates if sum(n <= c for n in lengths) * max(1, needed[level]) >= len(lengths)),
                    self.longest,
                )
            self._lengths[level] = []


def _level(correct: int, count: int) -> str:
    if 3 * correct >= 2 * count:
        return "high"
    return "medium" if 3 * correct >= count else "low"
