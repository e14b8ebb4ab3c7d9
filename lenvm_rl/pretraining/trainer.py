"""Pretraining a Length Value Model on rollouts, with transformers' Trainer.

1. Targets are closed forms of the remaining length: no recursion over time (LenVM eq. 2).
2. The loss is the token mean over the whole optimizer batch on all processes; a mean per completion would weight states
   by the length that followed them and bias the value (LenVM appendix E).
3. A completion that was cut is not a short one: the model itself values the tail that was not seen.
"""

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from lenvm_rl.length import check_gamma, remaining_to_value
from lenvm_rl.model import LengthValueModel, LengthValueOutput
from lenvm_rl.pretraining.data import NO_TARGET, LengthValueCollator, check_rollouts


def length_value_targets(values: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """What each state is worth, given how its completion went on.

    Args:
        values: (B, S) current predictions; used, without gradient, for the tails of cut completions only.
        labels: (B, S) of `LengthValueCollator`.
        gamma: discount.

    Returns:
        (B, S): -(1 - gamma^l), plus gamma^l V(s_cut) where the completion was cut l tokens later; 0 without a target.
    """
    known = labels != NO_TARGET
    certain = remaining_to_value(labels.masked_fill(~known, 0).to(values.dtype), gamma)
    finished = (labels == 0).any(1, keepdim=True)
    columns = torch.arange(labels.size(1), device=labels.device)
    cut_state = (columns * known).amax(1, keepdim=True) + 1  # the state after the last one with a label
    tail = values.detach().gather(1, cut_state.clamp(max=labels.size(1) - 1)).masked_fill(finished, 0.0)
    return (certain + (1 + certain) * tail).masked_fill(~known, 0.0)


class LengthValueTrainer(Trainer):
    """Fits a `LengthValueModel` to rollouts by mean squared error on the value (LenVM eq. 9).

    Args:
        model: the critic; its config holds gamma.
        args: training arguments.
        train_dataset, eval_dataset: rollouts with columns ``prompt_ids``, ``completion_ids`` and ``finished``.
        pad_token_id: fills the rows; never attended to.

    Evaluation reports ``eval_loss`` (token mean) and, on finished completions, ``eval_explained_variance``.

    Raises:
        ValueError: rollouts that cannot be trained on.
    """

    def __init__(
        self,
        model: LengthValueModel,
        args: TrainingArguments,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        pad_token_id: int,
        **kwargs: Any,
    ) -> None:
        for rollouts in (train_dataset, eval_dataset):
            if rollouts is not None:
                check_rollouts(rollouts, model.config.vocab_size)
        args.remove_unused_columns = False
        args.label_names = ["labels"]
        super().__init__(
            model,
            args,
            data_collator=LengthValueCollator(pad_token_id),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_loss_func=self._loss,
            compute_metrics=self._metrics,
            **kwargs,
        )
        self.gamma = check_gamma(model.config.gamma)

    def _loss(self, outputs: LengthValueOutput, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        values = -torch.sigmoid(outputs["logits"])
        errors = (values - length_value_targets(values, labels, self.gamma)).square() * (labels != NO_TARGET)
        return errors.sum() / ((labels != NO_TARGET).sum() if num_items_in_batch is None else num_items_in_batch)

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        values = -torch.sigmoid(torch.as_tensor(prediction.predictions).double())
        labels = torch.as_tensor(prediction.label_ids)
        targets = length_value_targets(values, labels, self.gamma)
        errors, known = targets - values, labels != NO_TARGET
        finished = known & (labels == 0).any(1, keepdim=True)
        returns = targets[finished]
        varies = returns.numel() > 0 and bool(returns.min() < returns.max())
        return {
            # takes the place of Trainer's own, a mean over batches (transformers 5.23)
            "loss": errors[known].square().mean().item(),
            "explained_variance": (1 - errors[finished].var() / returns.var()).item() if varies else float("nan"),
        }
