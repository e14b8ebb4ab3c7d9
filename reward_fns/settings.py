"""Checks of the settings that reward functions take."""

import math
from collections.abc import Sequence


def check_count(name: str, value: object, hint: str, at_least: int = 1) -> int:
    """The value, an integer of at least `at_least`.

    Raises:
        ValueError: anything else; the hint says what to pass.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least {at_least}: {hint}.")
    return value


def check_number(name: str, value: object, hint: str, at_least: float = 0.0, at_most: float = math.inf) -> float:
    """The value as a float, finite and between the bounds.

    Raises:
        ValueError: anything else; the hint says what to pass.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not at_least <= value <= at_most:  # type: ignore[arg-type, operator]
        between = f"of at least {at_least:g}" if at_most == math.inf else f"from {at_least:g} to {at_most:g}"
        raise ValueError(f"{name} is {value!r}, but must be a finite number {between}: {hint}.")
    return float(value)  # type: ignore[arg-type]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Make sure that the value is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, choices))}.")


def check_end_tokens(eos_token_ids: object) -> frozenset[int] | None:
    """The end tokens as a set; None stays None.

    Raises:
        ValueError: no token, or something that is no token id.
    """
    if eos_token_ids is None:
        return None
    ids = [eos_token_ids] if isinstance(eos_token_ids, int) else eos_token_ids
    if (
        isinstance(ids, str | bytes)
        or not hasattr(ids, "__iter__")
        or not (tokens := list(ids))
        or any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in tokens)
    ):
        raise ValueError(
            f"eos_token_ids is {eos_token_ids!r}, but must be a token id or several: pass tokenizer.eos_token_id, or "
            "the list model.generation_config.eos_token_id where a model ends with any of several tokens."
        )
    return frozenset(tokens)
