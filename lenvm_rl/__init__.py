"""lenvm_rl: teach language models to reason in fewer tokens, with token-level credit from a Length Value Model.

The names below are imported on first use, so that ``import lenvm_rl`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenvm_rl.advantages import Advantages, TaskSignal, compute_advantages, gae, length_advantages
    from lenvm_rl.credit import LengthCredit
    from lenvm_rl.critic import LengthCritic
    from lenvm_rl.decoding import (
        AtLeast,
        AtMost,
        LengthGuide,
        LengthTarget,
        LengthTilt,
        RemainingLengthStream,
        SoftTarget,
    )
    from lenvm_rl.length import gamma_from_horizon, logit_to_remaining, remaining_to_value, value_to_remaining
    from lenvm_rl.merging import merge_update
    from lenvm_rl.model import LengthValueConfig, LengthValueModel
    from lenvm_rl.pretraining.trainer import LengthValueTrainer
    from lenvm_rl.trainers.drpo import DRPOConfig, DRPOTrainer
    from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
    from lenvm_rl.trainers.ppo import LenVMPPOConfig, LenVMPPOTrainer

__version__ = "0.1.0"

_HOME = {
    "Advantages": "advantages",
    "AtLeast": "decoding",
    "AtMost": "decoding",
    "DRPOConfig": "trainers.drpo",
    "DRPOTrainer": "trainers.drpo",
    "LenVMGRPOConfig": "trainers.grpo",
    "LenVMGRPOTrainer": "trainers.grpo",
    "LenVMPPOConfig": "trainers.ppo",
    "LenVMPPOTrainer": "trainers.ppo",
    "LengthCredit": "credit",
    "LengthCritic": "critic",
    "LengthGuide": "decoding",
    "LengthTarget": "decoding",
    "LengthTilt": "decoding",
    "LengthValueConfig": "model",
    "LengthValueModel": "model",
    "LengthValueTrainer": "pretraining.trainer",
    "RemainingLengthStream": "decoding",
    "SoftTarget": "decoding",
    "TaskSignal": "advantages",
    "compute_advantages": "advantages",
    "gae": "advantages",
    "gamma_from_horizon": "length",
    "length_advantages": "advantages",
    "logit_to_remaining": "length",
    "merge_update": "merging",
    "remaining_to_value": "length",
    "value_to_remaining": "length",
}

__all__ = [
    "Advantages",
    "AtLeast",
    "AtMost",
    "DRPOConfig",
    "DRPOTrainer",
    "LenVMGRPOConfig",
    "LenVMGRPOTrainer",
    "LenVMPPOConfig",
    "LenVMPPOTrainer",
    "LengthCredit",
    "LengthCritic",
    "LengthGuide",
    "LengthTarget",
    "LengthTilt",
    "LengthValueConfig",
    "LengthValueModel",
    "LengthValueTrainer",
    "RemainingLengthStream",
    "SoftTarget",
    "TaskSignal",
    "compute_advantages",
    "gae",
    "gamma_from_horizon",
    "length_advantages",
    "logit_to_remaining",
    "merge_update",
    "remaining_to_value",
    "value_to_remaining",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lenvm_rl' has no attribute {name!r}")
    return getattr(import_module(f"lenvm_rl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
