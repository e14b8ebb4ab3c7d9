"""Whether a launch became what it asked for.

1. accelerate and torch fall back to one process, or drop DeepSpeed, without a word: the run trains on, slower and on
   another batch size, or as several runs that know nothing of each other. Trainers compare what the launcher left in
   the environment with what runs, and stop.
2. On a CPU, DeepSpeed would compile a shared-memory collective at its first start, which takes a minute, and fails
   without a compiler. gloo does the same without.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType


def check_launch(accelerator: Accelerator, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch that fell back to something smaller than it asked for.

    Args:
        accelerator: the trainer's.
        environment: what the launcher left for this process.

    Raises:
        ValueError: several processes were asked for and one runs, or each of them runs alone; DeepSpeed or FSDP was
            asked for and does not run.
    """
    running, kind = accelerator.num_processes, accelerator.distributed_type
    asked = int(environment.get("WORLD_SIZE", "1"))
    if asked > running:
        raise ValueError(
            f"The launcher started {asked} processes (WORLD_SIZE), but accelerate connected {running}: each would "
            "train alone. On a machine without an accelerator set use_cpu=True in the configuration (the recipes do so "
            "themselves); otherwise start the processes with accelerate launch or torchrun, which set LOCAL_RANK."
        )
    # accelerate's launcher of one process names an address for several where they were asked for (1.15)
    if running == 1 and "WORLD_SIZE" not in environment and {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys():
        raise ValueError(
            "accelerate launch was asked for several processes and started one: on a machine without an accelerator "
            "neither --num_processes, nor --cpu, nor distributed_type MULTI_CPU is enough. Launch with --config_file "
            "recipes/accelerate/cpu_ddp.yaml (or cpu_zero2.yaml, cpu_zero3.yaml), or with torchrun --nproc_per_node 2. "
            "If one process is what you want, unset MASTER_ADDR."
        )
    if _is_true(environment, "ACCELERATE_USE_DEEPSPEED") and kind != DistributedType.DEEPSPEED:
        raise ValueError(
            f"The launch asked for DeepSpeed, but accelerate dropped it and runs {kind.value}: ACCELERATE_USE_CPU does "
            "that. Unset it; on a machine without an accelerator set use_cpu=True in the trainer's configuration."
        )
    if kind == DistributedType.DEEPSPEED and not torch.distributed.is_initialized():
        raise ValueError(
            "DeepSpeed was asked for in a process that no launcher started: start it with accelerate launch "
            "--config_file recipes/accelerate/zero2.yaml, or with torchrun --nproc_per_node N."
        )
    if _is_true(environment, "ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise ValueError(
            f"The launch asked for FSDP, but accelerate runs {kind.value}: it shards on accelerators only, and over "
            "several processes. Without one, take recipes/accelerate/cpu_zero3.yaml, which shards as well."
        )


def avoid_compiled_collectives() -> None:
    """Have DeepSpeed use gloo on a CPU instead of an operator that it would compile. Call it before DeepSpeed connects.

    Without effect on accelerators, for which DeepSpeed has no such operator.
    """
    import deepspeed  # 3 s, and not installed everywhere

    operators: dict[str, Any] = deepspeed.ops.__compatible_ops__
    operators["deepspeed_shm_comm"] = False


def _is_true(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1")
