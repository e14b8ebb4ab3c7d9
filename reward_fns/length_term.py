"""What all length rewards share: lengths, verdicts, groups, processes.

A length reward is a TRL reward function that returns the LENGTH TERM ALONE, the published reward minus correctness:

    GRPOTrainer(reward_funcs=[accuracy_reward, HistoryAwareLengthReward()], ...)

1. The length of a completion is the number of its `completion_ids`, the end token included.
2. What is correct is said by another reward function, once per batch (`verdicts.py`). What it cannot score (None) gets
   None here and takes no part in any statistic.
3. Statistics of a group are over the completions of the same prompt in the call, in all processes (`prompts.py`,
   `processes.py`): two processes give the rewards that one gives.
4. State changes in training only (`phase.py`).

A method is a subclass with one method, `terms`, that sees the scored completions of the whole batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from reward_fns.phase import in_training
from reward_fns.processes import gather_rows
from reward_fns.prompts import prompt_keys
from reward_fns.settings import check_end_tokens, check_number
from reward_fns.verdicts import LogExtra, LogMetric, share, verdicts_of


class Completion(NamedTuple):
    """What a length reward knows of a completion."""

    prompt: str
    """Key of its prompt; "" for a reward without groups."""
    tokens: int
    verdict: float
    """What the correctness function said; 0.0 for a reward that needs none."""
    correct: bool
    finished: bool
    """It ends with an end token; True where the reward was not told which those are."""
    target: int | None = None
    """Length asked for in the prompt (L1)."""


class Call(NamedTuple):
    """The circumstances of a call."""

    step: int | None
    """Optimizer steps so far; None in a call by hand."""
    training: bool
    log_metric: LogMetric | None

    def step_for(self, what: str) -> int:
        """The step, for a setting that depends on it.

        Raises:
            ValueError: nobody said which step this is.
        """
        if self.step is None:
            raise ValueError(
                f"{what} depends on the training step, but trainer_state is missing: TRL's trainers pass it; by hand, "
                "pass an object with the attribute global_step."
            )
        return self.step


class LengthReward:
    """Base of the length rewards.

    Args:
        name: under which TRL logs it; set `reward.__name__` to tell two instances in one trainer apart.
        correctness: TRL reward function, not asynchronous and no model, that says what is correct; None where the
            method needs none.
        correct_at: verdict from which a completion is correct.
        eos_token_ids: end tokens. None takes every completion for finished.

    Raises:
        ValueError: a setting outside its range.

    Instances are picklable. `training` overrides what the trainer says about the phase: set it to False around an
    evaluation by hand, where no trainer is there to ask.
    """

    __name__: str
    training: bool | None = None
    """True or False says whether state may change; None asks the trainer (see `phase.py`)."""
    grouped = True
    """Whether a completion's term depends on others."""

    def __init__(
        self,
        name: str,
        correctness: Any = None,
        correct_at: float = 1.0,
        eos_token_ids: int | Sequence[int] | None = None,
    ) -> None:
        self.__name__ = name
        self.correctness = None if correctness is None else share(correctness)
        self.correct_at = check_number("correct_at", correct_at, "accuracy_reward gives 1.0", at_least=-1e30)
        self.eos_token_ids = check_end_tokens(eos_token_ids)

    def __call__(
        self,
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: LogExtra | None = None,
        log_metric: LogMetric | None = None,
        **inputs: Any,
    ) -> list[float | None]:
        """Length terms of a batch.

        Args:
            completions: B strings, or B lists of messages.
            completion_ids: B lists of token ids.
            log_extra: TRL's hook for columns; unused.
            log_metric: TRL's hook for metrics.
            **inputs: whatever else the trainer passes: `prompts`, the dataset's columns (`prompt_id` among them, if it
                has one), `trainer_state`. All of it goes to the correctness function.

        Returns:
            B floats; None where the correctness is None.

        Raises:
            ValueError: lengths or prompts are missing, or the correctness function fails its contract.
        """
        rows = self._rows(completions, completion_ids, inputs)
        everywhere, own = gather_rows(rows, self.fingerprint()) if self.grouped else (rows, slice(0, len(rows)))
        scored = [index for index, row in enumerate(everywhere) if row is not None]
        call = Call(
            getattr(inputs.get("trainer_state"), "global_step", None),
            in_training(log_metric) if self.training is None else self.training,
            log_metric,
        )
        rewards: list[float | None] = [None] * len(everywhere)
        terms = self.terms([everywhere[index] for index in scored], call)  # type: ignore[misc]
        for index, term in zip(scored, terms, strict=True):
            rewards[index] = float(term) + 0.0  # no -0.0
        return rewards[own]

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        """The length term of each completion that could be scored, from all processes if `grouped`."""
        raise NotImplementedError

    def fingerprint(self) -> object:
        """Of the state, which must be equal in all processes."""
        return None

    def _rows(
        self, completions: Sequence[object], completion_ids: Sequence[Sequence[int]] | None, inputs: dict[str, Any]
    ) -> list[Completion | None]:
        """This process's completions, None for those that cannot be scored."""
        count = len(completions)
        if completion_ids is None or len(completion_ids) != count:
            seen = "missing" if completion_ids is None else f"{len(completion_ids)} rows for {count} completions"
            raise ValueError(
                f"{self.__name__} counts tokens, but completion_ids is {seen}: TRL's trainers pass it; by hand, pass "
                "completion_ids=[tokenizer(text)['input_ids'] for text in completions]."
            )
        keys = [""] * count
        if self.grouped:
            keys = prompt_keys(inputs.get("prompts"), inputs.get("prompt_id"), count)
        verdicts: list[float | None] = [0.0] * count
        if self.correctness is not None:
            verdicts = verdicts_of(self.correctness, completions, {"completion_ids": completion_ids, **inputs})
        ends = self.eos_token_ids
        return [
            None
            if verdict is None
            else Completion(
                prompt=key,
                tokens=len(ids),
                verdict=verdict,
                correct=verdict >= self.correct_at,
                finished=ends is None or (len(ids) > 0 and int(ids[-1]) in ends),
            )
            for key, ids, verdict in zip(keys, completion_ids, verdicts, strict=True)
        ]

    def __repr__(self) -> str:
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def by_prompt(completions: Sequence[Completion]) -> dict[str, list[int]]:
    """Indices of the completions of each prompt, prompts in the order of their first completion."""
    groups: dict[str, list[int]] = {}
    for index, completion in enumerate(completions):
        groups.setdefault(completion.prompt, []).append(index)
    return groups
