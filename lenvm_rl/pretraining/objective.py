"""What a Length Value Model is fitted to: the target of every state, and its error.

1. Targets are closed forms of the remaining length: no recursion over time (LenVM eq. 2), except for TD(lambda), which
   is the generalised advantage estimation of `lenvm_rl.advantages`.
2. The loss is the token mean; a mean per completion would weight states by the length that followed them and bias the
   value (LenVM appendix E). Losses relative to the length do the same, and are left out.
3. A completion that was cut is not a short one: the model itself values the tail that was not seen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lenvm_rl.advantages import gae
from lenvm_rl.length import logit_to_remaining, remaining_to_value
from lenvm_rl.pretraining.data import NO_TARGET


def length_value_targets(
    predictions: Tensor, labels: Tensor, gamma: float, *, td_lambda: float = 1.0, bootstrap: bool = True
) -> Tensor:
    """What each state is worth, given how its completion went on.

    Args:
        predictions: (B, S) current values; used, without gradient, for the tails of cut completions, and everywhere
            where td_lambda is below 1.
        labels: (B, S) of a collator; rows may hold several completions.
        gamma: discount.
        td_lambda: lambda of the targets.
        bootstrap: value the tail of a cut completion; otherwise it counts as 0.

    Returns:
        (B, S): -(1 - gamma^l), plus gamma^l V(s_cut) where the completion was cut l tokens later; 0 without a target.
    """
    if td_lambda < 1:
        return _td_targets(predictions, labels, reward=-(1 - gamma), gamma=gamma, td_lambda=td_lambda)
    known = labels != NO_TARGET
    certain = remaining_to_value(labels.masked_fill(~known, 0).to(predictions.dtype), gamma)
    if not bootstrap:
        return certain.masked_fill(~known, 0.0)
    return (certain + (1 + certain) * _tails(predictions, labels)).masked_fill(~known, 0.0)


def remaining_targets(predictions: Tensor, labels: Tensor, *, td_lambda: float = 1.0, bootstrap: bool = True) -> Tensor:
    """`length_value_targets` in tokens: the remaining length, plus the predicted one where the completion was cut."""
    if td_lambda < 1:
        return _td_targets(predictions, labels, reward=1.0, gamma=1.0, td_lambda=td_lambda)
    known = labels != NO_TARGET
    certain = labels.masked_fill(~known, 0).to(predictions.dtype)
    return (certain + _tails(predictions, labels)).masked_fill(~known, 0.0) if bootstrap else certain


def length_value_loss(
    logits: Tensor,
    labels: Tensor,
    gamma: float,
    *,
    loss: str = "mse",
    parameterization: str = "value",
    censoring: str = "bootstrap",
    td_lambda: float = 1.0,
) -> Tensor:
    """Errors of all states, (B, S), 0 without a target; their sum over the number of targets is the loss.

    Args:
        logits: (B, S) head outputs.
        labels: (B, S) of a collator; that of "official" censoring differs from the others'.
        gamma: discount.
        loss, parameterization, censoring, td_lambda: as in `LengthValueTrainingArguments`.
    """
    bootstrap = censoring != "bound"
    if parameterization == "value":
        predictions = -torch.sigmoid(logits)
        targets = length_value_targets(predictions, labels, gamma, td_lambda=td_lambda, bootstrap=bootstrap)
    else:
        predictions = logit_to_remaining(logits, gamma)
        targets = remaining_targets(predictions, labels, td_lambda=td_lambda, bootstrap=bootstrap)
    if loss == "bce":
        errors = F.binary_cross_entropy_with_logits(logits, -targets, reduction="none")
    elif parameterization == "log_length":
        errors = (torch.log1p(predictions) - torch.log1p(targets)).square()
    elif parameterization == "length":
        errors = (torch.log(torch.tensor(gamma)) * (predictions - targets)).square()
    else:
        errors = (predictions - targets).square()
    errors = errors * (labels != NO_TARGET)
    if censoring == "bound":
        longer = predictions <= targets if parameterization == "value" else predictions >= targets
        errors = errors.masked_fill(longer & ~_finished(labels), 0.0)
    return errors


def _ends(labels: Tensor) -> Tensor:
    """(B, S) column of the last state of each state's completion; its own where there is no label."""
    columns = torch.arange(labels.size(1), device=labels.device)
    return columns + labels.masked_fill(labels == NO_TARGET, 0)


def _finished(labels: Tensor) -> Tensor:
    """(B, S) bool: the state's completion finished. Anything without a label."""
    return labels.gather(1, _ends(labels)) == 0


def _tails(predictions: Tensor, labels: Tensor) -> Tensor:
    """(B, S) prediction after the last token of each state's completion, 0 where it finished, without gradient."""
    ends = _ends(labels)
    return predictions.detach().gather(1, ends).masked_fill(labels.gather(1, ends) == 0, 0.0)


def _td_targets(predictions: Tensor, labels: Tensor, *, reward: float, gamma: float, td_lambda: float) -> Tensor:
    """TD(lambda) targets: the returns of `gae`, one row per completion, put back where the states are."""
    acting = labels > 0  # a token is still to come
    before = F.pad(labels, (1, 0), value=NO_TARGET)[:, :-1]
    first = acting & (before != labels + 1)
    targets = torch.zeros_like(predictions)
    if not first.any():
        return targets
    completion = first.flatten().cumsum(0)[acting.flatten()] - 1
    lengths = labels[first]
    time = lengths[completion] - labels[acting]
    table = predictions.new_zeros(len(lengths), int(lengths.max()), dtype=torch.float32)
    mask = torch.zeros(table.shape, dtype=torch.bool, device=table.device)
    table[completion, time] = predictions.detach()[acting].float()
    mask[completion, time] = True
    bootstrap = _tails(predictions, labels)[first].float()
    rewards = torch.full_like(table, reward)
    _, returns = gae(rewards, table, bootstrap, mask, gamma=gamma, lam=td_lambda, right_padded=True)
    targets[acting] = returns[completion, time].to(targets.dtype)
    return targets
