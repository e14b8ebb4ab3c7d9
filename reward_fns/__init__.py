"""Reward functions for any TRL trainer (`GRPOTrainer(reward_funcs=[accuracy_reward, format_reward], ...)`).

1. `accuracy_reward` and `format_reward`: what is right, and what looks like an answer.
2. The published length rewards, each the length term alone, to be added to a correctness reward (`docs/rewards.md`);
   by name in `METHODS`, through `length_reward(name, **settings)`.
3. `share`: one verdict per batch for a correctness function of your own.

Importing this package starts no process and imports neither torch, trl, sympy nor math-verify.
"""

from reward_fns.accuracy import AccuracyReward, accuracy_reward
from reward_fns.alp import ALPReward
from reward_fns.answers import validate_golds
from reward_fns.arora_zanette import AroraZanetteReward
from reward_fns.canon import canon_length_advantages
from reward_fns.format import FormatReward, format_reward
from reward_fns.format_length import FormatLengthReward
from reward_fns.grpo_lambda import GRPOLambdaReward
from reward_fns.history_aware import HistoryAwareLengthReward
from reward_fns.kimi import KimiLengthReward
from reward_fns.l1 import L1Reward
from reward_fns.laser import LaserDReward, LaserReward
from reward_fns.length_term import LengthReward
from reward_fns.methods import METHODS, Method, length_reward
from reward_fns.o1_pruner import o1_pruner_weight
from reward_fns.shorter_better import ShorterBetterReward
from reward_fns.trl_rewards import (
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
)
from reward_fns.truncation import TruncationReward
from reward_fns.verdicts import share

__all__ = [
    "METHODS",
    "ALPReward",
    "AccuracyReward",
    "AroraZanetteReward",
    "FormatLengthReward",
    "FormatReward",
    "GRPOLambdaReward",
    "HistoryAwareLengthReward",
    "KimiLengthReward",
    "L1Reward",
    "LaserDReward",
    "LaserReward",
    "LengthReward",
    "Method",
    "ShorterBetterReward",
    "TruncationReward",
    "accuracy_reward",
    "canon_length_advantages",
    "format_reward",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "length_reward",
    "o1_pruner_weight",
    "share",
    "validate_golds",
]
