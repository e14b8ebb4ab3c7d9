"""Truncation: what does not end within the limit earns nothing (DLER, arXiv 2510.15110; DA-DLER; ThinkPrune).

The simplest length penalty. DLER's point is that it suffices once the optimiser is right: batch-wise normalisation of
advantages, clip-higher, dynamic sampling; those are the trainer's business. The term here is minus what correctness
pays for a completion that was cut or is too long.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from reward_fns.accuracy import accuracy_reward
from reward_fns.length_term import Call, Completion, LengthReward, by_prompt
from reward_fns.settings import check_count, check_number


class TruncationReward(LengthReward):
    """Takes back the correctness of what does not end within the limit (DLER, DA-DLER).

        R' = correctness                 if tokens <= limit and the last token ends the completion
           = kept * correctness          otherwise

    Args:
        limit: tokens, the end token included; published 4000. A schedule is a dict from the step at which a limit
            begins to the limit, with one for step 0: ThinkPrune's {0: 4000, 180: 3000, ...}.
        eos_token_ids: end tokens of the policy (`trainer.eos_token_ids`, `tokenizer.eos_token_id`). None tests lengths
            alone, as ThinkPrune does; then a completion that the trainer cuts at the limit itself still counts as
            finished.
        correctness: reward function that says what is correct.
        kept: share of the correctness that a cut completion keeps: 0 in the paper, 0.1 in the released code.
        easy_limit: DA-DLER's shorter limit (published 2000) for prompts that are solved reliably; None is DLER.
        easy_ratio: a prompt is easy when more than this share of its completions is correct within `limit` (published
            0.5). The paper leaves open whether the share is that of the same group, and the side of a tie; here it is,
            and a tie is not easy.

    Raises:
        ValueError: a setting outside its range.

    Logs the share of completions outside the limit, `truncation_reward/cut`.
    """

    def __init__(
        self,
        limit: int | Mapping[int, int],
        eos_token_ids: int | Sequence[int] | None,
        correctness: Any = accuracy_reward,
        kept: float = 0.0,
        easy_limit: int | None = None,
        easy_ratio: float = 0.5,
    ) -> None:
        super().__init__("truncation_reward", correctness, eos_token_ids=eos_token_ids)
        self.limit = _checked_limit(limit)
        self.kept = check_number("kept", kept, "the share of correctness that a cut completion keeps", at_most=1.0)
        self.easy_ratio = check_number("easy_ratio", easy_ratio, "a share of correct completions", at_most=1.0)
        self.easy_limit = easy_limit
        if easy_limit is not None:
            check_count("easy_limit", easy_limit, "a number of tokens, or None for one limit for all prompts")
            lowest = min(self.limit.values()) if isinstance(self.limit, dict) else self.limit
            if easy_limit >= lowest:
                raise ValueError(
                    f"easy_limit is {easy_limit}, which is not shorter than the limit of {lowest} tokens: lower it, or "
                    "leave it out for one limit for all prompts."
                )
        self.grouped = easy_limit is not None

    def limit_at(self, step: int) -> int:
        """The limit of other than easy prompts at a training step."""
        if isinstance(self.limit, int):
            return self.limit
        return self.limit[max(start for start in self.limit if start <= step)]

    def terms(self, completions: list[Completion], call: Call) -> list[float]:
        limit = self.limit if isinstance(self.limit, int) else self.limit_at(call.step_for("a schedule of limits"))
        within = [completion.finished and completion.tokens <= limit for completion in completions]
        if self.easy_limit is not None:
            for members in by_prompt(completions).values():
                solved = sum(within[index] and completions[index].correct for index in members)
                if solved / len(members) > self.easy_ratio:
                    for index in members:
                        within[index] = within[index] and completions[index].tokens <= self.easy_limit
        if call.log_metric is not None:
            call.log_metric(f"{self.__name__}/cut", within.count(False) / len(within) if within else 0.0)
        return [0.0 if kept else (self.kept - 1) * c.verdict for kept, c in zip(within, completions, strict=True)]


def _checked_limit(limit: object) -> int | dict[int, int]:
    if not isinstance(limit, Mapping):
        return check_count("limit", limit, "a number of tokens, or a dict from steps to limits")
    if 0 not in limit:
        raise ValueError(f"limit is {limit!r}, a schedule that does not say where to begin: add a limit for step 0.")
    return {
        check_count("a step of limit", step, "a training step", at_least=0): check_count(
            "limit", tokens, "a number of tokens"
        )
        for step, tokens in sorted(limit.items())
    }
