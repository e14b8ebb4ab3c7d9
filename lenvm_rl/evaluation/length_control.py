"""Completions that are asked for a length, with and without a critic that sees to it, and what became of the text.

1. Both runs get the same prompts, the same truncated candidates, the same limit and the same seed. Only one has
   controls: `LengthTarget` for equal, `AtMost`, and `AtLeast` with foresight.
2. Lengths count in the unit that was asked for: tokens with the end token, or words. A control counts in tokens, so a
   target in words is translated with the tokens per word of the unguided completions, for each language by itself.
3. Beside each score stands what the text is like: `text_quality`, and correct answers where there are any.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lenvm_rl.decoding.controls import AtLeast, AtMost, LengthControl, LengthTarget
from lenvm_rl.evaluation.lifebench import Unit
from lenvm_rl.evaluation.steered_sampling import SteeredSampler
from lenvm_rl.evaluation.target_scores import (
    Constraint,
    count_words,
    length_deviation,
    length_scores,
    mean_over_targets,
    ruler_matches,
)
from lenvm_rl.evaluation.text_quality import TextQuality, text_quality
from lenvm_rl.sampling import Completion

__all__ = [
    "ControlScore",
    "ControlledRun",
    "TargetRequest",
    "control_of",
    "run_targets",
    "score_targets",
    "token_targets",
]


@dataclass(frozen=True)
class TargetRequest:
    """A prompt, and the length that its completion shall have."""

    prompt_ids: list[int]
    target: int
    """In the unit that is asked for."""
    constraint: Constraint
    group: str = ""
    """What shares its tokens per word, such as a language."""


@dataclass(frozen=True)
class ControlledRun:
    """Completions of requests."""

    completions: list[Completion]
    lengths: np.ndarray
    """(N,) in the unit of the targets."""


@dataclass(frozen=True)
class ControlScore:
    """How a run keeps one constraint."""

    score: float
    """LS, LIFEBench's mean over targets, in [0, 100]."""
    deviation: float
    """Mean |LD|."""
    per_target: dict[int, float]
    """LS of each target."""
    quality: TextQuality
    accuracy: float | None = None
    """Share of correct completions, where answers can be checked."""
    precise_match: float | None = None
    flexible_match: float | None = None
    """Ruler's, for targets in words at its levels."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "per_target": {str(target): score for target, score in self.per_target.items()}}


def control_of(constraint: Constraint, tokens: int) -> LengthControl:
    """What sees to it that a completion keeps a constraint."""
    if constraint == "equal":
        return LengthTarget(tokens)
    return AtMost(tokens) if constraint == "at_most" else AtLeast(tokens, foresight=True)


def run_targets(
    sampler: SteeredSampler,
    requests: Sequence[TargetRequest],
    *,
    unit: Unit = "tokens",
    controls: Sequence[LengthControl] | None = None,
    seed: int = 0,
    name: str = "targets",
) -> ControlledRun:
    """Sample one completion of each request.

    Args:
        sampler: how to sample; its limit should leave room beyond the largest target.
        requests: what to complete.
        unit: in which lengths are counted.
        controls: of each request; None is the unguided run.
        seed: of the draws.
        name: beside the progress bar.
    """
    completions = sampler([one.prompt_ids for one in requests], controls, seed=seed, name=name)
    return ControlledRun(completions, lengths_of(completions, sampler.tokenizer, unit))


def lengths_of(completions: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, unit: Unit) -> np.ndarray:
    """(N,) tokens, the end token counted, or words."""
    if unit == "tokens":
        return np.array([len(completion.ids) for completion in completions])
    texts = tokenizer.batch_decode([completion.ids for completion in completions], skip_special_tokens=True)
    return np.array([count_words(text) for text in texts])


def token_targets(
    requests: Sequence[TargetRequest], unguided: ControlledRun, unit: Unit, *, least: float = 1.0
) -> list[int]:
    """Targets in tokens, the end token counted.

    Args:
        requests: with targets in the unit.
        unguided: their completions, from which tokens per word are counted for each group.
        unit: "tokens" are taken as they are.
        least: tokens per word of a group without a word.
    """
    if unit == "tokens":
        return [one.target for one in requests]
    tokens: dict[str, int] = {}
    words: dict[str, int] = {}
    for one, completion, length in zip(requests, unguided.completions, unguided.lengths.tolist(), strict=True):
        tokens[one.group] = tokens.get(one.group, 0) + len(completion.ids) - completion.finished
        words[one.group] = words.get(one.group, 0) + length
    ratio = {group: tokens[group] / words[group] if words[group] else least for group in tokens}
    return [max(1, round(one.target * ratio[one.group])) + 1 for one in requests]


def score_targets(
    model: Any,
    requests: Sequence[TargetRequest],
    run: ControlledRun,
    *,
    unit: Unit = "tokens",
    temperature: float = 1.0,
    correct: Callable[[Sequence[int]], np.ndarray] | None = None,
) -> dict[Constraint, ControlScore]:
    """Scores of a run for each constraint that was asked for.

    Args:
        model: the policy without guidance, under which the texts are judged.
        requests, run: what was asked for, and what came.
        unit: of targets and lengths.
        temperature: of the policy.
        correct: positions of completions -> which of them are correct; None where answers cannot be checked.
    """
    scores: dict[Constraint, ControlScore] = {}
    targets = np.array([one.target for one in requests])
    for constraint in dict.fromkeys(one.constraint for one in requests):
        rows = [i for i, one in enumerate(requests) if one.constraint == constraint]
        of_rows = length_scores(run.lengths[rows], targets[rows], constraint)
        matches = ruler_matches(run.lengths[rows].tolist(), targets[rows].tolist()) if unit == "words" else None
        scores[constraint] = ControlScore(
            score=mean_over_targets(of_rows, targets[rows]),
            deviation=float(np.abs(length_deviation(run.lengths[rows], targets[rows])).mean()),
            per_target={int(n): float(of_rows[targets[rows] == n].mean()) for n in np.unique(targets[rows])},
            quality=text_quality(
                model,
                [requests[i].prompt_ids for i in rows],
                [run.completions[i] for i in rows],
                temperature=temperature,
            ),
            accuracy=None if correct is None else float(correct(rows).mean()),
            precise_match=None if matches is None else matches[0],
            flexible_match=None if matches is None else matches[1],
        )
    return scores
