"""Where a frozen critic lives: whole on every process, or sharded over them by ZeRO-3.

1. A replica is the default. Its forwards are not collective, and a critic is small beside policy, gradients and
   optimizer states.
2. Sharded, its decoder gets an inference engine of its own, as TRL's reference model does, in that engine's dtype. The
   head, a few million numbers, stays a whole float32 replica: an engine in bfloat16 would round it.
3. Either way it is no submodule of the policy: vLLM's weight updates, checkpoints, gradient clipping and the gathering
   of weights for generation must not see it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations import deepspeed as hf_deepspeed
from trl.models import prepare_deepspeed

from lenvm_rl.model import LengthValueConfig, LengthValueHead, LengthValueModel, LengthValueOutput

CriticPlacement = Literal["replica", "sharded"]


class ShardedCritic(nn.Module):
    """A Length Value Model whose decoder is sharded by ZeRO-3. Every process must run the same number of forwards.

    Args:
        model: loaded whole on every process, or under ZeRO-3 initialisation; it is taken over.
        accelerator: the trainer's, under ZeRO-3.
    """

    def __init__(self, model: LengthValueModel, accelerator: Accelerator) -> None:
        super().__init__()
        import deepspeed

        self.config: LengthValueConfig = model.config
        self.head = LengthValueHead(model.config.hidden_size).to(accelerator.device)
        with torch.no_grad(), deepspeed.zero.GatheredParameters(list(model.v_head.parameters())):
            for own, loaded in zip(self.head.parameters(), model.v_head.parameters(), strict=True):
                own.copy_(loaded)
        self.decoder = prepare_deepspeed(model.model, accelerator)

    def forward(self, input_ids: Tensor) -> LengthValueOutput:
        """Head outputs (B, T) float32 of right-padded ids (B, T). Collective."""
        hidden = self.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
        return LengthValueOutput(logits=self.head(hidden))


def place_critic(
    model: LengthValueModel, accelerator: Accelerator, *, sharded: bool
) -> LengthValueModel | ShardedCritic:
    """The critic where it was asked for; one that was loaded under ZeRO-3 initialisation is sharded in any case."""
    if sharded or is_partitioned(model):
        return ShardedCritic(model, accelerator)
    return model.to(accelerator.device)


def check_placement(placement: str, zero_stage: int | None) -> None:
    """Refuse a placement that does not exist, or that this launch cannot give.

    Raises:
        ValueError: either of them.
    """
    if placement not in get_args(CriticPlacement):
        raise ValueError(
            f"length_critic_placement must be one of {', '.join(get_args(CriticPlacement))}, got {placement!r}."
        )
    if placement == "sharded" and zero_stage != 3:
        raise ValueError(
            "length_critic_placement='sharded' shards the critic by DeepSpeed ZeRO-3, but this run has "
            f"{'no DeepSpeed' if zero_stage is None else f'ZeRO-{zero_stage}'}: launch with --config_file "
            "recipes/accelerate/zero3.yaml, or leave the critic a 'replica'."
        )


def is_partitioned(model: nn.Module) -> bool:
    """The model was loaded under ZeRO-3 initialisation, so that every process holds a part of each weight."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, `from_pretrained` loads whole weights although ZeRO-3 would have it shard every model.

    There is no public switch (transformers 5.23): the reference to its settings is put aside.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference
