"""What a request may ask of its length, as a change of the distribution over the next token (LenVM sections 4.2, 4.3).

1. A control sees the candidates of one step: base probabilities p, the critic's logit z of the state AFTER each
   candidate, end tokens with the value 0 by definition. It returns new log-weights, nothing else.
2. Soft: `LengthTilt`, `SoftTarget`. Hard: `LengthTarget` (exactly), `AtMost`, `AtLeast`. `a & b` asks for both, and
   contradictions are refused where they are written down.
3. u = sigmoid(z) = 1 - gamma^l is used where values are averaged (tilts), the remaining length in its softplus form
   where lengths are compared: in float32 neighbouring u are equal from 135 tokens on at gamma = 0.9.
4. Lengths count the end token, as everywhere. `generated` is the number of tokens before this step, so the token that
   is chosen now is number `generated + 1`.

Shapes: R requests, K candidates of each, in ascending order of token id.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lenvm_rl.length import logit_to_remaining

__all__ = ["AtLeast", "AtMost", "Candidates", "LengthControl", "LengthTarget", "LengthTilt", "SoftTarget"]


@dataclass(frozen=True)
class Candidates:
    """The next tokens that are considered in one step."""

    log_probs: Tensor
    """(R, K) base log-probabilities, renormalised over the candidates; -inf where there is none."""
    logits: Tensor
    """(R, K) float32: z of the state after the candidate; -inf (u = 0, nothing remains) for end tokens."""
    present: Tensor
    """(R, K) bool: there is a candidate in this place."""
    is_end: Tensor
    """(R, K) bool: it is an end token."""
    generated: Tensor
    """(R,) tokens of the completion before this step."""
    gamma: float
    """Discount of the critic."""

    @property
    def values(self) -> Tensor:
        """(R, K) float64: u = sigmoid(z), 0 at the end, near 1 far from it."""
        return torch.sigmoid(self.logits.double())

    @property
    def remaining(self) -> Tensor:
        """(R, K) float64: tokens that are left after the candidate."""
        return logit_to_remaining(self.logits.double(), self.gamma)

    def select(self, rows: Tensor) -> "Candidates":
        """The candidates of some of the requests."""
        return Candidates(
            self.log_probs[rows],
            self.logits[rows],
            self.present[rows],
            self.is_end[rows],
            self.generated[rows],
            self.gamma,
        )


class LengthControl(ABC):
    """What one request asks of its length. Combine two with `&`; leave a request alone with None."""

    order: ClassVar[int]
    """Place in a combination: tilts see the base distribution, constraints what is left of it."""

    @property
    def parts(self) -> tuple["LengthControl", ...]:
        """The single controls that this one consists of."""
        return (self,)

    @property
    def kind(self) -> Hashable:
        """Controls of the same kind are applied together, with one row of `parameters` each."""
        return type(self)

    @property
    def longest(self) -> int | None:
        """The largest length that this control aims at; None if it names none."""
        return None

    def parameters(self) -> tuple[float, ...]:
        """What differs between requests of the same kind."""
        return ()

    def needs_critic(self, generated: int) -> bool:
        """Whether values matter in this step."""
        return True

    def bans_end(self, generated: int) -> bool:
        """Whether the completion must not end with this token."""
        return False

    def forces_end(self, generated: int) -> bool:
        """Whether the completion must end with this token."""
        return False

    @property
    def guards_end(self) -> bool:
        """Whether an end token may be chosen by its value only, not by the base distribution."""
        return False

    @abstractmethod
    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        """New log-weights, up to a constant of each row.

        Args:
            log_weights: (R, K), -inf where there is no candidate; the base distribution or what other controls left.
            candidates: what is known of them.
            parameters: (R, number of parameters) float64, row by row those of requests of this kind.
        """

    def __and__(self, other: "LengthControl") -> "LengthControl":
        return _Combined(self.parts + other.parts)


@dataclass(frozen=True)
class LengthTilt(LengthControl):
    """q(x) proportional to p(x) exp(beta u(x)) (LenVM eq. 12, in the sign of the paper's words).

    Raises:
        ValueError: beta is not finite.
    """

    beta: float
    """Negative shortens, positive lengthens, 0 is the base distribution, truncation included."""

    order: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_finite("LengthTilt", "beta", self.beta)

    def parameters(self) -> tuple[float, ...]:
        return (self.beta,)

    def needs_critic(self, generated: int) -> bool:
        return self.beta != 0

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        return (log_weights.double() + parameters[:, :1] * candidates.values).to(log_weights.dtype)


@dataclass(frozen=True)
class SoftTarget(LengthControl):
    """The tilt under which the mean value after this token is that of a completion of n tokens.

    Each step solves E_q[u] = 1 - gamma^(n - generated - 1) for the beta of q(x) proportional to p(x) exp(beta u(x)),
    within plus and minus `max_beta`. It pulls towards n and promises nothing.

    Raises:
        ValueError: n below 1, or max_beta not positive.
    """

    n: int
    """Tokens of the completion, end token included."""
    max_beta: float = 50.0
    """How far the odds may be bent; inf takes the nearest candidate wherever the target lies outside of all."""

    order: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check_length("SoftTarget", self.n)
        if not self.max_beta > 0:
            raise ValueError(f"SoftTarget needs a positive max_beta, got {self.max_beta}: at 0 it could pull nowhere.")

    @property
    def longest(self) -> int | None:
        return self.n

    def parameters(self) -> tuple[float, ...]:
        return (self.n, self.max_beta)

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        left = (parameters[:, 0] - candidates.generated - 1).clamp(min=0)
        target = -torch.expm1(left * math.log(candidates.gamma))
        return tilt_to_mean(log_weights, candidates.values, target, parameters[:, 1])


@dataclass(frozen=True)
class LengthTarget(LengthControl):
    """A completion of exactly n tokens: in each step the candidate whose predicted end is nearest to n.

    Ties go to the more probable candidate, then to the smaller id. The n-th token is an end token: n is never passed.
    Before that an end token is chosen only where the base distribution offers one and all else would overshoot by more:
    offering one in every step ends too early, since a prediction that is too long can still be steered and an end
    cannot. `LengthTarget(n) & AtLeast(n)` has exactly n tokens whatever the critic says.

    Raises:
        ValueError: n below 1.
    """

    n: int
    """Tokens of the completion, end token included."""

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_length("LengthTarget", self.n)

    @property
    def longest(self) -> int | None:
        return self.n

    @property
    def guards_end(self) -> bool:
        return True

    def parameters(self) -> tuple[float, ...]:
        return (self.n,)

    def forces_end(self, generated: int) -> bool:
        return generated + 1 >= self.n

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        left = parameters[:, :1] - candidates.generated[:, None] - 1
        distance = (candidates.remaining - left).abs()
        return _only(_best(distance, candidates.present, log_weights), log_weights)


@dataclass(frozen=True)
class AtLeast(LengthControl):
    """No end before n tokens, then the base distribution.

    Raises:
        ValueError: n below 1.
    """

    n: int
    """Tokens of the completion, end token included."""
    foresight: bool = False
    """Until then keep to candidates whose predicted end is not before n, so that the text does not run out of things to
    say: the longest where there is none. Without it the critic is never asked."""

    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _check_length("AtLeast", self.n)

    @property
    def longest(self) -> int | None:
        return self.n

    def parameters(self) -> tuple[float, ...]:
        return (self.n,)

    def needs_critic(self, generated: int) -> bool:
        return self.foresight and self.bans_end(generated)

    def bans_end(self, generated: int) -> bool:
        return generated + 1 < self.n

    @property
    def kind(self) -> Hashable:
        return type(self), self.foresight

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        left = parameters[:, :1] - candidates.generated[:, None] - 1
        if not self.foresight:
            return log_weights
        alive = candidates.present & ~candidates.is_end & log_weights.isfinite()
        # tokens are whole: a prediction within half a token reaches n
        reaches = alive & (candidates.remaining > left - 0.5)
        longest = _best(-candidates.remaining, alive, log_weights)
        kept = torch.where(reaches.any(1, keepdim=True), reaches, longest)
        return torch.where(kept | (left <= 0), log_weights, -math.inf)


@dataclass(frozen=True)
class AtMost(LengthControl):
    """Never more than n tokens, ending in time by itself where the critic can arrange it.

    While every candidate is predicted to end within n the distribution is not touched at all. Otherwise the candidates
    that fit keep their odds, or the shortest one is taken where none fits, and an end token keeps the probability it
    had: running out of budget is no reason to stop at once. The last token that n allows is an end token.

    Raises:
        ValueError: n below 1.
    """

    n: int
    """Tokens of the completion, end token included."""

    order: ClassVar[int] = 3

    def __post_init__(self) -> None:
        _check_length("AtMost", self.n)

    @property
    def longest(self) -> int | None:
        return self.n

    def parameters(self) -> tuple[float, ...]:
        return (self.n,)

    def forces_end(self, generated: int) -> bool:
        return generated + 1 >= self.n

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        left = parameters[:, :1] - candidates.generated[:, None] - 1
        going_on = candidates.present & ~candidates.is_end & log_weights.isfinite()
        # tokens are whole: a prediction within half a token fits
        fits = going_on & (candidates.remaining < left + 0.5)
        shortest = _best(candidates.remaining, going_on, log_weights)
        kept = torch.where(fits.any(1, keepdim=True), fits, shortest)

        log_q = log_weights.double().log_softmax(1)
        before = torch.logsumexp(log_q.masked_fill(~going_on, -math.inf), 1, keepdim=True)
        after = torch.logsumexp(log_q.masked_fill(~kept, -math.inf), 1, keepdim=True)
        moved = torch.where(kept, log_q + (before - after), torch.where(going_on, -math.inf, log_q))
        binding = (going_on & ~fits).any(1, keepdim=True)
        return torch.where(binding, moved.to(log_weights.dtype), log_weights)


class _Combined(LengthControl):
    order: ClassVar[int] = -1

    def __init__(self, parts: tuple[LengthControl, ...]) -> None:
        parts = tuple(sorted(parts, key=lambda part: part.order))
        _check_together(parts)
        self._parts = parts

    @property
    def parts(self) -> tuple[LengthControl, ...]:
        return self._parts

    @property
    def longest(self) -> int | None:
        return max((part.longest for part in self.parts if part.longest is not None), default=None)

    @property
    def guards_end(self) -> bool:
        return any(part.guards_end for part in self.parts)

    def needs_critic(self, generated: int) -> bool:
        return any(part.needs_critic(generated) for part in self.parts)

    def bans_end(self, generated: int) -> bool:
        return any(part.bans_end(generated) for part in self.parts)

    def forces_end(self, generated: int) -> bool:
        return any(part.forces_end(generated) for part in self.parts)

    def reweight(self, log_weights: Tensor, candidates: Candidates, parameters: Tensor) -> Tensor:
        for part in self.parts:
            own = torch.tensor([part.parameters()], dtype=torch.float64, device=log_weights.device)
            log_weights = part.reweight(log_weights, candidates, own.expand(len(log_weights), -1))
        return log_weights

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Combined) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)


def tilt_to_mean(log_weights: Tensor, values: Tensor, target: Tensor, max_beta: Tensor) -> Tensor:
    """The tilt of a distribution under which the mean value is the target.

    Args:
        log_weights: (R, K), -inf where there is no candidate.
        values: (R, K) float64, u of the candidates.
        target: (R,) float64, the mean that is asked for.
        max_beta: (R,) float64, bound of the tilt; at inf a target outside of all values takes the nearest one.

    Returns:
        (R, K) log-weights; the mean is increasing in beta, so bisection finds the only solution.
    """
    alive = log_weights.isfinite()
    log_p = log_weights.double()
    lowest = values.masked_fill(~alive, math.inf).amin(1)
    highest = values.masked_fill(~alive, -math.inf).amax(1)
    # centred and scaled to the candidates' own range, where a beta of a few hundred is as good as infinite
    scale = (highest - lowest).clamp(min=1e-12)
    centred = ((values - lowest[:, None]) / scale[:, None]).masked_fill(~alive, 0.0)
    wanted = (target - lowest) / scale
    bound = (max_beta * scale).clamp(max=1e4)
    low, high = -bound, bound.clone()
    for _ in range(40):
        middle = (low + high) / 2
        mean = ((log_p + middle[:, None] * centred).softmax(1) * centred).sum(1)
        low, high = torch.where(mean < wanted, middle, low), torch.where(mean < wanted, high, middle)
    tilted = log_p + ((low + high) / 2)[:, None] * centred
    outside = max_beta.isinf() & ((wanted <= 0) | (wanted >= 1)) & (highest > lowest)
    nearest = _best((values - target[:, None]).abs(), alive, log_weights)
    tilted = torch.where(outside[:, None], _only(nearest, log_weights).double(), tilted)
    return tilted.to(log_weights.dtype)


def _best(cost: Tensor, among: Tensor, log_weights: Tensor) -> Tensor:
    """(R, K) bool: the cheapest candidate of each row; of equals the more probable, then the one of smaller id."""
    cost = cost.masked_fill(~among, math.inf)
    cheapest = among & (cost == cost.amin(1, keepdim=True))
    # clamped: another control may have left a candidate no weight, and it still comes before what is no candidate
    likely = log_weights.double().clamp(min=-1e300).masked_fill(~cheapest, -math.inf)
    first = likely.argmax(1, keepdim=True)
    return torch.zeros_like(among).scatter_(1, first, True) & among


def _only(chosen: Tensor, log_weights: Tensor) -> Tensor:
    return torch.where(chosen, 0.0, -math.inf).to(log_weights.dtype)


def _check_finite(owner: str, name: str, number: float) -> None:
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError(
            f"{owner} needs a finite {name}, got {number!r}: the strongest tilt there is are the hard modes AtMost, "
            "AtLeast and LengthTarget."
        )


def _check_length(owner: str, n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{owner} needs a length of at least 1 token, the end token included, got {n!r}.")


def _check_together(parts: tuple[LengthControl, ...]) -> None:
    shown = " & ".join(map(repr, parts))
    names = [type(part).__name__ for part in parts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{shown} asks for {twice.pop()} twice: keep one of them.")
    if sum(part.order <= 1 for part in parts) > 1:
        raise ValueError(
            f"{shown} steers towards two lengths at once: of LengthTilt, SoftTarget, LengthTarget and the official "
            "modes a request may have one; AtLeast and AtMost go with any of them."
        )
    length = {type(part): part.longest for part in parts if part.longest is not None}
    least, most = length.get(AtLeast), length.get(AtMost)
    exact = length.get(LengthTarget)
    if exact is not None and most is not None:
        raise ValueError(f"{shown}: LengthTarget never passes its length, so AtMost has nothing to add: drop it.")
    ceiling = most if most is not None else exact
    if least is not None and ceiling is not None and least > ceiling:
        raise ValueError(
            f"{shown} contradict each other: no completion has at least {least} and at most {ceiling} tokens. Lower "
            "the one or raise the other."
        )
