"""Tokens after which more, or less, is still to come than before: where a completion decides to be long.

1. With u = 1 - gamma^l = sigmoid(z), a token scores s_t = gamma u_t - u_{t-1} + (1 - gamma): 0 where all goes as
   expected, positive where the remainder turned out longer (LenVM eq. 16, with the sign of its words). After the end
   token u is 0.
2. A type of token is summed up over all its occurrences. Lists hold types whose mean is further from 0 than twice its
   standard error, so that a rare token does not lead them by luck.
3. Two sets of completions of the same prompts, before and after RL: how often each type occurs in a completion, and
   whether what became rare had been marked by the critic (Spearman's rank correlation).

Scores are of the state after a token in its context: a type's mean is an average over contexts, not a property of it.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lenvm_rl.length import check_gamma

CONTEXTS = 3
"""Occurrences of a type that are kept with their context: those of the most extreme scores."""
CONTEXT_TOKENS = 10
"""Tokens before and after such an occurrence."""


@dataclass(frozen=True)
class Occurrence:
    """A token in its completion."""

    score: float
    before: list[int]
    after: list[int]


@dataclass(frozen=True)
class TokenType:
    """All occurrences of one token."""

    token: int
    count: int
    per_completion: float
    score: float
    """Mean of s_t."""
    error: float
    """Standard error of the mean; nan of a single occurrence."""
    tokens: float
    """Mean change of the predicted length of the whole completion, in tokens."""
    contexts: tuple[Occurrence, ...] = ()

    @property
    def certain(self) -> bool:
        """Whether the mean is further from 0 than twice its standard error."""
        return abs(self.score) > 2 * self.error


def td_scores(logits: np.ndarray, gamma: float, *, finished: bool) -> np.ndarray:
    """s_t of each token of a completion: (T,), positive where longer than expected.

    Args:
        logits: (T + 1,) z of the states s_0 .. s_T.
        gamma: discount.
        finished: the last token is an end token, after which u is 0 whatever the critic says.
    """
    u = _ends_at_zero(1 / (1 + np.exp(-np.asarray(logits, dtype=float))), finished)
    return check_gamma(gamma) * u[1:] - u[:-1] + (1 - gamma)


def length_changes(logits: np.ndarray, gamma: float, *, finished: bool) -> np.ndarray:
    """Change of the predicted length of the whole completion at each token: (T,) tokens, l_t + 1 - l_{t-1}."""
    remaining = np.logaddexp(0, np.asarray(logits, dtype=float)) / -math.log(check_gamma(gamma))
    remaining = _ends_at_zero(remaining, finished)
    return remaining[1:] + 1 - remaining[:-1]


def token_types(
    completions: Sequence[Sequence[int]],
    logits: Sequence[np.ndarray],
    finished: Sequence[bool],
    gamma: float,
    *,
    leave_out: Sequence[int] = (),
) -> dict[int, TokenType]:
    """What each token does to the length, over all completions.

    Args:
        completions: token ids.
        logits: of each completion, (T + 1,).
        finished: of each completion.
        gamma: discount.
        leave_out: tokens that are not counted, such as the end token.

    Raises:
        ValueError: no completions.
    """
    if len(completions) == 0:
        raise ValueError("There are no completions to count tokens in.")
    scores: dict[int, list[float]] = {}
    changes: Counter[int] = Counter()
    places: dict[int, list[tuple[float, int, int]]] = {}
    for row, (ids, z, ended) in enumerate(zip(completions, logits, finished, strict=True)):
        of_row, change = td_scores(z, gamma, finished=ended), length_changes(z, gamma, finished=ended)
        for time, token in enumerate(ids):
            scores.setdefault(token, []).append(float(of_row[time]))
            changes[token] += float(change[time])  # type: ignore[assignment]
            places.setdefault(token, []).append((float(of_row[time]), row, time))
    found = {}
    for token in sorted(scores.keys() - set(leave_out)):
        values = np.array(scores[token])
        mean = float(values.mean())
        extreme = sorted(places[token], key=lambda place: -place[0] if mean > 0 else place[0])[:CONTEXTS]
        found[token] = TokenType(
            token=token,
            count=len(values),
            per_completion=len(values) / len(completions),
            score=mean,
            error=float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan,
            tokens=changes[token] / len(values),
            contexts=tuple(
                Occurrence(
                    score,
                    list(completions[row][max(0, time - CONTEXT_TOKENS) : time]),
                    list(completions[row][time + 1 : time + 1 + CONTEXT_TOKENS]),
                )
                for score, row, time in extreme
            ),
        )
    return found


def strongest(types: dict[int, TokenType], most: int, *, least_count: int) -> tuple[list[TokenType], list[TokenType]]:
    """The types that lengthen most and those that shorten most, strongest first.

    Args:
        types: of `token_types`.
        most: length of either list.
        least_count: rarer types are left out, and so are those whose mean could be 0.
    """
    certain = [one for one in types.values() if one.count >= least_count and one.certain]
    longer = sorted((one for one in certain if one.score > 0), key=lambda one: -one.score)
    shorter = sorted((one for one in certain if one.score < 0), key=lambda one: one.score)
    return longer[:most], shorter[:most]


@dataclass(frozen=True)
class TokenChange:
    """One token before and after RL."""

    token: int
    before: float
    """Occurrences in a completion."""
    after: float
    score: float
    """Mean score before."""

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class TokenComparison:
    """Whether what became rare had been marked."""

    changes: tuple[TokenChange, ...]
    """Types that occurred often enough before, the most removed first."""
    correlation: float
    """Spearman's, of the score before and the change of the occurrences in a completion: negative where RL removed what
    lengthens."""
    low: float
    high: float
    """Middle 95 % over resampled types."""
    relative_correlation: float
    """The same with the logarithm of the ratio of the occurrences, which does not favour frequent types."""
    removed_marked: float
    """Of all occurrences that were removed, the share that belongs to types with a positive score."""
    marked_before: float
    """The share that these types had of all occurrences before."""

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "changes": [{**asdict(one), "change": one.change} for one in self.changes]}


def compare_tokens(
    before: dict[int, TokenType], after: dict[int, TokenType], *, least_count: int, draws: int = 1000, seed: int = 0
) -> TokenComparison:
    """Which tokens RL removed, and whether the critic had marked them.

    Args:
        before, after: of `token_types`, over completions of the same prompts, the first scored by the critic.
        least_count: types that were rarer before are left out.
        draws: of the bootstrap over types.
        seed: of these draws.

    Raises:
        ValueError: fewer than three types to correlate.
    """
    changes = [
        TokenChange(token, one.per_completion, after[token].per_completion if token in after else 0.0, one.score)
        for token, one in before.items()
        if one.count >= least_count
    ]
    if len(changes) < 3:
        raise ValueError(
            f"{len(changes)} tokens occurred {least_count} times or more, too few to correlate: sample more "
            "completions, or lower least_count."
        )
    changes.sort(key=lambda one: one.change)
    score = np.array([one.score for one in changes])
    change = np.array([one.change for one in changes])
    rare = 0.5 * min(one.before / before[one.token].count for one in changes)  # half an occurrence in all completions
    ratio = np.array([math.log((one.after + rare) / (one.before + rare)) for one in changes])
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, len(changes), len(changes)) for _ in range(draws)]
    replicates = [value for rows in drawn if not math.isnan(value := rank_correlation(score[rows], change[rows]))]
    low, high = np.percentile(replicates, (2.5, 97.5)) if replicates else (math.nan, math.nan)
    removed, occurred = np.maximum(-change, 0), np.array([one.before for one in changes])
    return TokenComparison(
        changes=tuple(changes),
        correlation=rank_correlation(score, change),
        low=float(low),
        high=float(high),
        relative_correlation=rank_correlation(score, ratio),
        removed_marked=float(removed[score > 0].sum() / removed.sum()) if removed.any() else math.nan,
        marked_before=float(occurred[score > 0].sum() / occurred.sum()),
    )


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing their mean rank; nan where one does not vary."""
    a, b = _ranks(x), _ranks(y)
    if a.std() == 0 or b.std() == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[inverse]


def _ends_at_zero(states: np.ndarray, finished: bool) -> np.ndarray:
    return np.append(states[:-1], 0.0) if finished else states
