"""What of the settings of the length signal cannot work, alone or together: said before anything is loaded.

An option that would have no effect is refused as well: whoever set it expects one.
"""

from dataclasses import fields
from typing import Any, get_args

from lenvm_rl.length import check_gamma
from lenvm_rl.length_controller import CONTROLLERS, SCHEDULES, check_start
from lenvm_rl.trainers.critic_placement import check_placement
from lenvm_rl.trainers.length_settings import SHARED, CriticUpdateKind, LengthSettings


def check_length_settings(args: LengthSettings, *, longest: int | None, zero_stage: int | None) -> None:
    """Refuse what cannot work.

    Args:
        args: of a trainer.
        longest: tokens of the longest completion that is sampled.
        zero_stage: of the launch; None without DeepSpeed.

    Raises:
        ValueError: a setting outside its range, one without effect, or two that contradict each other.
    """
    args.length_credit()
    check_start(args.controller_settings(), args.length_coef)
    if args.length_gamma is not None:
        check_gamma(args.length_gamma, "length_gamma")
    check_placement(args.length_critic_placement, zero_stage)
    _check_ranges(args)
    _check_target(args, longest)
    _check_update(args)
    _check_controller(args)
    _check_effects(args)


def check_target(tokens: Any, longest: int | None, name: str) -> float:
    """The target as a number.

    Raises:
        ValueError: no positive number, or one that generation cannot reach.
    """
    number = isinstance(tokens, int | float) and not isinstance(tokens, bool)
    if not number or not 1.0 <= tokens < float("inf"):
        raise ValueError(f"{name}={tokens!r} is no length: give the tokens of a completion, end token included.")
    if longest is not None and tokens > longest:
        raise ValueError(
            f"{name}={tokens} lies beyond max_completion_length={longest}, where generation stops: raise it, or lower "
            "the target."
        )
    return float(tokens)


def _check_ranges(args: LengthSettings) -> None:
    if args.length_token_budget < 1:
        raise ValueError(f"length_token_budget must be at least 1, got {args.length_token_budget}.")
    ranges = {
        "length_critic_learning_rate": 0.0 < args.critic_learning_rate < float("inf"),
        "length_critic_steps": args.length_critic_steps >= 1,
        "length_backbone_coef": 0.0 <= args.length_backbone_coef < float("inf"),
        "length_critic_refresh_below": args.length_critic_refresh_below <= 1.0,
        "length_critic_refresh_window": args.length_critic_refresh_window >= 1,
        "length_critic_trust": 0.0 <= args.length_critic_trust < 1.0,
        "length_collapse_patience": args.length_collapse_patience >= 0,
        "length_collapse_drop": 0.0 < args.length_collapse_drop < 1.0,
    }
    for name, fits in ranges.items():
        if not fits:
            raise ValueError(
                f"{name}={getattr(args, name)} is out of range: a learning rate is positive, steps and windows are "
                "at least 1, patience and backbone_coef at least 0, refresh_below at most 1, trust and a drop of "
                "accuracy in [0, 1)."
            )


def _check_target(args: LengthSettings, longest: int | None) -> None:
    if args.length_controller == "tokens":
        check_target(args.length_controller_target, longest, "length_controller_target")
    if args.length_target is None and args.length_target_column is None:
        return
    if args.length_target is not None and args.length_target_column is not None:
        raise ValueError(
            f"length_target={args.length_target} and length_target_column={args.length_target_column!r} both say "
            "how long a completion should be: set one of them."
        )
    if args.length_target is not None:
        check_target(args.length_target, longest, "length_target")
    if args.length_controller == "tokens":
        raise ValueError(
            "length_controller='tokens' moves the coefficient to reach a mean length, and a length target presses "
            "towards one by itself: choose one of the two."
        )
    if args.length_controller_end < 0:
        raise ValueError(
            f"length_controller_end={args.length_controller_end} would in the end press away from the length target: "
            "make it 0 or more."
        )


def _check_update(args: LengthSettings) -> None:
    kinds = get_args(CriticUpdateKind)
    if args.length_critic_update not in kinds:
        raise ValueError(f"length_critic_update must be one of {', '.join(kinds)}, got {args.length_critic_update!r}.")
    if args.length_critic == SHARED and args.length_critic_update == "refresh":
        raise ValueError(
            "length_critic='shared' starts from nothing and learns from every batch, so that there is nothing to "
            "refresh: leave length_critic_update out."
        )
    if args.length_backbone_coef and args.length_critic != SHARED:
        raise ValueError(
            f"length_backbone_coef={args.length_backbone_coef} sends the length critic's error into the policy, "
            "but the critic is a model of its own: set length_critic='shared', or leave it out."
        )
    if args.length_critic_update != "frozen" and args.length_critic is None and args.length_coef == 0:
        raise ValueError(
            f"length_critic_update={args.length_critic_update!r} without a length_critic updates nothing: name one."
        )


def _check_controller(args: LengthSettings) -> None:
    if args.length_mode == "shaping" and args.length_controller in CONTROLLERS:
        raise ValueError(
            f"length_controller={args.length_controller!r} moves the coefficient until the length signal has done "
            "enough, but length_mode='shaping' does not shorten: take length_mode='additive', or no controller."
        )


def _check_effects(args: LengthSettings) -> None:
    controlled = args.length_controller in CONTROLLERS
    needs = {
        "length_controller_target": (controlled, "length_controller is 'accuracy' or 'tokens'"),
        "length_controller_margin": (args.length_controller == "accuracy", "length_controller is 'accuracy'"),
        "length_controller_low": (args.length_controller == "accuracy", "length_controller is 'accuracy'"),
        "length_controller_high": (controlled, "length_controller is 'accuracy' or 'tokens'"),
        "length_controller_rate": (controlled, "length_controller is 'accuracy' or 'tokens'"),
        "length_controller_smoothing": (controlled, "length_controller is 'accuracy' or 'tokens'"),
        "length_controller_warmup": (controlled, "length_controller is 'accuracy' or 'tokens'"),
        "length_controller_end": (args.length_controller in SCHEDULES, "length_controller is 'linear' or 'cosine'"),
        "length_unsolved_groups": (args.length_gate == "all", "length_gate is 'all'"),
        "length_critic_learning_rate": (args.critic_learns, "the critic learns: length_critic_update, or 'shared'"),
        "length_critic_steps": (args.critic_learns, "the critic learns: length_critic_update, or 'shared'"),
        "length_critic_refresh_below": (args.length_critic_update == "refresh", "length_critic_update is 'refresh'"),
        "length_critic_refresh_window": (args.length_critic_update == "refresh", "length_critic_update is 'refresh'"),
        "length_critic_placement": (not args.critic_learns, "the critic is frozen"),
    }
    defaults = {field.name: field.default for field in fields(LengthSettings)}
    for name, (effective, when) in needs.items():
        if getattr(args, name) != defaults[name] and not effective:
            raise ValueError(f"{name}={getattr(args, name)} has an effect only where {when}: leave it out.")
