"""Bytes that each of two processes really holds under ZeRO, beside the formulas of `lenvm_rl/scaling.py`.

    python benchmarks/zero_memory.py --write

A Llama of 107k parameters under DeepSpeed with torch's AdamW, float32 and bf16, in the middle of gradient accumulation,
when everything is there. Tensors that share their memory are counted once. --write puts the table between the markers
of docs/scaling.md.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from marked import DOCS, write_between
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from lenvm_rl.launch import run
from lenvm_rl.launch_check import avoid_compiled_collectives
from lenvm_rl.scaling import Held, trained

PROCESSES = 2
STAGE3 = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
"""Nothing stays whole because it is small, and nothing is gathered ahead."""


@dataclass
class MemoryArguments:
    write: bool = False
    json: str | None = None
    """File for the measured bytes."""
    worker: str | None = None
    """Set by this script for its two processes."""


def main() -> None:
    (args,) = HfArgumentParser([MemoryArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    if args.worker is not None:
        measure(Path(args.worker))
        return
    with TemporaryDirectory() as folder:
        ranks = measured(Path(folder))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(ranks))
    lines = ["| stage | weights in | | weights | gradients | optimizer |", "|---|---|---|---|---|---|"]
    for case in zip(*ranks, strict=True):
        stage, weight_bytes, parameters = (case[0][name] for name in ("stage", "weight_bytes", "parameters"))
        expected = trained(parameters, stage=stage, gpus=PROCESSES, weight_bytes=weight_bytes)
        dtype = "bf16" if weight_bytes == 2 else "float32"
        for name, held in (("formula", asdict(expected)), *((f"process {i}", one) for i, one in enumerate(case))):
            cells = " | ".join(f"{held[part]:,.0f}" for part in ("weights", "gradients", "optimizer"))
            lines.append(f"| {stage} | {dtype} | {name} | {cells} |")
    print("\n".join(lines))
    if args.write:
        write_between(DOCS / "scaling.md", "measured memory", "\n".join(lines))


def measured(folder: Path) -> list[list[dict[str, Any]]]:
    """For each process, what it holds in each case."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    try:
        for rank in map(str, range(PROCESSES)):
            log = (folder / f"log{rank}").open("w")
            environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, __file__, "--worker", str(folder)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"A process failed:\n{(folder / 'log0').read_text()[-3000:]}")
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(PROCESSES)]


def measure(folder: Path) -> None:
    """In each process: train a little under each stage, and write down what is held."""
    import deepspeed

    avoid_compiled_collectives()
    deepspeed.init_distributed("gloo", verbose=False)
    cases = []
    for stage in (1, 2, 3):
        for weight_bytes in (4, 2):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=256,
                    hidden_size=64,
                    intermediate_size=128,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    tie_word_embeddings=False,
                )
            )
            parameters = sum(parameter.numel() for parameter in model.parameters())
            config = {
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 2,
                "bf16": {"enabled": weight_bytes == 2},
                "zero_optimization": {"stage": stage, "reduce_bucket_size": 4096, **STAGE3},
                "zero_allow_untested_optimizer": True,
            }
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config
            )
            ids = torch.arange(32).reshape(2, 16)
            for micro_step in range(3):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                if micro_step < 2:
                    engine.step()
            largest = max(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
            about = {"stage": stage, "weight_bytes": weight_bytes, "parameters": parameters, "largest": largest}
            cases.append(about | asdict(held(engine)))
            engine.destroy()
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(cases))


def held(engine: Any) -> Held:
    """What an engine holds in this process, found where DeepSpeed 0.19 keeps it."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    weights = [getattr(parameter, "ds_tensor", parameter.data) for parameter in parameters]
    masters = getattr(optimizer, "single_partition_of_fp32_groups", None)
    masters = optimizer.fp32_partitioned_groups_flat if masters is None else masters
    gradients = [*(parameter.grad for parameter in parameters), *optimizer.averaged_gradients.values()]
    # stage 3's partitions, and stage 2's until the last micro-step
    gradients += [getattr(optimizer, "grad_partitions_flat_buffer", None)]
    gradients += getattr(optimizer, "all_grad_tensors", {}).values()
    moments = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return Held(unique_bytes(weights), unique_bytes(gradients), unique_bytes([*masters, *moments]))


def unique_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the memory behind tensors, and lists of them."""
    storages: dict[int, int] = {}
    waiting = list(tensors)
    while waiting:
        tensor = waiting.pop()
        if isinstance(tensor, list | tuple):
            waiting += tensor
        elif tensor is not None:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    run(main)
