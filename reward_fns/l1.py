"""L1, or LCPO (arXiv 2503.04697): the length that the prompt asks for.

The prompt says it in words, "Think for n tokens." (exact) or "Think for maximum n tokens." (max), and the dataset in a
column; n was drawn uniformly from 100 to 4000.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward
from reward_fns.settings import check_choice, check_count, check_number

Mode = Literal["exact", "max"]


class L1Reward(LengthReward):
    """Length term of LCPO, with n the target:

        exact:  -alpha * |n - L|, for correct and wrong completions alike
        max:    correctness * (clip(alpha * (n - L) + delta, 0, 1) - 1)

    Args:
        mode: "exact" or "max".
        correctness: reward function that says what is correct; "exact" does not ask it.
        alpha: per token, published 0.0003 for targets up to 4000.
        delta: of "max", what a correct completion of exactly n tokens keeps; published 0.5.
        target: n for all prompts; None reads it from the column.
        column: of the dataset, with an integer per row.

    Raises:
        ValueError: a setting outside its range; on a call, a missing or impossible target.

    "max" is the form of the paper; the released code has slope alpha/2.
    """

    grouped = False

    def __init__(
        self,
        mode: Mode,
        correctness: Any = accuracy_reward,
        alpha: float = 0.0003,
        delta: float = 0.5,
        target: int | None = None,
        column: str = "target_tokens",
    ) -> None:
        check_choice("mode", mode, get_args(Mode))
        super().__init__(f"l1_{mode}_reward", correctness if mode == "max" else None)
        self.mode = mode
        self.alpha = check_number("alpha", alpha, "a penalty per token")
        self.delta = check_number("delta", delta, "what a correct completion of exactly n tokens keeps", at_most=1.0)
        self.target = None if target is None else check_count("target", target, "a number of tokens, or None")
        self.column = column

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        return [self._term(completion) for completion in completions]

    def _term(self, completion: Completion) -> float:
        assert completion.target is not None
        spare = completion.target - completion.tokens
        if self.mode == "exact":
            return -self.alpha * abs(spare)
        if not completion.correct:
            return 0.0
        return completion.verdict * (min(1.0, max(0.0, self.alpha * spare + self.delta)) - 1)

    def _rows(
        self, completions: Sequence[object], completion_ids: Sequence[Sequence[int]] | None, inputs: dict[str, Any]
    ) -> list[Completion | None]:
        rows = super()._rows(completions, completion_ids, inputs)
        targets = [self.target] * len(rows) if self.target is not None else inputs.get(self.column)
        if targets is None or len(targets) != len(rows):
            seen = "missing" if targets is None else f"{len(targets)} rows for {len(rows)} completions"
            raise ValueError(
                f"{self.__name__} needs the length asked for, but the column {self.column!r} is {seen}: add it to the "
                "dataset, name another with column=..., or give all prompts one with target=..."
            )
        for row, target in enumerate(targets):
            check_count(f"row {row} of column {self.column!r}", target, "the number of tokens asked for")
        return [row if row is None else row._replace(target=target) for row, target in zip(rows, targets, strict=True)]
