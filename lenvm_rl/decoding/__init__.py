"""Decoding under length control: a LenVM steers how long the completions of any causal LM become.

`LengthGuide` is the logits processor; `LengthTilt`, `SoftTarget`, `LengthTarget`, `AtMost` and `AtLeast` are what a
request may ask of it, None leaves a request alone. `RemainingLengthStream` predicts while generating. docs/decoding.md
tells it with numbers. Names are imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lenvm_rl.decoding.controls import (
        AtLeast,
        AtMost,
        Candidates,
        LengthControl,
        LengthTarget,
        LengthTilt,
        SoftTarget,
    )
    from lenvm_rl.decoding.guide import LengthGuide, guided_completions
    from lenvm_rl.decoding.official import OFFICIAL_MODES, official_control
    from lenvm_rl.decoding.remaining_stream import RemainingLengthStream
    from lenvm_rl.decoding.scorer import CachedCritic, CandidateScorer
    from lenvm_rl.decoding.vllm_processor import VLLMLengthProcessor, control_from_arguments

_HOME = {
    "OFFICIAL_MODES": "official",
    "AtLeast": "controls",
    "AtMost": "controls",
    "CachedCritic": "scorer",
    "CandidateScorer": "scorer",
    "Candidates": "controls",
    "LengthControl": "controls",
    "LengthGuide": "guide",
    "LengthTarget": "controls",
    "LengthTilt": "controls",
    "RemainingLengthStream": "remaining_stream",
    "SoftTarget": "controls",
    "VLLMLengthProcessor": "vllm_processor",
    "control_from_arguments": "vllm_processor",
    "guided_completions": "guide",
    "official_control": "official",
}

__all__ = [
    "OFFICIAL_MODES",
    "AtLeast",
    "AtMost",
    "CachedCritic",
    "CandidateScorer",
    "Candidates",
    "LengthControl",
    "LengthGuide",
    "LengthTarget",
    "LengthTilt",
    "RemainingLengthStream",
    "SoftTarget",
    "VLLMLengthProcessor",
    "control_from_arguments",
    "guided_completions",
    "official_control",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lenvm_rl.decoding' has no attribute {name!r}")
    return getattr(import_module(f"lenvm_rl.decoding.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
