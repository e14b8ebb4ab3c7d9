"""What a critic starts from: a language model, which gets a head and the provenance, or a critic to go on with."""

from pathlib import Path

from datasets import Dataset
from transformers import AutoConfig, PreTrainedTokenizerBase

from lenvm_rl.model import LengthValueConfig, LengthValueModel
from lenvm_rl.pretraining.rollouts import choose_gamma
from lenvm_rl.sampling import SamplingSettings

__all__ = ["initial_critic"]


def initial_critic(
    path: str | Path,
    rollouts: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase,
    generator: str,
    settings: SamplingSettings,
    gamma: float | None = None,
) -> LengthValueModel:
    """A critic to train on rollouts, in float32.

    Args:
        path: folder or hub name of a causal language model, or of a critic, which keeps its own gamma and provenance.
        rollouts: training rollouts, from whose lengths gamma is chosen.
        tokenizer: of the generator; the critic remembers its fingerprint.
        generator: name that the critic remembers.
        settings: how the rollouts were sampled.
        gamma: discount, instead of the chosen one.

    Raises:
        ValueError: a gamma that contradicts that of the critic to go on with, or lies outside (0, 1).
    """
    if isinstance(AutoConfig.from_pretrained(path), LengthValueConfig):
        return LengthValueModel.from_pretrained(path, gamma=gamma, dtype="float32")
    return LengthValueModel.from_backbone(
        path,
        choose_gamma(rollouts, settings.max_new_tokens, override=gamma),
        tokenizer=tokenizer,
        generator=generator,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_new_tokens,
        dtype="float32",
    )
