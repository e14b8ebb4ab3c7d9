"""Remaining length <-> length value <-> logit (LenVM section 3.1).

1. One token costs -(1 - gamma), so a state with l tokens left is worth V = -(1 - gamma^l): a bounded number for an
   unbounded length. The critic predicts z with V = -sigmoid(z); z is what is stored and served.
2. Everything is written with expm1, log1p and log-sigmoid: at gamma = 0.9998 the textbook forms lose half their digits.
3. Each function takes tensors of any shape, or numbers. A number is computed in float64, a tensor in its own dtype, but
   at least in float32: bfloat16 cannot even count to 300.
"""

import math
from collections.abc import Callable
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_gamma", "gamma_from_horizon", "logit_to_remaining", "remaining_to_value", "value_to_remaining"]


def check_gamma(gamma: float | None, name: str = "gamma") -> float:
    """The discount as a float, if it lies in the open interval (0, 1).

    Args:
        gamma: length discount.
        name: how the caller's option is called, for the message.

    Raises:
        ValueError: gamma is None, not a number, or outside (0, 1).
    """
    advice = (
        f"Derive it from the lengths with lenvm_rl.length.gamma_from_horizon, for example {name}=0.997 for 1533 tokens."
    )
    if gamma is None:
        raise ValueError(f"{name} is not set, and a length value means nothing without its discount. {advice}")
    try:
        number = float(gamma)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number between 0 and 1, got {gamma!r}. {advice}") from None
    if not 0.0 < number < 1.0:
        raise ValueError(
            f"{name} must lie in the open interval (0, 1), got {gamma!r}: at 0 every length has the same value, "
            f"at 1 no token costs anything. {advice}"
        )
    return number


@overload
def remaining_to_value(remaining: Tensor, gamma: float) -> Tensor: ...
@overload
def remaining_to_value(remaining: float, gamma: float) -> float: ...
def remaining_to_value(remaining: Tensor | float, gamma: float) -> Tensor | float:
    """Length value of a state with this many tokens left to generate, the EOS included (LenVM eq. 2).

    Args:
        remaining: l >= 0 in tokens, any shape. 0 means the completion has ended; inf is allowed.
        gamma: discount of the critic, in (0, 1).

    Returns:
        -(1 - gamma^l) in [-1, 0], same shape.

    Raises:
        ValueError: gamma outside (0, 1).
    """
    log_gamma = math.log(check_gamma(gamma))
    return _apply(lambda x: torch.expm1(x * log_gamma), remaining)


@overload
def value_to_remaining(value: Tensor, gamma: float) -> Tensor: ...
@overload
def value_to_remaining(value: float, gamma: float) -> float: ...
def value_to_remaining(value: Tensor | float, gamma: float) -> Tensor | float:
    """Remaining length, in tokens, that a length value stands for (LenVM eq. 5).

    Args:
        value: V in (-1, 0], any shape. 0 means the completion has ended.
        gamma: discount of the critic, in (0, 1).

    Returns:
        log(1 + V) / log(gamma), same shape; +inf at V = -1, nan below it.

    Raises:
        ValueError: gamma outside (0, 1).

    A lower bound on the expected length, since the transform is concave (appendix F). Prefer `logit_to_remaining` where
    the logit is at hand: 1 + V cancels for long remainders, and float32 calls everything past 17 / (1 - gamma) inf.
    """
    log_gamma = math.log(check_gamma(gamma))
    return _apply(lambda x: torch.log1p(x) / log_gamma + 0.0, value)  # + 0.0 turns -0.0 into 0.0


@overload
def logit_to_remaining(logit: Tensor, gamma: float) -> Tensor: ...
@overload
def logit_to_remaining(logit: float, gamma: float) -> float: ...
def logit_to_remaining(logit: Tensor | float, gamma: float) -> Tensor | float:
    """Remaining length, in tokens, that a head output stands for (LenVM eq. 5, softplus form).

    Args:
        logit: z, any shape; V = -sigmoid(z), so a large z is a long remainder.
        gamma: discount of the critic, in (0, 1).

    Returns:
        softplus(z) / -log(gamma) >= 0, same shape. A lower bound on the expected length (appendix F).

    Raises:
        ValueError: gamma outside (0, 1).
    """
    log_gamma = math.log(check_gamma(gamma))
    # softplus(z) = -logsigmoid(-z); F.softplus itself turns linear at 20, 1e-10 too early for float64
    return _apply(lambda x: F.logsigmoid(-x) / log_gamma, logit)


def gamma_from_horizon(length: float, mass: float = 0.99) -> float:
    """The discount at which `length` tokens use up `mass` of the value range (LenVM section 5.3).

    Args:
        length: horizon in tokens: the 99th percentile of finished completions, or the generation limit where more than
            1 % of the completions were cut (the finished ones are then a biased sample).
        mass: 1 - gamma^length, in (0, 1).

    Returns:
        (1 - mass)^(1 / length).

    Raises:
        ValueError: length below one token, or mass outside (0, 1).
    """
    if not 1.0 <= length < math.inf:
        raise ValueError(f"the horizon must be a finite length of at least 1 token, got {length!r}")
    if not 0.0 < mass < 1.0:
        raise ValueError(f"mass must lie in the open interval (0, 1), got {mass!r}: the paper uses 0.99")
    return check_gamma(math.exp(math.log1p(-mass) / length), name="gamma from the horizon")


def _apply(formula: Callable[[Tensor], Tensor], x: Tensor | float) -> Tensor | float:
    if not isinstance(x, Tensor):
        return formula(torch.tensor(x, dtype=torch.float64)).item()
    # a bfloat16 or integer input keeps its shape but not its dtype
    return formula(x.to(torch.promote_types(x.dtype, torch.float32)))
