"""The published length rewards by name, for recipes and command lines: `length_reward("hapo", weight=0.5)`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from reward_fns import trl_rewards
from reward_fns.alp import ALPReward
from reward_fns.arora_zanette import AroraZanetteReward
from reward_fns.format_length import FormatLengthReward
from reward_fns.grpo_lambda import GRPOLambdaReward
from reward_fns.history_aware import HistoryAwareLengthReward
from reward_fns.kimi import KimiLengthReward
from reward_fns.l1 import L1Reward
from reward_fns.laser import LaserDReward, LaserReward
from reward_fns.shorter_better import ShorterBetterReward
from reward_fns.truncation import TruncationReward


@dataclass(frozen=True)
class Method:
    """A published length reward."""

    build: Callable[..., Any]
    """Its constructor."""
    arxiv: str
    """Where it was published."""
    acts_on: str
    """What of a completion, or of a group, it rewards."""
    knob: str
    """The setting that says how strongly it shortens."""
    published: Mapping[str, Any] = field(default_factory=dict)
    """Published values of the settings without a default, and of those where this method has another."""


METHODS: dict[str, Method] = {
    "dler": Method(
        TruncationReward, "2510.15110", "correct completions that do not end within a limit", "limit", {"limit": 4000}
    ),
    "da-dler": Method(
        TruncationReward,
        "2510.15110",
        "as dler, with a shorter limit for prompts that are mostly solved",
        "easy_limit",
        {"limit": 4000, "easy_limit": 2000},
    ),
    "thinkprune": Method(
        TruncationReward,
        "2504.01296",
        "correct completions longer than a limit that falls during training",
        "limit",
        # the step at which 2000 begins is not verified, so it is left out
        {"limit": {0: 4000, 180: 3000}, "eos_token_ids": None},
    ),
    "hapo": Method(
        HistoryAwareLengthReward,
        "2505.11225",
        "length against the shortest correct completion of the prompt so far",
        "weight",
    ),
    "kimi": Method(
        KimiLengthReward, "2501.12599", "length between the shortest and the longest of the group", "weight"
    ),
    "arora-zanette": Method(
        AroraZanetteReward, "2502.04463", "length of correct completions among those of the group", "alpha"
    ),
    "grpo-lambda": Method(GRPOLambdaReward, "2505.18086", "the same, for the best-solved prompts of a batch", "alpha"),
    "shorterbetter": Method(
        ShorterBetterReward, "2504.21370", "distance to the shortest correct completion of the group", "beta"
    ),
    "alp": Method(ALPReward, "2506.05256", "length, times the share of the group that is correct", "beta"),
    "l1-exact": Method(L1Reward, "2503.04697", "distance to the length that the prompt asks for", "alpha"),
    "l1-max": Method(
        L1Reward, "2503.04697", "length of correct completions beside the most that the prompt asks for", "alpha"
    ),
    "laser": Method(LaserReward, "2505.15612", "correct completions within a target", "target", {"target": 4096}),
    "laser-d": Method(
        LaserDReward, "2505.15612", "correct completions within a target that follows difficulty", "shortest"
    ),
    "format-length": Method(FormatLengthReward, "2505.19439", "length near a share of the budget, no golds", "longest"),
    "dapo-overlong": Method(
        trl_rewards.get_soft_overlong_punishment,
        "2503.14476",
        "the last tokens before the limit, correct or not; TRL's own",
        "soft_punish_cache",
        {"max_completion_len": 20480, "soft_punish_cache": 4096},
    ),
    "cosine": Method(
        trl_rewards.get_cosine_scaled_reward,
        "2502.03373",
        "correctness scaled by length: no length term alone, replaces accuracy_reward; TRL's own",
        "max_len",
        {"max_len": 14336},
    ),
    "repetition": Method(
        trl_rewards.get_repetition_penalty_reward, "2502.03373", "repeated n-grams; TRL's own", "max_penalty"
    ),
}
"""Every name that `length_reward` knows."""

_FIXED = {"l1-exact": {"mode": "exact"}, "l1-max": {"mode": "max"}}
_ELSEWHERE = {
    "canon": "it acts on advantages: reward_fns.canon_length_advantages computes those of a group",
    "o1-pruner": "it weighs fixed samples: reward_fns.o1_pruner_weight computes the weight of one",
    "pear": "it needs the entropies of the policy, and two of its constants are not known",
    "drpo": "it is a loss",
    "gfpo": "it filters completions",
    "conciser": "the published length term is not known to us",
}


def length_reward(name: str, **settings: Any) -> Any:
    """The reward function of a published method.

    Args:
        name: one of `METHODS`; case and underscores do not matter.
        **settings: of its constructor; what is left out takes the published value.

    Raises:
        ValueError: an unknown name or setting, a setting without a published value that is missing, or a value
            outside its range. The message lists what there is.
    """
    key = str(name).lower().replace("_", "-")
    if key in _ELSEWHERE:
        raise ValueError(f"there is no length reward {name!r}: {_ELSEWHERE[key]}.")
    if key not in METHODS:
        raise ValueError(f"there is no length reward {name!r}: choose one of {', '.join(METHODS)}.")
    method = METHODS[key]
    fixed = _FIXED.get(key, {})
    parameters = {n: p for n, p in inspect.signature(method.build).parameters.items() if n not in fixed}
    if unknown := sorted(set(settings) - set(parameters)):
        raise ValueError(f"length reward {name!r} has no setting {', '.join(unknown)}: it has {', '.join(parameters)}.")
    given = {**method.published, **settings, **fixed}
    missing = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in given]
    if missing:
        raise ValueError(
            f"length reward {name!r} needs {', '.join(missing)}, which nobody can publish for your model: pass "
            f"length_reward({name!r}, {', '.join(f'{n}=...' for n in missing)})."
        )
    return method.build(**given)
