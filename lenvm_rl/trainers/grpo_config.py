"""The settings of `LenVMGRPOTrainer`: TRL's, those of the length signal, and how groups are sampled and normalised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from trl import GRPOConfig

from lenvm_rl.advantages.compute import BACKEND_NAMES
from lenvm_rl.launch_check import avoid_compiled_collectives
from lenvm_rl.trainers.length_checks import check_length_settings
from lenvm_rl.trainers.length_settings import LengthSettings
from lenvm_rl.trainers.normalization import AdvantageNormalization


@dataclass
class LenVMGRPOConfig(LengthSettings, GRPOConfig):
    """`trl.GRPOConfig`, the settings of the length signal, and how groups are sampled and normalised.

    Raises:
        ValueError: a setting outside its range, or one under which TRL's loss averages token advantages away.
    """

    vllm_importance_sampling_mode: str = "token_truncate"
    """How TRL corrects for vLLM's own probabilities: here by each token's ratio, cut at
    `vllm_importance_sampling_clip_max`. TRL's default "sequence_mask" takes one ratio per completion, which strays
    further the longer it is, and drops those beyond the limit: long reasoning would teach nothing."""

    advantage_backend: str = "auto"
    """Implementation of the advantage computation: "auto" (the CUDA kernel where it runs, else "torch"), "torch",
    "triton", or "reference" (a slow float64 loop)."""

    advantage_normalization: str = "trl"
    """How group-centred rewards are scaled: "trl", as `scale_rewards` says; "group_centred_batch_std", by their
    standard deviation over the batch's completions (DLER eq. 3); "group_centred_token_std", over its tokens (DLER's
    code)."""

    dynamic_sampling: bool = False
    """Replace groups whose completions all earned the same by groups of further prompts. With a length signal, a group
    with a correct completion stays. Which prompts follow is seeded, and saved with checkpoints."""

    resample_correct_groups: bool = False
    """With `dynamic_sampling` and a length signal: replace groups whose completions are all correct, too. The length
    signal is then that of prompts that teach correctness as well, and more is generated for a batch."""

    max_resample_rounds: int = 4
    """Rounds of further generation for one batch. What is then still missing is filled up with groups without a signal,
    whose advantages are 0 and which take no part in the normalisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plugin = self.deepspeed_plugin
        if plugin is not None:
            avoid_compiled_collectives()  # here, since ZeRO-3 connects when the policy is loaded, before any trainer
        zero_stage = plugin.zero_stage if plugin is not None else None
        check_length_settings(self, longest=self.max_completion_length, zero_stage=zero_stage)
        self._check_sampling()
        if self.advantage_backend not in BACKEND_NAMES:
            raise ValueError(
                f"advantage_backend must be one of {', '.join(BACKEND_NAMES)}, got {self.advantage_backend!r}."
            )
        if self.length_coef != 0:
            self._check_ratios()

    def _check_ratios(self) -> None:
        """Refuse a loss that averages the advantages of a completion's tokens back to one number."""
        if self.loss_type == "luspo":
            raise ValueError(
                "loss_type='luspo' is made for one ratio per completion, which averages token advantages away: take "
                "another loss_type, 'dapo' for example."
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in ("cispo", "vespo"):
            raise ValueError(
                f"importance_sampling_level='sequence' with loss_type={self.loss_type!r} takes one ratio per "
                "completion, which averages token advantages back to one number: no token would learn that it wasted "
                "the budget. Set importance_sampling_level='token'."
            )

    def _check_sampling(self) -> None:
        names = get_args(AdvantageNormalization)
        if self.advantage_normalization not in names:
            raise ValueError(
                f"advantage_normalization must be one of {', '.join(names)}, got {self.advantage_normalization!r}."
            )
        if self.advantage_normalization != "trl" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                f"advantage_normalization={self.advantage_normalization!r} scales the sum of the rewards, but "
                f"multi_objective_aggregation={self.multi_objective_aggregation!r} scales each reward function by "
                "itself: choose one of the two."
            )
        if self.resample_correct_groups and not self.dynamic_sampling:
            raise ValueError("resample_correct_groups does nothing by itself: set dynamic_sampling=True, too.")
        if self.max_resample_rounds < 1:
            raise ValueError(f"max_resample_rounds must be at least 1, got {self.max_resample_rounds}.")
        assert self.steps_per_generation is not None and self.num_generations is not None  # TRL has just seen to it
        rows = self.per_device_train_batch_size * self.steps_per_generation
        if self.dynamic_sampling and rows % self.num_generations:
            raise ValueError(
                f"dynamic_sampling needs whole groups on every process, but the {rows} completions that one generates "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} times "
                f"steps_per_generation={self.steps_per_generation}) are no multiple of "
                f"num_generations={self.num_generations}: raise steps_per_generation or the batch size."
            )


def check_limits(reward_funcs: list[Any], max_completion_length: int) -> None:
    """Refuse a truncation limit beyond the length at which generation stops.

    Raises:
        ValueError: a reward function whose ``limit`` (a number, or a schedule of them) no completion can exceed.
    """
    for reward in reward_funcs:
        limit = getattr(getattr(reward, "reward_func", reward), "limit", None)
        limits = list(limit.values()) if isinstance(limit, Mapping) else [limit]
        for tokens in limits:
            if isinstance(tokens, int) and tokens > max_completion_length:
                raise ValueError(
                    f"The reward function '{reward.__name__}' has a limit of {tokens} tokens, but generation stops at "
                    f"max_completion_length={max_completion_length}: no completion can exceed the limit. Raise "
                    "max_completion_length, or lower the limit."
                )
