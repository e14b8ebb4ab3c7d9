"""Pretraining a Length Value Model on rollouts, with transformers' Trainer.

1. The objective is that of `objective.py`, a token mean over the whole optimizer batch on all processes.
2. Rollouts are packed, never padded where the backbone allows it, and evaluated in order of length. Metrics are summed
   batch by batch.
3. Left out: vocabulary logits, and a float64 loss.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from lenvm_rl.evaluation.length_scores import LengthValueStatistics
from lenvm_rl.evaluation.prompt_scores import PromptScores, prompt_scores
from lenvm_rl.launch_check import check_launch
from lenvm_rl.length import check_gamma
from lenvm_rl.model import LengthValueModel, LengthValueOutput
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.data import (
    COLUMNS,
    NO_TARGET,
    LengthValueCollator,
    check_rollouts,
    completion_lengths,
    prompt_groups,
    rollout_lengths,
)
from lenvm_rl.pretraining.objective import length_value_loss
from lenvm_rl.pretraining.packing import (
    PackingCollator,
    SimilarLengthsSampler,
    attention_by_document,
    attention_width,
    packing_layout,
)

logger = logging.getLogger(__name__)


class LengthValueTrainer(Trainer):
    """Fits a `LengthValueModel` to rollouts (LenVM eq. 9).

    Args:
        model: the critic; its config holds gamma.
        args: how to fit it.
        train_dataset, eval_dataset: rollouts with columns ``prompt_ids``, ``completion_ids`` and ``finished``. They are
            read as they are needed: a memory-mapped dataset stays on disk.
        pad_token_id: fills the rows; never attended to.
        kwargs: of transformers' Trainer.

    Evaluation reports ``eval_loss``, the token mean of the objective (with lambda 1, and cut completions by
    "bootstrap", however they are trained on), the metrics of `evaluation.length_values.LengthValueScores`, on finished
    completions, and those of `PromptScores`, prefixed ``prompt_``.

    Raises:
        ValueError: rollouts that cannot be trained on.
        ImportError: LoRA without peft.
    """

    args: LengthValueTrainingArguments

    def __init__(
        self,
        model: LengthValueModel,
        args: LengthValueTrainingArguments,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        pad_token_id: int,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, LengthValueTrainingArguments):
            raise ValueError(
                f"args is a {type(args).__name__}: LengthValueTrainer takes a LengthValueTrainingArguments, which has "
                "the same fields and those of the critic."
            )
        self.vocab_size = model.config.vocab_size
        self.gamma = check_gamma(model.config.gamma)
        if train_dataset is not None:
            train_dataset = _trainable(check_rollouts(train_dataset, self.vocab_size), args)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: check_rollouts(rollouts, self.vocab_size) for name, rollouts in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = check_rollouts(eval_dataset, self.vocab_size)
        if args.frozen_backbone:
            model.model.requires_grad_(False)
        elif args.lora_rank:
            _add_adapters(model, args)
        super().__init__(
            model,
            args,
            data_collator=LengthValueCollator(pad_token_id, official=args.censoring == "official"),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_loss_func=self._loss,
            compute_metrics=self._add_to_metrics,  # type: ignore[arg-type]  # the form of batch_eval_metrics
            **kwargs,
        )
        check_launch(self.accelerator)
        self._eval_collator = LengthValueCollator(pad_token_id)
        self._merge_on_save = False
        self._backbone = model.model
        self._layout = packing_layout(model.model) if args.packing else None
        if self._layout is not None:
            self.data_collator = PackingCollator(
                pad_token_id,
                self._layout,
                attention_width=attention_width(model.model),
                official=args.censoring == "official",
            )
        elif args.packing:
            micro_batches = args.gradient_accumulation_steps * args.world_size
            logger.warning(
                "%s cannot keep packed rollouts apart, so they are padded; the %d micro-batches of an optimizer step "
                "are made of similar lengths%s.",
                type(model.model).__name__,
                micro_batches,
                "" if micro_batches > 1 else ": raise gradient_accumulation_steps for that to save anything",
            )

    def _loss(self, outputs: LengthValueOutput, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        args = self.args
        errors = length_value_loss(
            outputs["logits"],
            labels,
            self.gamma,
            loss=args.loss,
            parameterization=args.parameterization,
            censoring=args.censoring,
            td_lambda=args.td_lambda,
        )
        return errors.sum() / ((labels != NO_TARGET).sum() if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        apart = attention_by_document(self._backbone) if self._layout == "documents" else nullcontext()
        with apart:
            return super().training_step(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        train_dataset = self.train_dataset if train_dataset is None else train_dataset
        if self._layout is not None or not self.args.packing:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.seed if args.data_seed is None else args.data_seed
        return SimilarLengthsSampler(rollout_lengths(train_dataset), step, seed)

    def get_train_dataloader(self) -> DataLoader:
        with self._replaced(train_dataset=_arrays(self.train_dataset)):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, Dataset):
            eval_dataset = check_rollouts(eval_dataset, self.vocab_size)
        elif isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]  # type: ignore[index]
        with self._replaced(data_collator=self._eval_collator):
            return super().get_eval_dataloader(_arrays(eval_dataset if eval_dataset is not None else self.eval_dataset))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return _LongestFirst(eval_dataset)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._statistics = LengthValueStatistics(self.gamma)
        self._objective, self._targets = 0.0, 0
        self._evaluated = dataloader.dataset
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _add_to_metrics(self, batch: EvalPrediction, compute_result: bool) -> dict[str, float]:
        logits, labels = torch.as_tensor(batch.predictions), torch.as_tensor(batch.label_ids)
        self._statistics.add(logits, labels)
        errors = length_value_loss(
            logits.double(), labels, self.gamma, loss=self.args.loss, parameterization=self.args.parameterization
        )
        self._objective += errors.sum().item()
        self._targets += int((labels != NO_TARGET).sum())
        if not compute_result:
            return {}
        scores = self._statistics.scores()
        prompt = self._prompt_scores()
        return {
            # takes the place of Trainer's own, a mean over batches (transformers 5.23)
            "loss": self._objective / max(self._targets, 1),
            **scores.metrics(),
            **{f"prompt_{name}": number for name, number in prompt.metrics().items()},
        }

    def _prompt_scores(self) -> PromptScores:
        rollouts: Any = self._evaluated
        order = np.array(list(_LongestFirst(rollouts)))
        lengths, _ = completion_lengths(rollouts)
        values = np.empty(len(order))
        values[order] = self._statistics.first_values()[: len(order)]
        return prompt_scores(values, lengths, prompt_groups(rollouts), self.gamma)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._merge_on_save = bool(self.args.lora_rank) and not _internal_call
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._merge_on_save = False

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self._merge_on_save:
            unwrapped = self.accelerator.unwrap_model(self.model)
            state_dict = merge_adapters(
                unwrapped.state_dict() if state_dict is None else state_dict,
                (self.args.lora_alpha or 2 * self.args.lora_rank) / self.args.lora_rank,
            )
        super()._save(output_dir, state_dict)

    @contextmanager
    def _replaced(self, **attributes: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in attributes}
        vars(self).update(attributes)
        try:
            yield
        finally:
            vars(self).update(before)


class _LongestFirst(Sampler[int]):
    """Rollouts by length: evaluation batches without padding, and if memory does not suffice, the first one says so."""

    def __init__(self, rollouts: Dataset) -> None:
        self.order = np.argsort(-rollout_lengths(rollouts), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())


def merge_adapters(state_dict: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """The weights that a model with LoRA adapters acts by, under the names that they have without adapters.

    Args:
        state_dict: with peft's names: ``x.base_layer.weight``, ``x.lora_A.default.weight``, ...
        scaling: lora_alpha / rank.
    """
    merged = {name: tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    for name, tensor in state_dict.items():
        if ".lora_A." in name:
            layer = name.split(".lora_A.")[0]
            delta = state_dict[name.replace(".lora_A.", ".lora_B.")].float() @ tensor.float()
            base = merged[f"{layer}.base_layer.weight"]
            merged[f"{layer}.base_layer.weight"] = (base.float() + scaling * delta).to(base.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in merged.items()}


def _add_adapters(model: LengthValueModel, args: LengthValueTrainingArguments) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora_rank needs peft: pip install 'lenvm-rl[peft]'.") from error
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha or 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules or "all-linear",
    )
    inject_adapter_in_model(config, model.model)


def _trainable(rollouts: Dataset, args: LengthValueTrainingArguments) -> Dataset:
    if args.censoring != "drop":
        return rollouts
    _, finished = completion_lengths(rollouts)
    if not finished.any():
        raise ValueError("censoring 'drop' leaves nothing to train on: all completions were cut. Take 'bootstrap'.")
    return rollouts if finished.all() else rollouts.select(np.flatnonzero(finished))


def _arrays(rollouts: Any) -> Any:
    """Only what a collator reads, as arrays: lists of integers are several times slower to make."""
    return rollouts.select_columns(list(COLUMNS)).with_format("numpy") if isinstance(rollouts, Dataset) else rollouts
