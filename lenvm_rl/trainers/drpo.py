"""DRPO: the length reward weighs correct completions among themselves only (arXiv 2510.04474).

Where a length penalty enters GRPO's reward, a correct but long completion can end up below the mean of its group and is
unlearned. DRPO has no advantage. For the completions o of a prompt, S+ the correct and S- the wrong ones,

    s(o) = mean token log-probability of o
    w(o) = exp(r(o) / lambda) / mean_{S+} exp(r / lambda)     with r(o) = 1 - |o| / C, C the longest possible completion
    J    = mean_{S+} w(o) s(o)  -  tau log mean_{S-} exp(s(o) / tau)              maximised, mean over prompts
    KL(pi_old || pi) <= delta, as a penalty:                loss += stopgrad(max(0, beta (KL - delta))) KL

1. Every correct completion is pushed up, short ones more; the wrong ones down, the likeliest first.
2. A prompt without correct or without wrong completions adds nothing, but counts in the mean.
3. Formulas from the authors' released code (Optimization-AI/DRPO), which is not copied; KL is the mean of
   log pi_old - log pi over the tokens of the rollouts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl import GRPOConfig

from lenvm_rl.launch_check import avoid_compiled_collectives, check_launch
from lenvm_rl.trainers.finite_rewards import guard
from lenvm_rl.trainers.resume import ResumableGRPOTrainer


class DRPOLoss(NamedTuple):
    """The loss and what it is made of; 0-dim tensors, all but the loss without gradient."""

    loss: Tensor
    objective: Tensor
    """Mean of J over the groups of this process."""
    kl: Tensor
    """Of all processes."""
    skipped_groups: Tensor
    """Share of this process's groups without correct or without wrong completions."""


def drpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    mask: Tensor,
    correct: Tensor,
    scored: Tensor,
    *,
    group_size: int,
    max_tokens: int,
    lam: float = 0.1,
    tau: float = 10.0,
    kl_limit: float = 1e-4,
    kl_penalty: float = 1e3,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    processes: int = 1,
) -> DRPOLoss:
    """DRPO's loss of whole groups.

    Args:
        logps: (B, T) log-probabilities of the completion tokens under the policy, with gradient.
        old_logps: (B, T) the same under the policy that sampled them.
        mask: (B, T) bool, the policy's own tokens.
        correct: (B,) bool.
        scored: (B,) bool; completions that nobody could judge are neither correct nor wrong.
        group_size: completions per prompt; groups lie one after the other.
        max_tokens: C, the longest possible completion.
        lam: lambda, from which difference in length on correct completions differ in weight. inf weighs them alike.
        tau: temperature of the wrong ones: at 0 the likeliest alone counts, at inf all alike.
        kl_limit, kl_penalty: delta and beta of the constraint.
        reduce: adds up a (2,) tensor over processes.
        processes: whose gradients are averaged afterwards, so that a sum over them must be scaled by their number.
    """
    mask = mask.to(logps.dtype)
    tokens = mask.sum(1)
    scores = ((logps * mask).sum(1) / tokens.clamp(min=1)).view(-1, group_size)
    judged = (scored & (tokens > 0)).view(-1, group_size)
    right, wrong = correct.view(-1, group_size) & judged, ~correct.view(-1, group_size) & judged

    usable = right.any(1) & wrong.any(1)
    scores, right, wrong = scores[usable], right[usable], wrong[usable]
    brevity = (1 - tokens / max_tokens).view(-1, group_size)[usable]
    weights = (brevity / lam).masked_fill(~right, -torch.inf).softmax(dim=1)  # w divided by the number of correct ones
    likeliest = (scores / tau).masked_fill(~wrong, -torch.inf).logsumexp(dim=1) - wrong.to(scores.dtype).sum(1).log()
    objective = ((weights * scores).sum(1) - tau * likeliest).sum() / len(usable)

    drift = ((old_logps - logps) * mask).sum()
    total, count = reduce(torch.stack([drift.detach(), tokens.sum()])).unbind()
    kl = total / count.clamp(min=1)
    pressure = (kl_penalty * (kl - kl_limit)).clamp(min=0)
    loss = -objective + pressure * drift * processes / count.clamp(min=1)
    return DRPOLoss(loss, objective.detach(), kl, 1 - usable.float().mean())


@dataclass
class DRPOConfig(GRPOConfig):
    """`trl.GRPOConfig` and the constants of DRPO. Settings of GRPO's loss and advantages have no effect.

    Raises:
        ValueError: a constant outside its range, groups that do not fit whole into a step of a process, a penalty to a
            reference model.
    """

    drpo_lambda: float = 0.1
    """lambda: the smaller, the more short correct completions outweigh long ones. Published 0.1, also 0.2 and 0.5."""

    drpo_tau: float = 10.0
    """tau: the smaller, the more the likeliest wrong completion counts alone."""

    drpo_kl_limit: float = 1e-4
    """delta: divergence from the policy that sampled the rollouts, from which it is penalised."""

    drpo_kl_penalty: float = 1e3
    """beta: strength of that penalty. It can only act where a batch is used for several steps."""

    drpo_threshold: float = 1.0
    """Reward from which a completion counts as correct."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepspeed_plugin is not None:
            avoid_compiled_collectives()
        for name in ("drpo_lambda", "drpo_tau"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in ("drpo_kl_limit", "drpo_kl_penalty"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}.")
        if self.beta != 0:
            raise ValueError(
                f"beta={self.beta} asks for a penalty to a reference model, which DRPO does not have: leave it at 0. "
                "The constraint to the sampling policy is drpo_kl_limit and drpo_kl_penalty."
            )
        sizes = {"per_device_train_batch_size": (self.per_device_train_batch_size, self.num_generations)}
        if self.eval_strategy != "no":
            group = self.num_generations_eval or self.num_generations
            sizes["per_device_eval_batch_size"] = self.per_device_eval_batch_size, group
        for name, (rows, group_size) in sizes.items():
            if group_size is not None and rows % group_size:
                raise ValueError(
                    f"{name}={rows} is no multiple of the {group_size} completions of a group, but DRPO compares the "
                    "completions of a prompt with each other in every step: raise it, and lower "
                    "gradient_accumulation_steps for the same batch."
                )


class DRPOTrainer(ResumableGRPOTrainer):
    """`trl.GRPOTrainer` with DRPO's objective in place of GRPO's loss.

    Args:
        model, reward_funcs, args, *rest, **kwargs: as for `trl.GRPOTrainer`, with a `DRPOConfig` as ``args`` and one
            reward function, which says what is correct. Further ones of weight 0 are logged.

    Raises:
        ValueError: several reward functions of weight other than 0; during training a reward that is not finite.

    Logs ``drpo/objective``, ``drpo/kl`` and ``drpo/skipped_groups``.
    """

    _tag_names = ["trl", "grpo", "drpo"]  # noqa: RUF012 (TRL's own declaration)
    _name = "DRPO"

    args: DRPOConfig
    model: Any  # never None once the trainer is built
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: DRPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        if not isinstance(args, DRPOConfig):
            raise ValueError(f"args must be a DRPOConfig, got {type(args).__name__}.")
        if reward_funcs is not None:
            reward_funcs = [guard(f) for f in (reward_funcs if isinstance(reward_funcs, list) else [reward_funcs])]
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        check_launch(self.accelerator)
        weighed = self.reward_weights.nonzero().flatten().tolist()
        if len(weighed) != 1:
            raise ValueError(
                f"DRPO takes one reward function, which says what is correct, but {len(weighed)} of "
                f"{', '.join(self.reward_func_names)} have a weight: give the others reward_weights 0. Its length "
                "reward is part of the objective."
            )
        self._correctness_column = weighed[0]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        rows, process = len(prompts), self.accelerator.process_index
        self._own_rewards = rewards[rows * process : rows * (process + 1), self._correctness_column]
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        # TRL permutes and splits rows: with a group as a row, groups stay whole
        size = self.num_generations if self.model.training else self.num_generations_eval
        batch = super()._generate_and_score_completions(inputs) | {"correctness": self._own_rewards}
        return {name: tensor if tensor.ndim == 0 else tensor.unflatten(0, (-1, size)) for name, tensor in batch.items()}

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        mode = "train" if self.model.training else "eval"
        batch = {name: tensor if tensor.ndim == 0 else tensor.flatten(0, 1) for name, tensor in inputs.items()}
        mask = batch["completion_mask"] * batch.get("tool_mask", 1)
        logps, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].size(1),
            compute_entropy=True,
        )
        result = drpo_loss(
            logps,
            batch.get("old_per_token_logps", logps.detach()),
            mask,
            batch["correctness"] >= self.args.drpo_threshold,
            ~batch["correctness"].isnan(),
            group_size=inputs["completion_ids"].size(1),
            max_tokens=self.max_completion_length,
            lam=self.args.drpo_lambda,
            tau=self.args.drpo_tau,
            kl_limit=self.args.drpo_kl_limit,
            kl_penalty=self.args.drpo_kl_penalty,
            reduce=self._sum,
            processes=self.accelerator.num_processes,
        )
        with torch.no_grad():
            sums = torch.stack(
                [result.objective, result.skipped_groups, (entropies * mask).sum(), mask.sum().to(logps.dtype)]
            )
            objective, skipped, entropy, tokens = self._sum(sums).tolist()
        for name, value in {
            "drpo/objective": objective / self.accelerator.num_processes,
            "drpo/skipped_groups": skipped / self.accelerator.num_processes,
            "drpo/kl": result.kl.item(),
            "entropy": entropy / max(tokens, 1.0),
        }.items():
            self._metrics[mode][name].append(value)
        return result.loss / (self.current_gradient_accumulation_steps if mode == "train" else 1)

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")
