"""Rollouts of TRL as DLER wants them: groups without a signal replaced, rewards normalised over the batch.

1. One seam of TRL 1.16: what `_generate_and_score_completions` returns. Everything here happens between that and what a
   subclass makes of it.
2. Dynamic sampling (`group_sampling.py`) generates in rounds, as many on every process, and leaves TRL's metrics to the
   first round, whose prompts nobody selected.
3. Other normalisations than TRL's are in `normalization.py`.
"""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from lenvm_rl.trainers.group_sampling import PromptStream, Rollouts, refilled, signal_groups, unlogged
from lenvm_rl.trainers.grpo_config import LenVMGRPOConfig
from lenvm_rl.trainers.normalization import (
    combined_rewards,
    group_centred_batch_std,
    group_centred_token_std,
    trl_advantages,
)
from lenvm_rl.trainers.resume import ResumableGRPOTrainer, Stateful


class GroupTrainer(ResumableGRPOTrainer):
    """`trl.GRPOTrainer` with dynamic sampling and with DLER's normalisations.

    Args:
        args, kwargs: as for `trl.GRPOTrainer`, with a `LenVMGRPOConfig`.

    Raises:
        ValueError: fewer prompts than a batch of rollouts needs; dynamic sampling from a stream of unknown length.
    """

    args: LenVMGRPOConfig
    train_dataset: Any
    _logs: dict[str, Any]
    model: Any  # never None once the trainer is built
    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_number_of_prompts()
        self.refill_prompts = self._prepare_refill() if self.args.dynamic_sampling else None

    def _check_number_of_prompts(self) -> None:
        needed = (self.args.generation_batch_size or 0) // self.num_generations
        if isinstance(self.train_dataset, Sized) and len(self.train_dataset) < needed:
            raise ValueError(
                f"A batch of rollouts needs {needed} prompts, with num_generations={self.num_generations}, but the "
                f"dataset has {len(self.train_dataset)}, and TRL trains on whole batches only: raise num_generations, "
                "or lower per_device_train_batch_size."
            )

    def _prepare_refill(self) -> PromptStream:
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(
                "dynamic_sampling draws further prompts from the whole dataset, but train_dataset is a stream without "
                "a length: load it without streaming=True, or set dynamic_sampling=False."
            )
        return PromptStream(len(self.train_dataset), self.args.seed)

    def stateful_parts(self) -> dict[str, Stateful]:
        own = {"refill_prompts": self.refill_prompts} if self.refill_prompts is not None else {}
        return super().stateful_parts() | own

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._scored = rewards, torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
        return rewards

    def _rolled_out(self, inputs: Any) -> Rollouts:
        """One round of TRL's generation and scoring."""
        batch = super()._generate_and_score_completions(inputs)
        rewards, generated = self._scored
        return Rollouts(batch, rewards, generated, torch.ones(len(rewards), dtype=torch.bool, device=rewards.device))

    @property
    def _mode(self) -> str:
        """As TRL tells training from evaluation."""
        return "train" if self.model.training else "eval"

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
            rollouts.batch["num_items_in_batch"] = self._sum(own_tokens(rollouts.batch).sum())
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
        """(groups,) bool: worth training on."""
        return signal_groups(
            rollouts.rewards,
            self.reward_weights,
            self.num_generations,
            aggregation=self.multi_objective_aggregation,
            correct=self._teaching(rollouts),
        )

    def _teaching(self, rollouts: Rollouts) -> Tensor | None:
        """(rows,) bool: completions that teach something even where all of a group earned the same; None is none."""
        return None

    def _normalise(self, rollouts: Rollouts) -> None:
        """Replace TRL's sequence advantages by the configured ones."""
        if self.args.advantage_normalization == "trl":
            return
        own = self._own(rollouts)
        rewards = combined_rewards(rollouts.rewards, self.reward_weights)
        if self.args.advantage_normalization == "group_centred_batch_std":
            advantages = group_centred_batch_std(rewards, self._group_size)[own]
        else:
            tokens = own_tokens(rollouts.batch).sum(1)
            advantages = group_centred_token_std(rewards, self._group_size, tokens, own=own, reduce=self._sum)
        rollouts.batch["advantages"] = advantages


def own_tokens(batch: dict[str, Any]) -> Tensor:
    """(B, T) bool: the tokens of the policy, neither padding nor the output of tools."""
    mask = batch["completion_mask"].bool()
    return mask & batch["tool_mask"].bool() if "tool_mask" in batch else mask
