"""Reward functions for any TRL trainer (`GRPOTrainer(reward_funcs=[accuracy_reward, format_reward], ...)`).

Importing this package starts no process and imports neither torch, trl, sympy nor math-verify.
"""

from reward_fns.accuracy import AccuracyReward, accuracy_reward
from reward_fns.answers import validate_golds
from reward_fns.format import FormatReward, format_reward

__all__ = [
    "AccuracyReward",
    "FormatReward",
    "accuracy_reward",
    "format_reward",
    "validate_golds",
]
