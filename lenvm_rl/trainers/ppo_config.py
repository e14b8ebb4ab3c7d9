"""The settings of `LenVMPPOTrainer`: those of GRPO with length credit, and those of the task critic."""

import math
import os
from dataclasses import dataclass
from typing import get_args

from lenvm_rl.task_credit import KLEstimator
from lenvm_rl.trainers.grpo_config import LenVMGRPOConfig
from lenvm_rl.trainers.length_settings import SHARED
from lenvm_rl.trainers.side_model import check_settings


@dataclass
class LenVMPPOConfig(LenVMGRPOConfig):
    """`LenVMGRPOConfig` with a learned task critic in the place of groups.

    PPO's epochs over a batch of rollouts are `num_iterations`, its minibatches `steps_per_generation` over
    `gradient_accumulation_steps`, its clip `epsilon` and `epsilon_high`, its entropy bonus `entropy_coef`, its KL loss
    `beta`. The tokens of one scoring forward are `length_token_budget` for both critics.

    Raises:
        ValueError: a setting outside its range, or one that belongs to groups.
    """

    num_generations: int | None = 1
    """Completions for each prompt. A critic needs no groups, but more are allowed."""

    value_model: str | None = None
    """The task critic: None starts from the policy's weights, a path from a saved critic, a reward model or a language
    model of the same tokenizer, "shared" is a head on the policy's hidden states."""

    value_learning_rate: float = 1e-5
    """Of the task critic's own AdamW. The embedded models want 1e-3."""

    value_lr_schedule: str = "constant"
    """"constant", or "linear": to 0 at the end of the run."""

    value_lr_warmup_steps: int = 0
    """Steps over which the task critic's learning rate first rises."""

    value_weight_decay: float = 0.0
    """Of the task critic's AdamW."""

    value_max_grad_norm: float = 1.0
    """Norm that the task critic's gradient is clipped to; 0 clips nothing."""

    value_clip: float | None = 0.2
    """How far a value may move from that of the rollout before its error stops counting; None does not clip."""

    value_warmup_steps: int = 0
    """Optimizer steps at the start in which the policy is frozen and only the task critic learns, from Monte-Carlo
    returns and without a clip. They are part of `max_steps`."""

    value_backbone_coef: float = 0.0
    """With `value_model="shared"`: weight of the value loss in the policy's own loss. 0 stops the gradient."""

    value_patience: int = 20
    """Batches of rollouts in a row with an explained variance of the task critic below 0 after which the run says so.
    0 never does."""

    gamma: float = 1.0
    """Discount of the task rewards, in [0, 1]."""

    lam: float = 0.95
    """GAE lambda of the policy's task advantages, in [0, 1]."""

    lam_critic: float = 1.0
    """GAE lambda of the task critic's targets, in [0, 1]: 1 is the Monte-Carlo return (decoupled GAE)."""

    length_adaptive_lambda: float | None = None
    """alpha of VAPO's lambda = 1 - 1 / (alpha * tokens), at least 0, instead of `lam`; VAPO has 0.05. None is off."""

    whiten_advantages: bool = True
    """Task advantages with mean 0 and variance 1 over all tokens of the batch, on all processes. The length advantage
    is added after it, on its own scale."""

    kl_in_reward: bool = False
    """`beta` is taken from the reward of every token instead of being a term of the loss."""

    kl_estimator: str = "k1"
    """With `kl_in_reward`: "k1" is log p - log q, "k3" is never negative and has less variance."""

    def __post_init__(self) -> None:
        with_groups = self.num_generations
        given_for_evaluation = self.num_generations_eval
        if with_groups == 1:
            # TRL refuses groups of one (1.16); a group as large as the batch passes whatever else it checks of them
            self._pass_as_one_group()
        super().__post_init__()
        if with_groups == 1:
            self.num_generations, self.num_generations_eval = 1, given_for_evaluation
        self._check_numbers()
        self._check_groups()
        self._check_shaping()
        self._check_loss()
        check_settings(
            "task critic (value_learning_rate, value_lr_schedule)",
            learning_rate=self.value_learning_rate,
            schedule=self.value_lr_schedule,
            warmup_steps=self.value_lr_warmup_steps,
            max_grad_norm=self.value_max_grad_norm,
        )

    def _pass_as_one_group(self) -> None:
        rows = self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)
        # devices are not set up before TRL's own checks, so the launcher is asked
        batch = self.generation_batch_size or (rows if rows > 1 else int(os.environ.get("WORLD_SIZE", "1")))
        if batch < 2:
            raise ValueError(
                "A batch of rollouts of one completion has nothing to be compared with: raise "
                "per_device_train_batch_size or steps_per_generation."
            )
        self.num_generations = batch
        self.num_generations_eval = self.num_generations_eval or 1

    def _check_numbers(self) -> None:
        for name in ("gamma", "lam", "lam_critic"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        alpha, clip = self.length_adaptive_lambda, self.value_clip
        ranges = {
            "length_adaptive_lambda": alpha is None or 0.0 < alpha < math.inf,
            "value_clip": clip is None or 0.0 < clip < math.inf,
            "value_weight_decay": 0.0 <= self.value_weight_decay < math.inf,
            "value_backbone_coef": 0.0 <= self.value_backbone_coef < math.inf,
            "value_warmup_steps": self.value_warmup_steps >= 0,
            "value_patience": self.value_patience >= 0,
        }
        for name, fits in ranges.items():
            if not fits:
                raise ValueError(
                    f"{name}={getattr(self, name)} is out of range: a clip and an alpha are positive, or None for "
                    "none; weights and numbers of steps are 0 or more."
                )
        if self.value_backbone_coef and self.value_model != SHARED:
            raise ValueError(
                f"value_backbone_coef={self.value_backbone_coef} sends the value loss into the policy, but the task "
                "critic is a model of its own: set value_model='shared', or leave it at 0."
            )
        if self.value_warmup_steps and self.value_backbone_coef:
            raise ValueError(
                "value_warmup_steps freezes the policy, and value_backbone_coef trains it: choose one of the two."
            )

    def _check_groups(self) -> None:
        if self.advantage_normalization != "trl" or self.dynamic_sampling:
            raise ValueError(
                "advantage_normalization and dynamic_sampling compare the completions of a group, which a task critic "
                "makes unnecessary: leave them out, or use GRPO (recipes/grpo_lenvm.py)."
            )

    def _check_shaping(self) -> None:
        plain = {"length_scale": "none", "length_clip": None, "length_resolution": "token"}
        set_otherwise = [name for name, value in plain.items() if getattr(self, name) != value]
        if self.length_gate == "solve_rate":
            set_otherwise.append("length_gate")
        if self.length_mode == "shaping" and set_otherwise:
            raise ValueError(
                f"length_mode='shaping' puts the length values into the rewards of all completions, where "
                f"{', '.join(set_otherwise)} would do nothing: leave that out."
            )
        if self.length_shaping_discounted:
            raise ValueError(
                "length_shaping_discounted belongs to GRPO, whose objective has no discount. PPO shapes under its own "
                "gamma: set that, and leave this out."
            )

    def _check_loss(self) -> None:
        self._check_ratios()  # the task critic's advantages are of tokens, too
        if self.kl_estimator not in get_args(KLEstimator):
            raise ValueError(
                f"kl_estimator must be one of {', '.join(get_args(KLEstimator))}, got {self.kl_estimator!r}."
            )
        if self.kl_in_reward and self.beta == 0.0:
            raise ValueError("kl_in_reward needs a weight: set beta, 0.01 for example.")
