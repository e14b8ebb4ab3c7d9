"""Which conditions of policy invariance a run with potential-based shaping breaks (LenVM eq. 28-32).

Shaping leaves the order of policies as it is only if (a) the discount of the objective is the one in the shaping
reward, (b) the potential does not change, (c) it is 0 wherever a completion ends, (d) nothing that depends on the
outcome, and no normalisation, touches the shaped return, (e) a task critic estimates the shaped return, and (f) the
loss does not weigh a token by its own completion's length. (c) holds by construction. Each broken one is named, and the
run goes on: shaping is then a length signal like any other. Two things that change the coefficient or the scale are no
breach: a batch whose critic is trusted less has another baseline, and whitening divides a whole batch alike.
"""

from typing import Any

from lenvm_rl.trainers.length_settings import SHARED

AVERAGED_PER_COMPLETION = ("grpo", "sapo")
"""Loss types of TRL 1.16 that divide the tokens of a completion by their number."""


def broken_conditions(args: Any, *, in_rewards: bool = False) -> list[str]:
    """Sentences, one for each condition that the settings break.

    Args:
        args: configuration of a trainer, with `LengthSettings`.
        in_rewards: shaping is part of the task rewards (PPO): of all completions, and under the objective's discount.
    """
    broken = []
    if args.length_shaping_discounted and not in_rewards:
        broken.append(
            "the discount: the shaping reward is discounted and GRPO's objective is not, so later states are taxed "
            "(length_shaping_discounted=False)"
        )
    if args.length_critic_update != "frozen" or args.length_critic == SHARED:
        broken.append("the potential: the critic learns during the run (length_critic_update='frozen')")
    if not in_rewards and (args.length_gate != "all" or not args.length_unsolved_groups):
        broken.append(
            "the gate: who is shaped depends on the outcome (length_gate='all' with length_unsolved_groups=True)"
        )
    if args.length_scale != "none":
        broken.append("the normalisation: the shaped return is scaled by its own batch (length_scale='none')")
    if args.length_clip is not None:
        broken.append("the clip: large potentials are cut (length_clip=None)")
    if args.length_resolution != "token":
        broken.append("the resolution: states share a potential (length_resolution='token')")
    if in_rewards and args.lam < 1.0 and args.length_controller != "none":
        broken.append(
            "the coefficient: it changes, and the task critic still estimates the return under that of earlier batches "
            "(length_controller='none')"
        )
    if args.loss_type == "bnpo" and args.per_device_train_batch_size == 1:
        broken.append(
            "the loss: loss_type='bnpo' divides by the tokens of the micro-batch, which is one completion here "
            "(loss_type='dapo' or 'dr_grpo')"
        )
    if args.loss_type in AVERAGED_PER_COMPLETION:
        broken.append(
            f"the loss: loss_type={args.loss_type!r} divides a completion's tokens by their number, so that the "
            "potential is no baseline (loss_type='dapo' or 'dr_grpo')"
        )
    if args.mask_truncated_completions:
        broken.append("the mask: cut completions are left out, and they are the long ones")
    if args.dynamic_sampling:
        broken.append("the sampling: groups are kept by their outcomes (dynamic_sampling=False)")
    return broken
