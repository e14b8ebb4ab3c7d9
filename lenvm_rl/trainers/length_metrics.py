"""What is said of the lengths of a batch of rollouts, over all processes, and of the critic that predicts them."""

from collections.abc import Callable

import torch
from torch import Tensor

from lenvm_rl.critic import Calibration

EXPLAINED_VARIANCE_FLOOR = 0.3
"""Below this, on the first rollouts, the critic is reported as one that does not know this policy."""


def completion_metrics(
    tokens: Tensor, correctness: Tensor, gate: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums
) -> dict[str, float]:
    """How many completions are correct and feel the length signal, and what the correct ones cost.

    Args:
        tokens: (B,) the policy's own tokens of each completion.
        correctness: (B,) 1 for a correct completion, 0 for a wrong one, nan for one that could not be scored.
        gate: (B,) in [0, 1].
        reduce: adds up a tensor over processes.
    """
    tokens, scored, right = tokens.double(), ~correctness.isnan(), (correctness == 1).double()
    sums = torch.stack(
        [
            torch.ones_like(tokens).sum(),
            tokens.sum(),
            scored.double().sum(),
            tokens[scored].sum(),
            right.sum(),
            (tokens * right).sum(),
            gate.double().sum(),
        ]
    )
    completions, total, judged, judged_tokens, solved, solved_tokens, gates = reduce(sums).tolist()
    return {
        "gate_rate": gates / completions,
        "tokens": total / completions,
        "correct_rate": _ratio(solved, judged),
        "correct_tokens": _ratio(solved_tokens, solved),
        "wrong_tokens": _ratio(judged_tokens - solved_tokens, judged - solved),
        "tokens_per_correct": _ratio(total, solved),
    }


def report_of(calibration: Calibration) -> tuple[str, str | None]:
    """How well the critic knows this policy, in a sentence; and a second one if it does not."""
    report = (
        f"Length critic on this policy's first {calibration.completions} finished rollouts: explained variance "
        f"{calibration.explained_variance:.3f}, predicts {calibration.predicted_tokens:.1f} tokens at the prompt "
        f"where {calibration.true_tokens:.1f} followed (bias {calibration.bias_tokens:+.1f})."
    )
    # nan, when all remainders are equal, is no evidence against the critic
    if not calibration.explained_variance < EXPLAINED_VARIANCE_FLOOR:
        return report, None
    return report, (
        f"The length critic explains {calibration.explained_variance:.2f} of the variance of this policy's "
        "lengths: it was made for another policy, other sampling settings or other prompts, and its advantages "
        "will be mostly noise. Pretrain one on this policy's rollouts."
    )


def _ratio(amount: float, count: float) -> float:
    return amount / count if count else float("nan")  # TRL leaves nan out of its averages
