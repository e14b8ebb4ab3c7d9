"""What stands in the place of the length advantage A_len when it is not simply added: targets, shaping, and its finish.

1. **Target.** A state t tokens into a completion that should have n is worth V*_t = -(1 - gamma^(n - t)), 0 from n on.
   The token's signal is how much nearer to it the realised return came than the critic expected,

       |V_t - V*_t| - |G_t - V*_t|.

   It presses from both sides. For n = 0 it is A_len, for n without limit -A_len: targets lie between s > 0 and s < 0.
2. **Shaping.** The reward-to-go of F_t = Phi(s_{t+1}) - Phi(s_t), Phi = V and 0 wherever the completion ends, is -V_t:
   a baseline. The discounted form, gamma * Phi(s_{t+1}) - Phi(s_t), adds what (1 - gamma) takes from every later state.
3. **Finish.** Scale, clip, and how many tokens share a number.

Values where the mask is 0 may hold anything. Shapes: B completions, T tokens; a state has the index of the token that
follows it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lenvm_rl.advantages import Advantages
from lenvm_rl.advantages.statistics import row_moments
from lenvm_rl.credit import LengthCredit, std_over_gated
from lenvm_rl.length import remaining_to_value

Reduce = Callable[[Tensor], Tensor]


def length_signal(
    advantages: Advantages, values: Tensor, mask: Tensor, credit: LengthCredit, *, gamma: float, target: Tensor | None
) -> Tensor:
    """(B, T) what each token did to the length, by the mode of the credit: before scale, clip, gate and coefficient.

    Args:
        advantages: of `compute_advantages`.
        values, mask, target, gamma: as below; a target wins over the length advantage.
        credit: the settings.
    """
    if target is not None:
        return target_signal(values, advantages.returns, mask, target, gamma)
    if credit.mode == "shaping":
        return shaping_to_go(values, mask, gamma, discounted=credit.discounted)
    return advantages.length


def target_signal(values: Tensor, returns: Tensor, mask: Tensor, target: Tensor, gamma: float) -> Tensor:
    """How much nearer to the target length each token's return came than the critic expected before it.

    Args:
        values: (B, T) length values.
        returns: (B, T) lambda-returns of the length critic.
        mask: (B, T) bool, the policy's own tokens.
        target: (B,) tokens that each completion should have, the end token included; float.
        gamma: of the critic.

    Returns:
        (B, T), 0 where the mask is 0.
    """
    before = mask.cumsum(1) - mask.long()  # tokens of the policy so far
    wanted = remaining_to_value((target[:, None] - before).clamp(min=0.0), gamma)
    signal = (values.float() - wanted).abs() - (returns - wanted).abs()
    return torch.where(mask, signal, 0.0)


def shaping_to_go(values: Tensor, mask: Tensor, gamma: float, *, discounted: bool) -> Tensor:
    """What is still to come of the shaping rewards, undiscounted, at each token.

    Args:
        values: (B, T) length values, the potential Phi of the states before each token.
        mask: (B, T) bool, the policy's own tokens.
        gamma: of the critic; the discount inside the discounted form.
        discounted: F = gamma * Phi(s') - Phi(s) instead of Phi(s') - Phi(s).

    Returns:
        (B, T), 0 where the mask is 0.
    """
    potential = torch.where(mask, values.float(), 0.0)
    if not discounted:
        return -potential
    later = potential.flip(1).cumsum(1).flip(1) - potential
    return torch.where(mask, -potential - (1.0 - gamma) * later, 0.0)


def finished_signal(
    signal: Tensor, mask: Tensor, gate: Tensor, credit: LengthCredit, reduce: Reduce = lambda sums: sums
) -> Tensor:
    """The signal on its scale, clipped, shared as widely as `credit.resolution` says, and gated.

    Args:
        signal: (B, T), 0 where the mask is 0.
        mask: (B, T) bool.
        gate: (B,) in [0, 1].
        credit: the settings.
        reduce: adds up a tensor over processes; called the same number of times on each.

    Returns:
        (B, T): what the coefficient multiplies.
    """
    felt = mask & (gate > 0)[:, None]
    if credit.scale == "std":
        signal = signal / std_over_gated(mask.sum(1), row_moments(signal, mask), gate, reduce)
    if credit.clip is not None:
        signal = signal.clamp(-credit.clip, credit.clip)
    if credit.resolution == "completion":
        signal = (signal.sum(1) / mask.sum(1).clamp(min=1))[:, None].expand_as(signal)
    elif credit.resolution == "batch":
        tokens, total = reduce(torch.stack([felt.sum().double(), signal[felt].double().sum()]))
        signal = (total / tokens.clamp(min=1)).to(signal.dtype).expand_as(signal)
    return torch.where(mask, gate[:, None] * signal, 0.0)
