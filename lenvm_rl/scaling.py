"""What a run needs on paper: memory per GPU, communication and arithmetic of one step, and what the critic adds.

1. Weights, gradients and optimizer states of policy, reference and critics under each ZeRO stage, as DeepSpeed holds
   them; `tests/test_scaling.py` compares them with what two processes hold.
2. Left out: activations and logits (the batch decides, and `gradient_checkpointing`), communication buffers
   (`reduce_bucket_size`), the KV cache, and the attention's share of the arithmetic, which grows with the context: 6 %
   of a 7B model's at 4,096 tokens.
3. Numbers of parameters are floats, so that 7e9 is one.
"""

from dataclasses import dataclass

STAGES = (0, 1, 2, 3)
"""Of ZeRO; 0 is data parallelism without it."""
_MASTER, _MOMENTS = 4, 8  # bytes per parameter: a copy of the weights in float32, and Adam's two moments


@dataclass(frozen=True)
class Held:
    """Bytes on one GPU."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def trained(parameters: float, *, stage: int, gpus: int, weight_bytes: int = 2) -> Held:
    """A model that Adam trains.

    Args:
        parameters: all of them trainable.
        stage: of ZeRO.
        gpus: processes among which it is sharded.
        weight_bytes: 2 for bf16, 4 for float32.

    Raises:
        ValueError: no such stage, or no GPU.

    The gradients of stages 0 and 1 are whole, those of 2 and 3 sharded. DeepSpeed keeps the float32 copy of the weights
    that Adam works on even beside float32 weights; without DeepSpeed (stage 0) the weights are float32 and are it.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage}, but ZeRO has the stages 1, 2 and 3; 0 is without it.")
    if gpus < 1:
        raise ValueError(f"gpus is {gpus}, but a run needs at least one.")
    if stage == 0:
        return Held(4 * parameters, 4 * parameters, _MOMENTS * parameters)
    return Held(
        weights=weight_bytes * parameters / (gpus if stage == 3 else 1),
        gradients=weight_bytes * parameters / (gpus if stage >= 2 else 1),
        optimizer=(_MASTER + _MOMENTS) * parameters / gpus,
    )


def frozen(parameters: float, *, shards: int = 1, weight_bytes: int = 2) -> Held:
    """A model that is only asked: the reference, or the length critic."""
    return Held(weight_bytes * parameters / shards)


@dataclass(frozen=True)
class Step:
    """The size of one optimizer step, over all GPUs."""

    completions: int
    prompt_tokens: int
    completion_tokens: int
    iterations: int = 1
    """Updates per rollout (`num_iterations`)."""
    recompute: bool = True
    """`gradient_checkpointing`: the update does its forward twice."""

    @property
    def tokens(self) -> int:
        return self.completions * (self.prompt_tokens + self.completion_tokens)


@dataclass(frozen=True)
class Arithmetic:
    """Floating-point operations of a step, over all GPUs: 2 per parameter and token forward, 4 backward."""

    rollout: float
    update: float
    reference: float
    length_critic: float
    task_critic: float

    @property
    def length_critic_share(self) -> float:
        """Of everything."""
        return self.length_critic / (
            self.rollout + self.update + self.reference + self.length_critic + self.task_critic
        )


def arithmetic(
    step: Step, policy: float, critic: float, *, reference: bool = False, task_critic: float = 0.0
) -> Arithmetic:
    """Of a step of `policy` parameters with a frozen length critic, and a trained task critic if it has parameters."""
    forward = 2.0 * step.tokens
    training = forward * (4 if step.recompute else 3) * step.iterations
    return Arithmetic(
        rollout=forward * policy,
        update=training * policy,
        reference=forward * policy * reference,
        length_critic=forward * critic,
        task_critic=(forward + training) * task_critic,
    )


def update_traffic(
    parameters: float, *, stage: int, gpus: int, micro_steps: int = 1, iterations: int = 1, weight_bytes: int = 2
) -> float:
    """Bytes that each GPU receives for the updates of one rollout.

    Args:
        micro_steps: of gradient accumulation. Stages 2 and 3 reduce the gradients in each, 3 also gathers the weights
            twice in each, forward and backward.

    Others as for `trained` and `Step`. A reduction to shards or a gathering of them moves all but the own shard once.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage}, but ZeRO has the stages 1, 2 and 3; 0 is without it.")
    if stage == 0:
        once, weight_bytes = 2.0, 4  # reduced and gathered
    else:
        once = {1: 2.0, 2: micro_steps + 1.0, 3: 3.0 * micro_steps}[stage]
    return iterations * once * weight_bytes * parameters * (gpus - 1) / gpus


def gathering_traffic(parameters: float, *, gpus: int, times: int = 1, weight_bytes: int = 2) -> float:
    """Bytes that each GPU receives when a sharded model is gathered: once to generate, once per forward of a critic."""
    return times * weight_bytes * parameters * (gpus - 1) / gpus


def largest_replica(memory: float, others: float, *, reserve: float, weight_bytes: int = 2) -> float:
    """Parameters of the largest critic that fits on every GPU whole; a larger one must be sharded.

    Args:
        memory: of a GPU, bytes.
        others: bytes of policy, reference and optimizer on it.
        reserve: bytes for activations, buffers and the KV cache.
    """
    return max(0.0, (memory - others - reserve) / weight_bytes)


def hiding_tokens(flops: float, bandwidth: float, *, weight_bytes: int = 2) -> float:
    """Tokens per forward and GPU from which a sharded model's gathering takes no longer than its arithmetic.

    Args:
        flops: that a GPU reaches per second.
        bandwidth: bytes per second that a GPU receives.

    Independent of the size of the model: both grow with it.
    """
    return weight_bytes * flops / (2 * bandwidth)


def gpus_per_server(cost: Arithmetic) -> float:
    """GPUs that one more GPU with the only critic could serve without being waited for."""
    others = cost.rollout + cost.update + cost.reference + cost.task_critic
    return others / cost.length_critic if cost.length_critic else float("inf")
