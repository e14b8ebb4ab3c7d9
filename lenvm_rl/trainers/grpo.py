"""GRPO with dense length advantages from a pretrained Length Value Model, on stock TRL.

1. One seam: after TRL has generated, scored and normalised, the sequence advantages (B,) are replaced by token
   advantages (B, T). TRL's loss takes either, and carries, shuffles and splits them with the batch (TRL 1.16).
2. Generation, vLLM, reference model, PEFT, logging, checkpoints and the loss types stay TRL's.
3. With ``length_coef=0`` the run is the one that `trl.GRPOTrainer` gives, bit for bit; a critic then only measures.
4. The same seam normalises as DLER does (`normalization.py`) and refills groups without a signal (`group_sampling.py`).
"""

import warnings
from collections.abc import Sized
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.advantages import compute_advantages
from lenvm_rl.assets import model_path
from lenvm_rl.credit import gated_std, rescaled
from lenvm_rl.critic import Calibration, LengthCritic
from lenvm_rl.launch_check import check_launch
from lenvm_rl.length import check_gamma
from lenvm_rl.length_controller import SCHEDULES, LengthController, scheduled
from lenvm_rl.model import LengthValueConfig, LengthValueModel
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer
from lenvm_rl.trainers.critic_placement import place_critic, whole_weights
from lenvm_rl.trainers.finite_rewards import guard
from lenvm_rl.trainers.group_sampling import PromptStream, Rollouts, refilled, signal_groups, unlogged
from lenvm_rl.trainers.grpo_config import LenVMGRPOConfig, check_limits
from lenvm_rl.trainers.length_metrics import completion_metrics, report_of
from lenvm_rl.trainers.normalization import (
    combined_rewards,
    group_centred_batch_std,
    group_centred_token_std,
    trl_advantages,
)
from lenvm_rl.trainers.resume import ResumableGRPOTrainer, Stateful

__all__ = ["LenVMGRPOConfig", "LenVMGRPOTrainer"]


class LenVMGRPOTrainer(ResumableGRPOTrainer):
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
    ``length/explained_variance`` and ``length/relative_error``. With dynamic sampling also ``sampling/rounds`` (of
    generation, the first included), ``sampling/kept_groups`` (of the batch, with a signal) and
    ``sampling/unfilled_groups`` (without); what describes the critic and the advantages is then of the batch that is
    trained on, all else and the table of completions of the first round, whose prompts nobody selected.

    Guaranteed of a resumed run: what `resume.py` says; the further prompts of dynamic sampling and the controller of
    the coefficient go on as well. Reward functions with a state see all rounds, completions that are dropped included.
    """

    _tag_names = ["trl", "grpo", "lenvm"]  # noqa: RUF012 (TRL's own declaration)
    _name = "LenVM-GRPO"

    args: LenVMGRPOConfig
    train_dataset: Any
    _logs: dict[str, Any]
    model: Any  # never None once the trainer is built
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

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
        self.refill_prompts = self._prepare_refill() if self.args.dynamic_sampling else None
        self.length_critic = self._prepare_critic(length_critic)
        self._critic_reported = False

    def _prepare_controller(self) -> LengthController | None:
        if self._controlled.kind in ("none", *SCHEDULES):
            return None
        return LengthController(self._controlled, self.args.length_coef)

    def _coefficient(self) -> float:
        """Of the length signal in the batch that comes next."""
        if self.length_controller is not None:
            return self.length_controller.coef
        if self._controlled.kind in SCHEDULES:
            done = self.state.global_step / max(self.state.max_steps, 1)
            return scheduled(self._controlled, self.args.length_coef, done)
        return self.args.length_coef

    def _find_gate_reward(self) -> int:
        name = self.args.length_gate_reward
        if name is None:
            return 0
        if name not in self.reward_func_names:
            raise ValueError(
                f"length_gate_reward={name!r} is not one of the reward functions: {', '.join(self.reward_func_names)}."
            )
        return self.reward_func_names.index(name)

    def _prepare_refill(self) -> PromptStream:
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(
                "dynamic_sampling draws further prompts from the whole dataset, but train_dataset is a stream without "
                "a length: load it without streaming=True, or set dynamic_sampling=False."
            )
        return PromptStream(len(self.train_dataset), self.args.seed)

    def stateful_parts(self) -> dict[str, Stateful]:
        own = {"refill_prompts": self.refill_prompts, "length_controller": self.length_controller}
        return super().stateful_parts() | {name: part for name, part in own.items() if part is not None}

    def _prepare_critic(self, model: LengthValueModel | None) -> LengthCritic | None:
        path = self.args.length_critic
        if model is None:
            if path is None:
                return None
            with whole_weights():
                model = LengthValueModel.from_pretrained(model_path(path), gamma=self.args.length_gamma)
        elif self.args.length_gamma not in (None, model.config.gamma):
            raise ValueError(
                f"length_gamma={self.args.length_gamma} contradicts the critic's own {model.config.gamma}: its values "
                "mean nothing under another discount. Leave length_gamma unset."
            )
        check_same_tokenizer(self._tokenizer, model.config, policy_name=self.model.config._name_or_path)
        self._compare_sampling(model.config)
        return LengthCritic(
            place_critic(model, self.accelerator, sharded=self.args.length_critic_placement == "sharded"),
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
        self._scored = rewards, torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._mode = "train" if self.model.training else "eval"
        self.credit = replace(self.credit, coef=self._coefficient())
        rollouts = self._rolled_out(inputs)
        tokens = _own_tokens(rollouts.batch).sum(1)
        # mask_truncated_completions empties the mask of what was cut, but its tokens were generated all the same
        tokens = torch.where(tokens == 0, rollouts.generated, tokens)
        self._log("length/coef", self.credit.coef)
        metrics = completion_metrics(tokens, *self._correct_and_gate(rollouts), self._sum)
        for name, value in metrics.items():
            self._log(f"length/{name}", value)
        if self.length_controller is not None and self._mode == "train":
            self.length_controller.observe(metrics["correct_rate"], metrics["tokens"])
        if self.refill_prompts is not None and self._mode == "train":
            rollouts = self._refilled(rollouts, self.refill_prompts)
        self._normalise(rollouts)
        if self.length_critic is not None:
            self._add_length_credit(self.length_critic, rollouts)
        return rollouts.batch

    def _rolled_out(self, inputs: Any) -> Rollouts:
        """One round of TRL's generation and scoring."""
        batch = super()._generate_and_score_completions(inputs)
        rewards, generated = self._scored
        return Rollouts(batch, rewards, generated, torch.ones(len(rewards), dtype=torch.bool, device=rewards.device))

    @property
    def _group_size(self) -> int:
        return self.num_generations if self._mode == "train" else self.num_generations_eval

    def _own(self, rollouts: Rollouts) -> slice:
        """This process's rows among those of all; groups may lie across processes, so they are judged everywhere."""
        rows, process = len(rollouts.generated), self.accelerator.process_index
        return slice(rows * process, rows * (process + 1))

    def _sum(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum")

    def _log(self, name: str, value: float) -> None:
        self._metrics[self._mode][name].append(value)

    def _correct_and_gate(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        correctness, own = rollouts.rewards[:, self._gate_column], self._own(rollouts)
        gate = self.credit.gates(correctness, self._group_size) * rollouts.kept
        return (correctness >= self.credit.threshold)[own], gate[own]

    def _refilled(self, first: Rollouts, prompts: PromptStream) -> Rollouts:
        """The batch after its groups without a signal were replaced, as far as the rounds reach."""

        def roll_out(rows: list[int]) -> Rollouts:
            inputs = [dict(self.train_dataset[row]) for row in rows for _ in range(self.num_generations)]
            with unlogged(self._metrics["train"], self._logs):
                return self._rolled_out(inputs)

        rollouts, counts = refilled(
            first,
            roll_out,
            self._signal,
            prompts,
            rounds=self.args.max_resample_rounds,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
            group_size=self.num_generations,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        for name, count in counts.items():
            self._log(f"sampling/{name}", count)
        if rollouts is not first:
            rollouts.batch["num_items_in_batch"] = self._sum(_own_tokens(rollouts.batch).sum())
            # TRL normalised each round by itself
            advantages = trl_advantages(
                rollouts.rewards,
                self.reward_weights,
                self.num_generations,
                scale_rewards=self.scale_rewards,
                aggregation=self.multi_objective_aggregation,
            )
            rollouts.batch["advantages"] = advantages[self._own(rollouts)]
        return rollouts

    def _signal(self, rollouts: Rollouts) -> Tensor:
        correct = rollouts.rewards[:, self._gate_column] >= self.credit.threshold
        return signal_groups(
            rollouts.rewards,
            self.reward_weights,
            self.num_generations,
            aggregation=self.multi_objective_aggregation,
            correct=correct if self.credit.coef != 0 and not self.args.resample_correct_groups else None,
        )

    def _normalise(self, rollouts: Rollouts) -> None:
        """Replace TRL's sequence advantages by the configured ones."""
        if self.args.advantage_normalization == "trl":
            return
        own = self._own(rollouts)
        rewards = combined_rewards(rollouts.rewards, self.reward_weights)
        if self.args.advantage_normalization == "group_centred_batch_std":
            advantages = group_centred_batch_std(rewards, self._group_size)[own]
        else:
            tokens = _own_tokens(rollouts.batch).sum(1)
            advantages = group_centred_token_std(rewards, self._group_size, tokens, own=own, reduce=self._sum)
        rollouts.batch["advantages"] = advantages

    def _add_length_credit(self, critic: LengthCritic, rollouts: Rollouts) -> None:
        """Score the rollouts, log how well the critic fits them, and let it speak where the coefficient is not 0."""
        batch, mask, finished = rollouts.batch, _own_tokens(rollouts.batch), self._finished(rollouts.batch)
        values, bootstrap = critic.score(
            batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"], finished
        )
        calibration = critic.calibration(values, mask, finished)
        self._report_critic(calibration)
        _, gate = self._correct_and_gate(rollouts)
        advantages, std = self._advantages(
            critic.gamma, values, bootstrap, mask, batch["advantages"], gate, "tool_mask" not in batch
        )
        if self.credit.coef != 0:
            batch["advantages"] = advantages
        self._log("length/advantage_std", std.item())
        for name in ("explained_variance", "predicted_tokens", "true_tokens", "relative_error"):
            self._log(f"length/{name}", getattr(calibration, name))

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
        task: Tensor,
        gate: Tensor,
        right_padded: bool,
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
            gate=gate,
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
        std = gated_std(advantages.stats, gate, self._sum)
        if self.credit.scale == "std":
            return rescaled(advantages, mask, self.credit.coef * gate / std), std
        return advantages.total, std

    def _report_critic(self, calibration: Calibration) -> None:
        """On the first rollouts, say how well the critic knows this policy."""
        if self._critic_reported or calibration.completions == 0:
            return
        self._critic_reported = True
        report, doubt = report_of(calibration)
        self.accelerator.print(report)
        if doubt is not None and self.accelerator.is_main_process:
            warnings.warn(doubt, stacklevel=2)


def _own_tokens(batch: dict[str, Any]) -> Tensor:
    """(B, T) bool: the tokens of the policy, neither padding nor the output of tools."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
