r"""Problems and scorers of reasoning-gym: a hundred procedural datasets, by name.

1. A dataset is `chain_sum`, or `chain_sum:max_terms=2,max_digits=1` with settings of its configuration. Problems are
   drawn anew from (name, seed, size), the scorer's copy included: nothing but an index travels with the prompt.
2. The answer of a completion is that of `reward_fns.answers`: the last `\boxed{...}` after the reasoning, or the line
   after `####`. Without either, a short final text is the answer, whole ("12") or after its last "=", ":" or "is" ("It
   is 12."), so that small models that never box are not without a reward. Longer texts are not searched.
3. The reward is 1 for the dataset's full marks and 0 otherwise. Partial credit is there for the asking, but much of it
   is for junk: 0.01 for whatever parses, 0.5 for "10" where the answer is "1". Scaled to unit variance in a group of
   wrong answers, as GRPO does, that trains for junk.
4. Scorers were written to measure, not to be optimised against. Some hand the answer to Python's `eval`, or are content
   with one answer for every problem: the answers of the former are confined to the characters they need, the latter
   datasets are refused.
"""

import ast
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from reward_fns.answers import answer_of, final_text
from reward_fns.completions import completion_text
from reward_fns.literals import strip_setting

_RUNS_ANSWERS = "its scorer runs the model's text as a sympy program, which may do anything and need not end"
_REFUSED = {
    "codeio": "it makes other problems at every call",
    "coin_flip": "its scorer is content with the first digit, so that '0' is right for nearly every problem",
    "composite": "it is a mixture of others: load them one by one",
    "game_of_life_halting": "its scorer is content with any answer",
    "intermediate_integration": _RUNS_ANSWERS,
    "polynomial_multiplication": _RUNS_ANSWERS,
    "puzzle24": "its scorer is content with any four numbers, so that '6*4*1*1' is right for every problem",
    "simple_integration": _RUNS_ANSWERS,
}
_ADMISSIBLE = {
    # these scorers evaluate the answer; with these characters there is nothing to call, look up or loop over
    "binary_matrix": re.compile(r"[0-9\s\[\],]*"),
    # no powers, which take for ever; sympy reads `* *` as one
    "countdown": re.compile(r"(?:[0-9\s()+/.-]|\*(?!\s*\*))*"),
    "n_queens": re.compile(r"[Q_\s\[\],'\"]*"),
    "spiral_matrix": re.compile(r"[0-9\s\[\],-]*"),
    "string_insertion": re.compile(r"[A-Z\s\[\],'\"]*"),
    # this one is content with "nan"
    "complex_arithmetic": re.compile(r"[0-9\s()+.ij-]*"),
}
_SHORT_TEXT = 64
"""Characters that a final text without a box may have beyond twice the gold's: one sentence."""
_INTRODUCTION = re.compile(r".*(?:=|:|\bis\b)\s*", re.DOTALL)
_HASH_DEPENDENT = ("isomorphic_strings", "knight_swap", "list_functions", "ransom_note", "word_ladder")
"""Datasets that iterate over sets of strings: another process has other problems, unless the hash seed is fixed."""


class GymReward:
    """Reward function for problems of a reasoning-gym dataset: whether its own scorer gives full marks.

    Args:
        name: of the dataset.
        seed, size, settings: what it was made with.
        partial_credit: return the scorer's own number, in [0, 1]; correct is then what earns 1.0.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: no such dataset or settings, or one that cannot be used (see the module).

    Instances are picklable. A scorer that raises, or returns no finite number, gives 0.
    """

    __name__: str

    def __init__(
        self,
        name: str,
        seed: int,
        size: int,
        settings: dict[str, Any] | None = None,
        partial_credit: bool = False,
    ) -> None:
        self.name, self.seed, self.size, self.settings = name, seed, size, dict(settings or {})
        self.partial_credit = partial_credit
        self.__name__ = "gym_reward"
        self._problems = create_gym_dataset(name, seed, size, self.settings)
        self._entries: dict[int, dict[str, Any]] = {}

    def __call__(
        self,
        completions: Sequence[object],
        gym_index: Sequence[int],
        solution: Sequence[str] | None = None,
        **columns: object,
    ) -> list[float]:
        """Rewards of a batch.

        Args:
            completions: B strings, or B lists of messages.
            gym_index: index of each problem in the dataset.
            solution: the golds that came with the prompts, to make sure that they belong to the same problems.
            **columns: whatever else the trainer passes; unused.

        Raises:
            ValueError: a gold is another than reasoning-gym has for the index.
        """
        if solution is not None:
            for index, gold in zip(gym_index, solution, strict=True):
                if gold != self.gold(index):
                    raise ValueError(
                        f"Problem {index} of reasoning-gym's {self.name} has the answer {self.gold(index)!r:.100}, "
                        f"but {gold!r:.100} came with the prompt: use the same seed, settings and version of "
                        "reasoning-gym."
                    )
        texts = map(completion_text, completions)
        return [self.score(text, index) for text, index in zip(texts, gym_index, strict=True)]

    def entry(self, index: int) -> dict[str, Any]:
        """The problem as reasoning-gym makes it: `question`, `answer` and `metadata`."""
        if index not in self._entries:
            self._entries[index] = self._problems[index]
        return self._entries[index]

    def gold(self, index: int) -> str:
        """The problem's answer as a text, "" where the scorer accepts several and names none."""
        return gold_text(self.entry(index))

    def score(self, text: str, index: int) -> float:
        """Reward of one completion's text."""
        gold = self.gold(index)
        answer = answer_of(text)
        if answer is not None:
            candidates = [answer]
        else:
            short = final_text(text).strip()
            if len(short) > 2 * len(gold) + _SHORT_TEXT:
                return 0.0
            candidates = [short, _INTRODUCTION.sub("", short)]
        # a box often holds `\text{Friday}` or `$7$`, of which scorers know nothing
        candidates += map(strip_setting, candidates[:])
        score = max(self._score(candidate, index) for candidate in dict.fromkeys(candidates))
        return score if self.partial_credit else float(score >= 1.0)

    def _score(self, answer: str, index: int) -> float:
        admissible = _ADMISSIBLE.get(self.name)
        # solutions may be longer than the one that reasoning-gym names, but time must stay bounded
        if len(answer) > max(500, 4 * len(self.gold(index))) or (admissible and not admissible.fullmatch(answer)):
            return 0.0
        try:
            score = float(self._problems.score_answer(answer, self.entry(index)))
        except Exception:
            # scorers raise on what they did not expect, e.g. prime_factorization's on a word
            return 0.0
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_problems", "_entries")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._problems = create_gym_dataset(self.name, self.seed, self.size, self.settings)
        self._entries = {}

    def __repr__(self) -> str:
        return (
            f"GymReward({self.name!r}, seed={self.seed}, size={self.size}, settings={self.settings}, "
            f"partial_credit={self.partial_credit})"
        )


def gym_problems(name: str, *, train_size: int, held_out_size: int, seed: int) -> tuple[Dataset, Dataset, GymReward]:
    """Training problems, held-out problems and their reward.

    Args:
        name: a dataset, with settings or without (see the module).
        train_size: problems to train on; reasoning-gym may repeat itself among them.
        held_out_size: problems for evaluation; they differ from each other and from all training problems.
        seed: of the dataset; seeds closer than its size share problems, since reasoning-gym adds seed and index.

    Returns:
        Two datasets of columns `prompt`, `solution` and `gym_index`, and the reward for both.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: no such dataset or settings, one that cannot be used, or one with too few different problems.
    """
    name, _, settings_text = name.partition(":")
    settings = parse_settings(settings_text)
    size = 4 * (train_size + held_out_size) + 1000
    reward = GymReward(name, seed, size, settings)
    held_out: list[int] = []
    train: list[int] = []
    held_out_questions: set[str] = set()
    for index in range(size):
        if len(held_out) == held_out_size and len(train) == train_size:
            break
        question = reward.entry(index)["question"]
        if question in held_out_questions:
            continue
        if len(held_out) < held_out_size:
            held_out_questions.add(question)
            held_out.append(index)
        else:
            train.append(index)
    else:
        raise ValueError(
            f"gym:{name} repeats itself: of {size:,} problems, {len(held_out)} serve for evaluation ({held_out_size} "
            f"wanted) and {len(train)} for training ({train_size} wanted). Ask for fewer, or widen its settings: "
            f"{', '.join(_settings(name))}."
        )
    return _dataset(reward, train), _dataset(reward, held_out), reward


def parse_settings(text: str) -> dict[str, Any]:
    """Settings such as `max_terms=2,operators=("+", "-")`, as Python literals.

    Raises:
        ValueError: it is not a list of `name=literal`.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if isinstance(call, ast.Call) and not call.args and all(keyword.arg for keyword in call.keywords):
            return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"{text!r} are no settings of a reasoning-gym dataset: write them as gym:chain_sum:max_terms=2.")


def create_gym_dataset(name: str, seed: int, size: int, settings: dict[str, Any]) -> Any:
    """reasoning-gym's dataset, unless it is unfit for a reward.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: see `gym_problems`.
    """
    known = _known_datasets()
    if name not in known:
        close = difflib.get_close_matches(name, known) or [other for other in sorted(known) if name and name in other]
        hint = f"did you mean {' or '.join(close[:5])}?" if close else f"it has {', '.join(sorted(known))}."
        raise ValueError(f"reasoning-gym has no dataset {name!r}: {hint}")
    if name in _REFUSED:
        raise ValueError(f"gym:{name} is unfit as a reward: {_REFUSED[name]}.")
    if name in _HASH_DEPENDENT and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise ValueError(
            f"gym:{name} has other problems in every process unless Python's hash seed is fixed: start with the "
            "environment variable PYTHONHASHSEED=0."
        )
    if unknown := sorted(set(settings) - set(_settings(name))):
        raise ValueError(f"gym:{name} has no setting {', '.join(unknown)}: it has {', '.join(_settings(name))}.")
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(name, seed=seed, size=size, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"gym:{name} cannot be made with {settings}: {error or type(error).__name__}") from error


def gold_text(entry: dict[str, Any]) -> str:
    return "" if entry["answer"] is None else str(entry["answer"])


def _dataset(reward: GymReward, indices: list[int]) -> Dataset:
    columns = {
        "prompt": [reward.entry(index)["question"] for index in indices],
        "solution": [reward.gold(index) for index in indices],
        "gym_index": indices,
    }
    return Dataset.from_dict(columns)


def _known_datasets() -> dict[str, tuple[type, type]]:
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise ImportError("gym:... tasks need reasoning-gym: pip install 'lenvm-rl[gym]'.") from error
    return reasoning_gym.factory.DATASETS


def _settings(name: str) -> list[str]:
    fields = dataclasses.fields(_known_datasets()[name][1])
    return [field.name for field in fields if field.name not in ("seed", "size")]
