"""GRPO with dense length advantages from a pretrained Length Value Model, on stock TRL.

1. One seam: after TRL has generated, scored and normalised, the sequence advantages (B,) are replaced by token
   advantages (B, T). TRL's loss takes either, and carries, shuffles and splits them with the batch (TRL 1.16).
2. Generation, vLLM, reference model, PEFT, logging, checkpoints and the loss types stay TRL's.
3. With ``length_coef=0`` the run is the one that `trl.GRPOTrainer` gives, bit for bit; a critic then only measures.
4. Before that, `group_trainer.py` refills groups without a signal and normalises as DLER does, where it is asked to.
"""

import warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.advantages import Advantages, TaskSignal, compute_advantages, length_advantages
from lenvm_rl.advantages.statistics import row_moments
from lenvm_rl.credit import gated_std, std_over_gated
from lenvm_rl.critic import LengthCritic
from lenvm_rl.launch_check import check_launch
from lenvm_rl.length_controller import CONTROLLERS, SCHEDULES, LengthController, scheduled
from lenvm_rl.length_signal import finished_signal, length_signal
from lenvm_rl.model import LengthValueModel
from lenvm_rl.trainers.finite_rewards import guard
from lenvm_rl.trainers.group_sampling import PromptStream, Rollouts
from lenvm_rl.trainers.group_trainer import GroupTrainer, own_tokens
from lenvm_rl.trainers.grpo_config import LenVMGRPOConfig, check_limits
from lenvm_rl.trainers.hidden_states import HiddenStates, decoder_of, states_before_tokens
from lenvm_rl.trainers.invariance import broken_conditions
from lenvm_rl.trainers.learning_critic import LearningCritic, OnlineCritic, SharedCritic
from lenvm_rl.trainers.length_checks import check_target
from lenvm_rl.trainers.length_metrics import completion_metrics
from lenvm_rl.trainers.length_settings import SHARED
from lenvm_rl.trainers.load_critic import FirstImpression, head_on_policy, load_critic
from lenvm_rl.trainers.resume import SavedPart, Stateful
from lenvm_rl.trainers.safeguards import CollapseDetector, StopOnCollapse, Trust
from lenvm_rl.trainers.whole_policy import whole_policy

__all__ = ["LenVMGRPOConfig", "LenVMGRPOTrainer"]


class LenVMGRPOTrainer(GroupTrainer):
    """`trl.GRPOTrainer` whose advantages also say which tokens wasted the budget.

    Args:
        model, reward_funcs, args, *rest, **kwargs: as for `trl.GRPOTrainer`, with a `LenVMGRPOConfig` as ``args``.
        length_critic: a loaded critic, instead of the path in ``args.length_critic``.

    Raises:
        ValueError: a critic of another tokenizer, a gamma that contradicts the critic's, no critic although
            ``length_coef`` is not 0, an unknown ``length_gate_reward``, a reward whose ``limit`` no completion can
            exceed, dynamic sampling from a stream of unknown length, a launch that fell back to less than it asked for;
            during training a reward or a critic value that is not finite.

    Logs, besides TRL's metrics (tokens count the policy's own tokens, EOS included): ``length/coef``,
    ``length/gate_rate``, ``length/tokens``, ``length/correct_rate``, ``length/correct_tokens``,
    ``length/wrong_tokens``, ``length/tokens_per_correct``; with a critic also ``length/advantage_std`` (gated tokens),
    ``length/predicted_tokens`` and ``length/true_tokens`` (at the prompt, finished completions),
    ``length/explained_variance``, ``length/relative_error`` and ``length/trust``, the share of the coefficient that its
    explained variance leaves; with one that learns also ``length/critic_loss``. With dynamic sampling also
    ``sampling/rounds`` (of generation, the first included), ``sampling/kept_groups`` (of the batch, with a signal) and
    ``sampling/unfilled_groups`` (without); what describes the critic and the advantages is then of the batch that is
    trained on, all else and the table of completions of the first round, whose prompts nobody selected.

    Guaranteed of a resumed run: what `resume.py` says; the further prompts of dynamic sampling and the controller of
    the coefficient go on as well. Reward functions with a state see all rounds, completions that are dropped included.
    """

    _tag_names = ["trl", "grpo", "lenvm"]  # noqa: RUF012 (TRL's own declaration)
    _name = "LenVM-GRPO"

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
        check_launch(self.accelerator)
        self.credit = self.args.length_credit()
        self._controlled = self.args.controller_settings()
        self.length_controller = self._prepare_controller()
        self._gate_column = self._find_gate_reward()
        check_limits(self.reward_funcs, self.max_completion_length)
        self.length_critic = self._prepare_critic(length_critic)
        self._first_impression = FirstImpression(self.accelerator)
        self._trust = Trust(self.args.length_critic_trust, self.accelerator)
        self.collapse = CollapseDetector(self.args.length_collapse_patience, self.args.length_collapse_drop)
        if self.args.length_coef != 0:
            self.add_callback(StopOnCollapse(self.collapse))
        if self.credit.mode == "shaping":
            self._say_what_shaping_breaks()

    def _prepare_controller(self) -> LengthController | None:
        if self._controlled.kind not in CONTROLLERS:
            return None
        return LengthController(self._controlled, self.args.length_coef)

    def _coefficient(self) -> float:
        """Of the length signal in the batch that comes next."""
        if self.length_controller is not None:
            return self.length_controller.coef
        if self._controlled.kind in SCHEDULES:
            return scheduled(self._controlled, self.args.length_coef, self._progress)
        return self.args.length_coef

    @property
    def _progress(self) -> float:
        """Share of the training that is done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    def _find_gate_reward(self) -> int:
        name = self.args.length_gate_reward
        if name is None:
            return 0
        if name not in self.reward_func_names:
            raise ValueError(
                f"length_gate_reward={name!r} is not one of the reward functions: {', '.join(self.reward_func_names)}."
            )
        return self.reward_func_names.index(name)

    def stateful_parts(self) -> dict[str, Stateful]:
        own = {
            "length_controller": self.length_controller,
            "collapse": self.collapse if self.args.length_coef != 0 else None,
        }
        return super().stateful_parts() | {name: part for name, part in own.items() if part is not None}

    def saved_parts(self) -> dict[str, SavedPart]:
        parts, critic = super().saved_parts(), self.length_critic
        if isinstance(critic, LearningCritic):
            parts["length_critic"] = critic
        return parts

    def save_length_critic(self, path: str | Path) -> bool:
        """Write a critic that learned during the run as a Length Value Model that can be loaded. Collective.

        Returns:
            Whether there is one. A "shared" head on a policy with adapters has no model of its own: merge them first.
        """
        critic = self.length_critic
        if isinstance(critic, OnlineCritic):
            critic.save_pretrained(path)
        elif isinstance(critic, SharedCritic) and not self._has_adapters:
            with whole_policy(self) as policy:
                if self.accelerator.is_main_process:
                    critic.as_model(policy, self._tokenizer).save_pretrained(path)
        else:
            return False
        return True

    def _prepare_critic(self, model: LengthValueModel | None) -> LengthCritic | None:
        if model is None and self.args.length_critic is None:
            return None
        if model is None and self.args.length_critic == SHARED:
            size = self.accelerator.unwrap_model(self.model).config.get_text_config().hidden_size
            return head_on_policy(self.args, self.accelerator, self.hidden_states, size)
        return load_critic(
            self.args,
            self.accelerator,
            tokenizer=self._tokenizer,
            policy_name=self.model.config._name_or_path,
            model=model,
        )

    _shapes_rewards = False
    """Shaping is part of the task rewards, not a signal beside them."""

    def _say_what_shaping_breaks(self) -> None:
        broken = broken_conditions(self.args, in_rewards=self._shapes_rewards)
        if broken and self.accelerator.is_main_process:
            warnings.warn(
                "length_mode='shaping' changes here what is optimal, since the settings break a condition of "
                f"invariance: {'; '.join(broken)}.",
                stacklevel=3,
            )

    @property
    def _has_adapters(self) -> bool:
        return hasattr(self.accelerator.unwrap_model(self.model), "disable_adapter")

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self.credit = replace(self.credit, coef=self._coefficient())
        rollouts = self._rolled_out(inputs)
        tokens = own_tokens(rollouts.batch).sum(1)
        # mask_truncated_completions empties the mask of what was cut, but its tokens were generated all the same
        tokens = torch.where(tokens == 0, rollouts.generated, tokens)
        self._log("length/coef", self.credit.coef)
        metrics = completion_metrics(tokens, *self._verdicts_and_gate(rollouts), self._sum)
        for name, value in metrics.items():
            self._log(f"length/{name}", value)
        if self._mode == "train":
            self.collapse.observe(metrics["correct_rate"], metrics["tokens"])
            if self.length_controller is not None:
                self.length_controller.observe(metrics["correct_rate"], metrics["tokens"], self._progress)
        if self.refill_prompts is not None and self._mode == "train":
            rollouts = self._refilled(rollouts, self.refill_prompts)
        self._normalise(rollouts)
        self._assign_credit(rollouts)
        if "hidden_states" in vars(self):
            self.hidden_states.forget()
        return rollouts.batch

    @cached_property
    def hidden_states(self) -> HiddenStates:
        """Of the policy, for heads on it; only a run that asks for them watches the decoder."""
        decoder = decoder_of(self.accelerator, lambda: self.model)
        return HiddenStates(decoder, self.accelerator, self.args.length_token_budget, adapted=self._has_adapters)

    def _rolled_out(self, inputs: Any) -> Rollouts:
        watched = "hidden_states" in vars(self)
        with self.hidden_states.watching() if watched else nullcontext():
            rollouts = super()._rolled_out(inputs)
        if self.credit.targeted:
            rollouts.batch["length_target"] = self._targets(inputs, rollouts.generated.device)
        return rollouts

    def _refilled(self, first: Rollouts, prompts: PromptStream) -> Rollouts:
        rollouts = super()._refilled(first, prompts)
        if rollouts is not first and "hidden_states" in vars(self):
            self.hidden_states.forget()
        return rollouts

    def _teaching(self, rollouts: Rollouts) -> Tensor | None:
        if self.credit.coef == 0 or self.args.resample_correct_groups:
            return None
        return rollouts.rewards[:, self._gate_column] >= self.credit.threshold

    def _verdicts_and_gate(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """(B,) 1 for a correct completion of this process, 0 for a wrong one, nan without a verdict; and the gate."""
        correctness, own = rollouts.rewards[:, self._gate_column], self._own(rollouts)
        gate = self.credit.gates(correctness, self._group_size) * rollouts.kept
        verdicts = torch.where(correctness.isnan(), correctness, (correctness >= self.credit.threshold).float())
        return verdicts[own], gate[own]

    def _targets(self, inputs: Any, device: torch.device) -> Tensor:
        """(B,) tokens that each completion should have."""
        column = self.args.length_target_column
        if column is None:
            return torch.full((len(inputs),), float(self.args.length_target or 0), device=device)
        if column not in inputs[0]:
            raise ValueError(
                f"length_target_column={column!r} is no column of the dataset, which has {', '.join(inputs[0])}."
            )
        targets = [check_target(row[column], self.max_completion_length, f"A prompt's {column}") for row in inputs]
        return torch.tensor(targets, device=device)

    def _assign_credit(self, rollouts: Rollouts) -> None:
        """Score the rollouts, log how well the critic fits them, and let it speak where the coefficient is not 0."""
        batch, critic = rollouts.batch, self.length_critic
        target = batch.pop("length_target", None)  # TRL's batch stays as it is
        if critic is None:
            return
        mask, finished = own_tokens(batch), self._finished(batch)
        judged = self._with_cut(rollouts) if isinstance(critic, LearningCritic) else batch
        values, bootstrap = critic.score(
            judged["prompt_ids"], judged["prompt_mask"], judged["completion_ids"], judged["completion_mask"], finished
        )
        calibration = critic.calibration(values, mask, finished)
        if not isinstance(critic, SharedCritic):  # which starts from nothing
            self._first_impression(calibration)
        trust = self._trust(calibration.explained_variance, training=self._mode == "train")
        self.credit = replace(self.credit, coef=self.credit.coef * trust)
        if self.length_controller is not None and self._mode == "train":
            self.length_controller.trust = trust
        _, gate = self._verdicts_and_gate(rollouts)
        task = self._task_signal(rollouts, mask)
        advantages = self._advantages(critic.gamma, values, bootstrap, mask, task, gate, batch)
        std = gated_std(advantages.stats, gate, self._sum)
        shaped = self.credit.mode == "shaping" and isinstance(task, TaskSignal)  # in its rewards already
        if self.credit.coef != 0 and not self.credit.fused and not shaped:
            signal = length_signal(advantages, values, mask, self.credit, gamma=critic.gamma, target=target)
            std = std_over_gated(mask.sum(1), row_moments(signal, mask), gate, self._sum)
            signal = finished_signal(signal, mask, gate, self.credit, self._sum)
            advantages = replace(advantages, total=torch.where(mask, advantages.task + self.credit.coef * signal, 0.0))
        self._use_advantages(rollouts, advantages, mask)
        self._log("length/trust", trust)
        self._log("length/advantage_std", std.item())
        for name in ("explained_variance", "predicted_tokens", "true_tokens", "relative_error"):
            self._log(f"length/{name}", getattr(calibration, name))
        if self._mode == "train" and isinstance(critic, LearningCritic):
            seen = own_tokens(judged)
            targets = values + length_advantages(values, bootstrap, seen, gamma=critic.gamma, lam=1.0)
            self._log("length/critic_loss", critic.learn(judged, seen, targets, calibration.explained_variance))
            if self.args.length_backbone_coef:
                batch["length_returns"] = targets

    def _with_cut(self, rollouts: Rollouts) -> dict[str, Any]:
        """The batch with the completions that `mask_truncated_completions` hides: to learn from finished ones alone
        would teach the critic that long ones do not exist."""
        if not self.args.mask_truncated_completions:
            return rollouts.batch
        offsets = torch.arange(rollouts.batch["completion_ids"].size(1), device=rollouts.generated.device)
        generated = (offsets < rollouts.generated[:, None]).to(rollouts.batch["completion_mask"].dtype)
        return rollouts.batch | {"completion_mask": generated}

    def _task_signal(self, rollouts: Rollouts, mask: Tensor) -> Tensor | TaskSignal:
        """The task's side of the advantages: one number for each completion, or rewards and a critic of its own."""
        advantages: Tensor = rollouts.batch["advantages"]
        return advantages

    def _use_advantages(self, rollouts: Rollouts, advantages: Advantages, mask: Tensor) -> None:
        """Put what the loss needs into TRL's batch."""
        if self.credit.coef != 0:
            rollouts.batch["advantages"] = advantages.total

    def _finished(self, batch: dict[str, Any]) -> Tensor:
        """(B,) bool: the completion's last token is one of the model's end tokens."""
        last = (batch["completion_mask"].sum(1, keepdim=True) - 1).clamp(min=0)
        ends = torch.tensor(self.eos_token_ids, device=last.device)
        return torch.isin(batch["completion_ids"].gather(1, last).squeeze(1), ends)

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
        """Both sides in one launch; the total is final where the length signal needs no second pass."""
        advantages = compute_advantages(
            values,
            bootstrap,
            mask,
            task,
            gamma=gamma,
            lam=self.credit.lam,
            coef=self.credit.coef if self.credit.fused else 0.0,
            gate=gate,
            right_padded="tool_mask" not in batch,
            backend=self.args.advantage_backend,
        )
        if (advantages.stats.nonfinite > 0).any():
            row = int(advantages.stats.nonfinite.argmax())
            raise ValueError(
                f"The length critic gave {int(advantages.stats.nonfinite[row])} values that are not finite for "
                f"completion {row} of this process's batch. Its weights are damaged, or its dtype overflows: load it "
                "in float32 or bfloat16, or pretrain it again."
            )
        return advantages

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        critic = self.length_critic
        if not (isinstance(critic, SharedCritic) and self.args.length_backbone_coef and self.model.training):
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        with self.hidden_states.of_loss() as seen:
            loss = super()._compute_loss(model, inputs)
        states = states_before_tokens(seen[-1], inputs["completion_ids"])
        errors = (critic.values_for_policy(states) - inputs["length_returns"]).square()
        error = torch.where(own_tokens(inputs), errors, 0.0).sum()
        return loss + self.args.length_backbone_coef * self._per_token(error, inputs)

    def _per_token(self, error: Tensor, inputs: dict[str, Any]) -> Tensor:
        """A sum over this process's tokens as a part of the loss, which is averaged over processes."""
        return error * self.accelerator.num_processes / self._tokens_of_update(inputs)

    def _tokens_of_update(self, inputs: dict[str, Any]) -> Tensor:
        """Tokens of all processes in one optimizer step: TRL counts those of the whole batch of rollouts."""
        tokens: Tensor = inputs["num_items_in_batch"].clamp(min=1.0)
        return tokens * self.current_gradient_accumulation_steps / (self.args.steps_per_generation or 1)
