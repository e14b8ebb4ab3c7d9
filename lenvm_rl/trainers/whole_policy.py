"""The policy of a trainer, in one piece, for whoever samples from it outside training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from lenvm_rl.trainers.critic_placement import is_partitioned


@contextmanager
def whole_policy(trainer: GRPOTrainer) -> Iterator[PreTrainedModel]:
    """The policy without its wrappers, on this process's device, before, during and after training.

    Under ZeRO-3 the weights are gathered once for the whole block, as TRL gathers them to generate, unless
    ``ds3_gather_for_generation=False``. Collective: all processes enter, and call `generate` equally often inside,
    since transformers keeps them in step token by token.

    Raises:
        ValueError: ``ds3_gather_for_generation=False`` before training, when there is nothing yet that would gather.
    """
    args: Any = trainer.args
    policy: Any = trainer.model_wrapped  # an engine once training began, the bare model before
    gather, bare = args.ds3_gather_for_generation, policy is trainer.model
    if bare and not gather and is_partitioned(policy):
        raise ValueError(
            "ds3_gather_for_generation=False leaves the policy in parts, and before training DeepSpeed has nothing yet "
            "that would put them together: set evaluate_before=False, or ds3_gather_for_generation=True."
        )
    with (
        unwrap_model_for_generation(
            policy,
            trainer.accelerator,
            gather_deepspeed3_params=gather,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        trainer._dist.summon_full_params(policy, recurse=False),
    ):
        if not is_partitioned(model):  # DeepSpeed and FSDP leave it where it is until training begins
            model.to(trainer.accelerator.device)
        yield model
