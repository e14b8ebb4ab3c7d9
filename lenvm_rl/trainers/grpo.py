"""GRPO with dense length advantages from a pretrained Length Value Model, on stock TRL.

1. One seam: after TRL has generated, scored and normalised, the sequence advantages (B,) are replaced by token
   advantages (B, T). TRL's loss takes either, and carries, shuffles and splits them with the batch (TRL 1.16).
2. Generation, vLLM, reference model, PEFT, logging, checkpoints and the loss types stay TRL's.
3. With ``length_coef=0`` the run is the one that `trl.GRPOTrainer` gives, bit for bit; a critic then only measures.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import deepspeed as hf_deepspeed
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.advantages import compute_advantages
from lenvm_rl.advantages.compute import BACKEND_NAMES
from lenvm_rl.assets import model_path
from lenvm_rl.credit import LengthCredit, gated_std, rescaled
from lenvm_rl.critic import Calibration, LengthCritic
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueConfig, LengthValueModel
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer
from lenvm_rl.trainers.finite_rewards import guard

EXPLAINED_VARIANCE_FLOOR = 0.3
"""Below this, on the first rollouts, the critic is reported as one that does not know this policy."""


@dataclass
class LenVMGRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` and the settings of the length signal.

    Raises:
        ValueError: a setting outside its range, or one under which TRL's loss averages token advantages away.
    """

    length_critic: str | None = None
    """Folder or hub name of the pretrained Length Value Model. None trains without length credit."""

    length_gamma: float | None = None
    """Discount of the critic. None takes the one stored with it; official checkpoints store none and require it."""

    length_coef: float = 1.0
    """Weight s of the length advantage (LenVM eq. 27). Positive shortens, negative lengthens, 0 is plain GRPO."""

    length_lambda: float = 1.0
    """lambda of the length advantage, in [0, 1]: 1 is return minus value, 0 the one-step residual (LenVM eq. 24)."""

    length_gate: str = "correct"
    """Completions that feel the length signal: "correct", "all", or "solve_rate" (correct, times the share of the group
    that is correct). The two that depend on the outcome make the critic a biased baseline of what they gate."""

    length_gate_reward: str | None = None
    """Name of the reward function that says what is correct. None is the first one."""

    length_gate_threshold: float = 1.0
    """Reward from which a completion counts as correct."""

    length_scale: str = "none"
    """"none", or "std": divide the length advantage by its standard deviation over the gated tokens of the batch."""

    length_token_budget: int = 16_384
    """Tokens of one critic forward, padding included. Lower it when the critic runs out of memory."""

    advantage_backend: str = "auto"
    """Implementation of the advantage computation: "auto" (the CUDA kernel where it runs, else "torch"), "torch",
    "triton", or "reference" (a slow float64 loop)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.length_credit()
        if self.length_gamma is not None:
            check_gamma(self.length_gamma, "length_gamma")
        if self.length_token_budget < 1:
            raise ValueError(f"length_token_budget must be at least 1, got {self.length_token_budget}.")
        if self.advantage_backend not in BACKEND_NAMES:
            raise ValueError(
                f"advantage_backend must be one of {', '.join(BACKEND_NAMES)}, got {self.advantage_backend!r}."
            )
        if self.length_coef == 0:
            return
        if self.loss_type == "luspo":
            raise ValueError(
                "loss_type='luspo' is made for one ratio per completion, which averages token advantages away. Take "
                "another loss_type, 'dapo' for example, or length_coef=0."
            )
        if self.importance_sampling_level == "sequence" and self.loss_type not in ("cispo", "vespo"):
            raise ValueError(
                f"importance_sampling_level='sequence' with loss_type={self.loss_type!r} takes one ratio per "
                "completion, which averages token advantages back to one number: no token would learn that it wasted "
                "the budget. Set importance_sampling_level='token', or length_coef=0."
            )

    def length_credit(self) -> LengthCredit:
        return LengthCredit(
            coef=self.length_coef,
            lam=self.length_lambda,
            gate=self.length_gate,  # type: ignore[arg-type]
            threshold=self.length_gate_threshold,
            scale=self.length_scale,  # type: ignore[arg-type]
        )


class LenVMGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose advantages also say which tokens wasted the budget.

    Args:
        model, reward_funcs, args, *rest, **kwargs: as for `trl.GRPOTrainer`, with a `LenVMGRPOConfig` as ``args``.
        length_critic: a loaded critic, instead of the path in ``args.length_critic``.

    Raises:
        ValueError: a critic of another tokenizer, a gamma that contradicts the critic's, no critic although
            ``length_coef`` is not 0, an unknown ``length_gate_reward``; during training a reward or a critic value that
            is not finite.

    Logs, besides TRL's metrics (tokens count the policy's own tokens, EOS included): ``length/coef``,
    ``length/gate_rate``, ``length/correct_rate``, ``length/correct_tokens``, ``length/wrong_tokens``,
    ``length/tokens_per_correct``; with a critic also ``length/advantage_std`` (gated tokens),
    ``length/predicted_tokens`` and ``length/true_tokens`` (at the prompt, finished completions),
    ``length/explained_variance`` and ``length/relative_error``.
    """

    _tag_names = ["trl", "grpo", "lenvm"]  # noqa: RUF012 (TRL's own declaration)
    _name = "LenVM-GRPO"

    args: LenVMGRPOConfig
    model: Any  # never None once the trainer is built
    num_generations: int
    num_generations_eval: int

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: LenVMGRPOConfig | None = None,
        *rest: Any,
        length_critic: LengthValueModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LenVMGRPOConfig):
            raise ValueError(f"args must be a LenVMGRPOConfig, got {type(args).__name__}.")
        if length_critic is None and args.length_critic is None and args.length_coef != 0:
            raise ValueError(
                "length_critic is not set: name the folder of a pretrained Length Value Model "
                "(recipes/pretrain_lenvm.py makes one from the policy's rollouts), or set length_coef=0 for plain GRPO."
            )
        if reward_funcs is not None:
            reward_funcs = [guard(f) for f in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])]
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.credit = self.args.length_credit()
        self._gate_column = self._find_gate_reward()
        self.length_critic = self._prepare_critic(length_critic)
        self._critic_reported = False

    def _find_gate_reward(self) -> int:
        name = self.args.length_gate_reward
        if name is None:
            return 0
        if name not in self.reward_func_names:
            raise ValueError(
                f"length_gate_reward={name!r} is not one of the reward functions: {', '.join(self.reward_func_names)}."
            )
        return self.reward_func_names.index(name)

    def _prepare_critic(self, model: LengthValueModel | None) -> LengthCritic | None:
        path = self.args.length_critic
        if model is None:
            if path is None:
                return None
            with _no_zero3_init():
                model = LengthValueModel.from_pretrained(model_path(path), gamma=self.args.length_gamma)
        elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            raise ValueError(
                "length_critic was loaded while ZeRO-3 shards every model: load it before the LenVMGRPOConfig is made, "
                "or set length_critic in the configuration to its path."
            )
        elif self.args.length_gamma not in (None, model.config.gamma):
            raise ValueError(
                f"length_gamma={self.args.length_gamma} contradicts the critic's own {model.config.gamma}: its values "
                "mean nothing under another discount. Leave length_gamma unset."
            )
        check_same_tokenizer(self._tokenizer, model.config, policy_name=self.model.config._name_or_path)
        self._compare_sampling(model.config)
        return LengthCritic(
            model.to(self.accelerator.device),
            self.accelerator,
            gamma=check_gamma(model.config.gamma),
            token_budget=self.args.length_token_budget,
        )

    def _compare_sampling(self, critic: LengthValueConfig) -> None:
        """Warn where the rollouts are sampled otherwise than those that the critic was pretrained on."""
        ours = {
            "temperature": (self.args.temperature, critic.temperature),
            "top_p": (self.args.top_p, critic.top_p),
            "max_completion_length": (self.args.max_completion_length, critic.max_tokens),
        }
        for name, (value, pretrained) in ours.items():
            if pretrained is not None and value != pretrained and self.accelerator.is_main_process:
                warnings.warn(
                    f"{name} is {value}, but the length critic was pretrained on rollouts with {pretrained}: its "
                    "values describe those. Watch length/explained_variance, or use the same setting.",
                    stacklevel=2,
                )

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # (world * B, functions), gathered. Gates are computed on whole groups, which may lie across processes.
        groups = self.num_generations if self._mode == "train" else self.num_generations_eval
        correctness = rewards[:, self._gate_column]
        local = slice(
            len(prompts) * self.accelerator.process_index, len(prompts) * (self.accelerator.process_index + 1)
        )
        self._correct = (correctness >= self.credit.threshold)[local]
        self._gate = self.credit.gates(correctness, groups)[local]
        self._generated = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._mode = "train" if self.model.training else "eval"
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"].bool()
        if "tool_mask" in batch:
            mask &= batch["tool_mask"].bool()
        metrics = self._length_metrics(mask)
        if self.length_critic is not None:
            finished = self._finished(batch)
            values, bootstrap = self.length_critic.score(
                batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], finished
            )
            calibration = self.length_critic.calibration(values, mask, finished)
            self._report_critic(calibration)
            advantages, std = self._advantages(
                self.length_critic.gamma, values, bootstrap, mask, batch["advantages"], "tool_mask" not in batch
            )
            if self.credit.coef != 0:
                batch["advantages"] = advantages
            metrics |= {
                "advantage_std": std.item(),
                "explained_variance": calibration.explained_variance,
                "predicted_tokens": calibration.predicted_tokens,
                "true_tokens": calibration.true_tokens,
                "relative_error": calibration.relative_error,
            }
        for name, value in metrics.items():
            self._metrics[self._mode][f"length/{name}"].append(value)
        return batch

    def _finished(self, batch: dict[str, Any]) -> Tensor:
        """(B,) bool: the completion's last token is one of the model's end tokens."""
        last = (batch["completion_mask"].sum(1, keepdim=True) - 1).clamp(min=0)
        ends = torch.tensor(self.eos_token_ids, device=last.device)
        return torch.isin(batch["completion_ids"].gather(1, last).squeeze(1), ends)

    def _advantages(
        self, gamma: float, values: Tensor, bootstrap: Tensor, mask: Tensor, task: Tensor, right_padded: bool
    ) -> tuple[Tensor, Tensor]:
        """Token advantages, and the standard deviation of the length part over the gated tokens of all processes."""
        advantages = compute_advantages(
            values,
            bootstrap,
            mask,
            task,
            gamma=gamma,
            lam=self.credit.lam,
            coef=self.credit.coef,
            gate=self._gate,
            right_padded=right_padded,
            backend=self.args.advantage_backend,
        )
        if (advantages.stats.nonfinite > 0).any():
            row = int(advantages.stats.nonfinite.argmax())
            raise ValueError(
                f"The length critic gave {int(advantages.stats.nonfinite[row])} values that are not finite for "
                f"completion {row} of this process's batch. Its weights are damaged, or its dtype overflows: load it "
                "in float32 or bfloat16, or pretrain it again."
            )
        std = gated_std(advantages.stats, self._gate, self.accelerator.reduce)
        if self.credit.scale == "std":
            return rescaled(advantages, mask, self.credit.coef * self._gate / std), std
        return advantages.total, std

    def _length_metrics(self, mask: Tensor) -> dict[str, float]:
        tokens, correct = mask.sum(1), self._correct.double()
        # mask_truncated_completions empties the mask of what was cut, but its tokens were generated all the same
        tokens = torch.where(tokens == 0, self._generated, tokens).double()
        sums = torch.stack(
            [
                torch.ones_like(tokens).sum(),
                tokens.sum(),
                correct.sum(),
                (tokens * correct).sum(),
                self._gate.double().sum(),
            ]
        )
        completions, total, right, right_tokens, gate = self.accelerator.reduce(sums).tolist()
        return {
            "coef": self.credit.coef,
            "gate_rate": gate / completions,
            "correct_rate": right / completions,
            "correct_tokens": _ratio(right_tokens, right),
            "wrong_tokens": _ratio(total - right_tokens, completions - right),
            "tokens_per_correct": _ratio(total, right),
        }

    def _report_critic(self, calibration: Calibration) -> None:
        """On the first rollouts, say how well the critic knows this policy."""
        if self._critic_reported or calibration.completions == 0:
            return
        self._critic_reported = True
        self.accelerator.print(
            f"Length critic on this policy's first {calibration.completions} finished rollouts: explained variance "
            f"{calibration.explained_variance:.3f}, predicts {calibration.predicted_tokens:.1f} tokens at the prompt "
            f"where {calibration.true_tokens:.1f} followed (bias {calibration.bias_tokens:+.1f})."
        )
        # nan, when all remainders are equal, is no evidence against the critic
        if calibration.explained_variance < EXPLAINED_VARIANCE_FLOOR and self.accelerator.is_main_process:
            warnings.warn(
                f"The length critic explains {calibration.explained_variance:.2f} of the variance of this policy's "
                "lengths: it was made for another policy, other sampling settings or other prompts, and its advantages "
                "will be mostly noise. Pretrain one on this policy's rollouts.",
                stacklevel=2,
            )


def _ratio(amount: float, count: float) -> float:
    return amount / count if count else float("nan")  # TRL leaves nan out of its averages


@contextmanager
def _no_zero3_init() -> Iterator[None]:
    """Load a plain replica although ZeRO-3 would have `from_pretrained` shard it.

    A frozen critic is small beside policy, gradients and optimizer; as a replica its forwards are not collective and
    its dtype is its own. There is no public switch (transformers 5.23): the reference to its settings is put aside.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference
