"""Step time of LenVM-GRPO over that of plain `trl.GRPOTrainer`, on the embedded default, in one run.

    python benchmarks/step_time.py

Both train from the same weights with the same seed; the coefficient is so small that their completions stay the same.
They take turns, so that a noisy machine is noisy for both. Writes docs/data/step_time.json and prints the ratio.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.assets import model_path
from lenvm_rl.launch import run
from lenvm_rl.tasks import load_task
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer


@dataclass
class BenchmarkArguments:
    rounds: int = 4
    steps: int = 6
    """Optimizer steps of each trainer in each round; the first of them warms up and is not counted."""
    threads: int = 1
    output: str = "docs/data/step_time.json"


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(args.threads)
    times: dict[str, list[float]] = {"GRPOTrainer": [], "LenVMGRPOTrainer": []}
    lengths: dict[str, list[float]] = {name: [] for name in times}
    for turn in range(args.rounds):
        order = list(times) if turn % 2 == 0 else list(times)[::-1]
        for name in order:
            history = train(name, seed=turn, steps=args.steps)
            times[name] += [entry["step_time"] for entry in history[1:]]
            lengths[name] += [entry["completions/mean_length"] for entry in history[1:]]
    stock, ours = (statistics.median(times[name]) for name in times)
    result = {
        "seconds_per_step": {"GRPOTrainer": stock, "LenVMGRPOTrainer": ours},
        "ratio": ours / stock,
        "mean_length": {name: statistics.mean(values) for name, values in lengths.items()},
        "steps": len(times["GRPOTrainer"]),
        "threads": args.threads,
    }
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def train(name: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Log entries of the optimizer steps."""
    policy = model_path("embedded/policy")
    with TemporaryDirectory() as output:
        options: dict[str, Any] = {
            "output_dir": output,
            "max_steps": steps,
            "per_device_train_batch_size": 128,
            "num_generations": 8,
            "max_completion_length": 128,
            "learning_rate": 1e-6,
            "seed": seed,
            "use_cpu": not torch.accelerator.is_available(),
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        trainer_class: type[GRPOTrainer] = GRPOTrainer
        config = GRPOConfig(**options)
        if name == "LenVMGRPOTrainer":
            trainer_class = LenVMGRPOTrainer
            length: dict[str, Any] = {
                "length_critic": "embedded/length_critic",
                "length_coef": 1e-9,
                "length_token_budget": 2048,
            }
            config = LenVMGRPOConfig(**length, **options)
        task = load_task("arithmetic", train_size=None, held_out_size=0)
        trainer = trainer_class(
            model=AutoModelForCausalLM.from_pretrained(policy),
            reward_funcs=task.reward_funcs,
            args=config,
            train_dataset=task.train,
            processing_class=AutoTokenizer.from_pretrained(policy),
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "step_time" in entry and "loss" in entry]


if __name__ == "__main__":
    run(main)
