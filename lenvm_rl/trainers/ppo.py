"""PPO with a learned task critic, and with the dense length credit of LenVM-GRPO beside it.

1. TRL has no PPO any more (1.16). Rollouts, rewards, buffering (`num_iterations` are PPO's epochs), the clipped ratio,
   KL, entropy, vLLM, PEFT and logging are those of its GRPO trainer; the advantages are not: generalised advantage
   estimation over tokens with a task critic takes the place of groups, so that one completion per prompt is enough.
2. Both critics enter one computation: task rewards, task values and length values give the advantages of both sides.
   Coefficient, gates, controller, shaping and targets of the length signal are those of `grpo.py`.
3. The task critic (`task_critic.py`) learns in the steps of the policy, from the same minibatches, with an optimizer of
   its own (`side_model.py`); returns and old values travel through TRL's buffer as further columns.
4. Task advantages are whitened over the tokens of all processes before the length advantage is added.
"""

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lenvm_rl.advantages import Advantages, TaskSignal, gae, whiten
from lenvm_rl.advantages.statistics import row_moments
from lenvm_rl.assets import model_path
from lenvm_rl.model import LengthValueModel
from lenvm_rl.task_credit import (
    fit_of,
    kl_penalties,
    length_adaptive_lambda,
    terminal_rewards,
    value_loss,
)
from lenvm_rl.trainers.group_sampling import Rollouts
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer, own_tokens
from lenvm_rl.trainers.hidden_states import fresh_head
from lenvm_rl.trainers.length_settings import SHARED
from lenvm_rl.trainers.normalization import combined_rewards
from lenvm_rl.trainers.ppo_config import LenVMPPOConfig
from lenvm_rl.trainers.resume import SavedPart, Stateful
from lenvm_rl.trainers.side_model import SideModel
from lenvm_rl.trainers.task_critic import (
    SeparateTaskCritic,
    SharedTaskCritic,
    TaskCritic,
    critic_from_policy,
    load_critic,
    save_critic,
    taken_over,
)

__all__ = ["LenVMPPOConfig", "LenVMPPOTrainer"]

VALUE_FOLDER = "value_model"
"""Where `save_model` leaves the task critic, inside the policy's folder."""

logger = logging.getLogger(__name__)


class LenVMPPOTrainer(LenVMGRPOTrainer):
    """`LenVMGRPOTrainer` with a task critic in the place of groups.

    Args:
        model, reward_funcs, args, *rest, **kwargs: as for `trl.GRPOTrainer`, with a `LenVMPPOConfig` as ``args``.
        length_critic: a loaded length critic, instead of the path in ``args.length_critic``.
        value_model: a loaded token classifier with one label, instead of ``args.value_model``; it is taken over.

    Raises:
        ValueError: as `LenVMGRPOTrainer`; a task critic of another tokenizer or architecture; during training a value
            or a gradient of the task critic that is not finite.

    Logs besides: ``value/loss``, ``value/clip_fraction``, ``value/grad_norm``, ``value/learning_rate``,
    ``value/explained_variance``, ``value/mean``, ``value/return_mean``, ``value/return_std``, ``value/bias``,
    ``value/prompt_error``, ``ppo/approx_kl``, ``ppo/advantage_std`` (of the task, before whitening), ``ppo/lambda``,
    with ``kl_in_reward`` also ``ppo/kl``. `docs/metrics.md` explains each.

    `save_model` writes the task critic into ``value_model`` inside the policy's folder, from where
    ``value_model=...`` starts another run.
    """

    _tag_names = ["trl", "ppo", "lenvm"]  # noqa: RUF012 (TRL's own declaration)
    _name = "LenVM-PPO"
    _shapes_rewards = True

    args: LenVMPPOConfig
    optimizer: Any  # never None in training

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: LenVMPPOConfig | None = None,
        *rest: Any,
        length_critic: LengthValueModel | None = None,
        value_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LenVMPPOConfig):
            raise ValueError(f"args must be a LenVMPPOConfig, got {type(args).__name__}.")
        super().__init__(model, reward_funcs, args, *rest, length_critic=length_critic, **kwargs)
        with torch.random.fork_rng(devices=[]):  # the first completions are those of GRPO with the same seed
            self.task_critic = self._prepare_task_critic(value_model)
        self.value_watch = ValueWatch(self.args.value_patience)
        self._update = _Update()
        self._logps: Tensor | None = None

    def _prepare_task_critic(self, model: PreTrainedModel | None) -> TaskCritic:
        budget, policy = self.args.length_token_budget, self.accelerator.unwrap_model(self.model)
        if model is None and self.args.value_model == SHARED:
            head = fresh_head(policy.config.get_text_config().hidden_size)
            return SharedTaskCritic(self._side_model(head), self.hidden_states)
        if model is None and self.args.value_model is None:
            model = critic_from_policy(policy)
        elif model is None:
            model = load_critic(model_path(str(self.args.value_model)), tokenizer=self._tokenizer)
        else:
            model = taken_over(model, self._tokenizer)
        return SeparateTaskCritic(self._side_model(model), budget)

    def _side_model(self, model: Any) -> SideModel:
        return SideModel(
            model,
            self.accelerator,
            learning_rate=self.args.value_learning_rate,
            weight_decay=self.args.value_weight_decay,
            max_grad_norm=self.args.value_max_grad_norm,
            schedule=self.args.value_lr_schedule,
            warmup_steps=self.args.value_lr_warmup_steps,
            gradient_checkpointing=self.args.gradient_checkpointing and isinstance(model, PreTrainedModel),
            replicate=not isinstance(model, PreTrainedModel),
            name="task critic",
        )

    def stateful_parts(self) -> dict[str, Stateful]:
        return super().stateful_parts() | {"value_watch": self.value_watch}

    def saved_parts(self) -> dict[str, SavedPart]:
        return super().saved_parts() | {"task_critic": self.task_critic.side}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # checkpoints hold it with its optimizer
            folder = Path(str(output_dir or self.args.output_dir)) / VALUE_FOLDER
            save_critic(self.task_critic, folder, self._tokenizer)

    # Rollouts

    @property
    def _warming_up(self) -> bool:
        return self.state.global_step < self.args.value_warmup_steps

    def _assign_credit(self, rollouts: Rollouts) -> None:
        if self.length_critic is not None:
            super()._assign_credit(rollouts)
            return
        rollouts.batch.pop("length_target", None)
        mask = own_tokens(rollouts.batch)
        task = self._task_signal(rollouts, mask)
        advantages, returns = self._task_advantages(task, mask, rollouts.batch)
        self._use_task_advantages(rollouts, advantages, returns, torch.zeros(()))

    def _task_signal(self, rollouts: Rollouts, mask: Tensor) -> TaskSignal:
        batch = rollouts.batch
        rewards = combined_rewards(rollouts.rewards, self.reward_weights)[self._own(rollouts)]
        self._scored_tokens = mask & ~rewards.isnan()[:, None]  # a completion that no function scored teaches nothing
        values = self.task_critic.score(batch)
        if not values[mask].isfinite().all():
            row = int((~values.isfinite() & mask).any(1).nonzero()[0])
            raise ValueError(
                f"The task critic gave a value that is not finite for completion {row} of this process's batch: it "
                f"diverged. Lower value_learning_rate ({self.args.value_learning_rate:g}), or start from a sound one."
            )
        self._log_prompt_error(values, rewards, mask)
        token_rewards = terminal_rewards(rewards.nan_to_num(nan=0.0), mask)
        if self.args.kl_in_reward:
            penalties = kl_penalties(self._old_logps(batch), batch["ref_per_token_logps"], mask, self.args.kl_estimator)
            total, tokens = self._sum(torch.stack([penalties.sum(), mask.sum()])).tolist()
            self._log("ppo/kl", total / max(tokens, 1))
            token_rewards = token_rewards - self.args.beta * penalties
        lam: float | Tensor = self.args.lam
        if self.args.length_adaptive_lambda is not None:
            lam = length_adaptive_lambda(mask.sum(1), self.args.length_adaptive_lambda)
        return TaskSignal(
            rewards=token_rewards,
            values=values,
            bootstrap=torch.zeros_like(values[:, 0]),
            gamma=self.args.gamma,
            lam=lam,
            potential_coef=self.credit.coef if self.credit.mode == "shaping" else 0.0,
        )

    def _old_logps(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities under the policy that sampled, which TRL computes where its loss needs them."""
        if "old_per_token_logps" not in batch:
            with torch.no_grad():
                batch["old_per_token_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                    torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                    batch["completion_ids"].size(1),
                    batch_size=self.args.per_device_train_batch_size,
                )
        logps: Tensor = batch["old_per_token_logps"]
        return logps

    @property
    def _lam_of_targets(self) -> float:
        return 1.0 if self._warming_up else self.args.lam_critic

    def _advantages(
        self,
        gamma: float,
        values: Tensor,
        bootstrap: Tensor,
        mask: Tensor,
        task: Tensor | TaskSignal,
        gate: Tensor,
        batch: dict[str, Any],
    ) -> Advantages:
        found = super()._advantages(gamma, values, bootstrap, mask, task, gate, batch)
        assert isinstance(task, TaskSignal)
        if isinstance(task.lam, Tensor) or task.lam != self._lam_of_targets:
            decoupled = replace(task, lam=self._lam_of_targets)
            targets = super()._advantages(gamma, values, bootstrap, mask, decoupled, gate, batch)
            found = replace(found, task_returns=targets.task_returns)
        self._task_values, self._lam = task.values, task.lam
        return found

    def _task_advantages(self, task: TaskSignal, mask: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Advantages and the critic's targets, without a length critic."""
        estimate = partial(
            gae,
            task.rewards,
            task.values,
            task.bootstrap,
            mask,
            gamma=task.gamma,
            right_padded="tool_mask" not in batch,
            backend=self.args.advantage_backend,
        )
        advantages, returns = estimate(lam=task.lam)
        if isinstance(task.lam, Tensor) or task.lam != self._lam_of_targets:
            _, returns = estimate(lam=self._lam_of_targets)
        self._task_values, self._lam = task.values, task.lam
        return advantages, returns

    def _use_advantages(self, rollouts: Rollouts, advantages: Advantages, mask: Tensor) -> None:
        assert advantages.task_returns is not None
        self._use_task_advantages(
            rollouts, advantages.task, advantages.task_returns, advantages.total - advantages.task
        )

    def _use_task_advantages(
        self, rollouts: Rollouts, advantages: Tensor, returns: Tensor, length_part: Tensor
    ) -> None:
        batch, scored = rollouts.batch, self._scored_tokens
        tokens, moments = scored.sum(1), row_moments(advantages, scored)
        fit = fit_of(self._task_values, returns, scored, self._sum)
        spread = fit_of(torch.zeros_like(advantages), advantages, scored, self._sum).return_std
        if self.args.whiten_advantages:
            advantages = whiten(advantages, scored, tokens, moments, reduce=self._sum)
        batch["advantages"] = torch.where(scored, advantages, 0.0) + length_part
        batch["task_returns"], batch["task_values"], batch["task_mask"] = returns, self._task_values, scored
        metrics = {
            "value/explained_variance": fit.explained_variance,
            "value/mean": fit.mean_value,
            "value/return_mean": fit.mean_return,
            "value/return_std": fit.return_std,
            "value/bias": fit.mean_value - fit.mean_return,
            "ppo/advantage_std": spread,
            "ppo/lambda": self._mean_lambda(),
        }
        for name, value in metrics.items():
            self._log(name, value)
        if self._mode == "train" and self.value_watch.observe(fit.explained_variance):
            logger.warning(self.value_watch.report(self.args.value_learning_rate))

    def _mean_lambda(self) -> float:
        if not isinstance(self._lam, Tensor):
            return self._lam
        total, rows = self._sum(torch.stack([self._lam.sum(), torch.ones_like(self._lam).sum()])).tolist()
        return float(total / rows)

    def _log_prompt_error(self, values: Tensor, rewards: Tensor, mask: Tensor) -> None:
        """How far the value of a prompt is from the reward of its completion."""
        known = mask.any(1) & ~rewards.isnan()
        first = values.gather(1, mask.to(torch.uint8).argmax(1, keepdim=True)).squeeze(1)
        errors = (first - rewards)[known].abs().double()
        total, rows = self._sum(torch.stack([errors.sum(), torch.ones_like(errors).sum()])).tolist()
        self._log("value/prompt_error", total / rows if rows else float("nan"))

    # Updates

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.task_critic.side.total_steps = self.state.max_steps
        if self._warming_up:
            # with a learning rate of 0 AdamW moves nothing, and its moments are ready when the policy is released; the
            # scheduler sets the rate anew after every step
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        return super().training_step(model, inputs, num_items_in_batch)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        self._logps = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        critic, training = self.task_critic, self.model.training
        shared = critic if isinstance(critic, SharedTaskCritic) and training else None
        if training and shared is None:
            self._learn_values(inputs)
        beta, self.beta = self.beta, 0.0 if self.args.kl_in_reward else self.beta
        try:
            with shared.watching() if shared is not None else nullcontext():
                loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        if shared is not None:
            if self.args.value_backbone_coef:  # before the head makes its step
                error = value_loss(shared.values_for_policy(inputs), *self._targets_of(inputs)).loss
                loss = loss + self.args.value_backbone_coef * self._per_token(error, inputs)
            self._learn_values(inputs)
            shared.forget()
        if training:
            self._log_approximate_kl(inputs)
        return loss

    def _targets_of(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, float | None]:
        clip = None if self._warming_up else self.args.value_clip
        return inputs["task_values"], inputs["task_returns"], inputs["task_mask"], clip

    def _learn_values(self, inputs: dict[str, Any]) -> None:
        """One minibatch of the task critic, and its step where the policy makes one."""
        side, last, total = self.task_critic.side, self.accelerator.sync_gradients, self._tokens_of_update(inputs)
        side.train()
        found = value_loss(self.task_critic.values(inputs), *self._targets_of(inputs))
        side.backward(found.loss / total, last=last)
        side.eval()
        self._update.add(found.loss.detach(), found.clipped, inputs["task_mask"].sum())
        if not last:
            return
        rate = side.learning_rate
        norm = side.step()
        for name, value in self._update.taken(self._sum).items():
            self._metrics["train"][f"value/{name}"].append(value)
        self._metrics["train"]["value/grad_norm"].append(norm)
        self._metrics["train"]["value/learning_rate"].append(rate)

    def _log_approximate_kl(self, inputs: dict[str, Any]) -> None:
        """Of the policy that sampled and the one that learns, by the estimator that is never negative."""
        old = inputs.get("old_per_token_logps")
        if old is None or self._logps is None:
            self._metrics["train"]["ppo/approx_kl"].append(0.0)  # nothing was learned since
            return
        mask = own_tokens(inputs)
        log_ratio = torch.where(mask, self._logps.float() - old.float(), 0.0)
        total = (torch.exp(log_ratio) - 1.0 - log_ratio).sum()
        total, tokens = self._sum(torch.stack([total, mask.sum()])).tolist()
        self._metrics["train"]["ppo/approx_kl"].append(total / max(tokens, 1))


class _Update:
    """What the minibatches of one update add up to."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, loss: Tensor, clipped: Tensor, tokens: Tensor) -> None:
        sums = torch.stack([loss.double(), clipped.double(), tokens.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def taken(self, reduce: Any) -> dict[str, float]:
        """Means over the tokens of all processes; begins anew."""
        assert self._sums is not None
        loss, clipped, tokens = reduce(self._sums).tolist()
        self._sums = None
        return {"loss": loss / max(tokens, 1), "clip_fraction": clipped / max(tokens, 1)}


class ValueWatch:
    """Notices a task critic that is worse than a constant for too long.

    Args:
        patience: batches in a row with an explained variance below 0; 0 notices nothing.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.below = 0

    def observe(self, explained_variance: float) -> bool:
        """Count a batch; True if it is time to say something. nan, where all returns are equal, changes nothing."""
        if not explained_variance < 0.0:
            self.below = 0 if explained_variance >= 0.0 else self.below
            return False
        self.below += 1
        return bool(self.patience) and self.below % self.patience == 0

    def report(self, learning_rate: float) -> str:
        return (
            f"The task critic has explained less than nothing of the returns for {self.below} batches in a row "
            "(value/explained_variance below 0): advantages are noisier than without it. It diverges: lower "
            f"value_learning_rate ({learning_rate:g}), or it has not learned yet: set value_warmup_steps."
        )

    def state_dict(self) -> dict[str, Any]:
        return {"below": self.below}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.below = state["below"]
