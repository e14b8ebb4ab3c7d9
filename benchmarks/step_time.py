"""Step time of LenVM-GRPO and LenVM-PPO over that of plain `trl.GRPOTrainer`, on the embedded default, in one run.

    python benchmarks/step_time.py

All train from the same weights with the same seed; the coefficient is so small that their completions stay the same.
They take turns, so that a noisy machine is noisy for all: a ratio is that of one round, and the table has the median
over rounds. Where every batch of rollouts makes two updates, TRL computes old log-probabilities, and a shared critic
reads them. Writes docs/data/step_time.json and prints the table.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.launch import run
from lenvm_rl.tasks import load_task
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer
from lenvm_rl.trainers.ppo import LenVMPPOConfig, LenVMPPOTrainer

STOCK = "GRPOTrainer"
PRETRAINED = {"length_critic": "embedded/length_critic"}
VARIANTS: dict[str, dict[str, Any]] = {
    STOCK: {},
    "frozen critic": PRETRAINED,
    "online critic": {**PRETRAINED, "length_critic_update": "online"},
    "shared critic": {"length_critic": "shared"},
    "PPO": {"algorithm": "ppo", "length_coef": 0.0},
    "PPO, frozen critic": {"algorithm": "ppo", **PRETRAINED},
    "PPO, both critics shared": {"algorithm": "ppo", "length_critic": "shared", "value_model": "shared"},
}
TRAINERS: dict[str, tuple[Any, Any]] = {
    "grpo": (LenVMGRPOConfig, LenVMGRPOTrainer),
    "ppo": (LenVMPPOConfig, LenVMPPOTrainer),
}
REGIMES: dict[str, dict[str, Any]] = {"one update": {"num_iterations": 1}, "two updates": {"num_iterations": 2}}
WARM_UP = 2
"""Steps that are not counted."""


@dataclass
class BenchmarkArguments:
    rounds: int = 4
    steps: int = 8
    """Optimizer steps of each trainer in each round."""
    threads: int = 1
    output: Path = Path("docs/data/step_time.json")


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(args.threads)
    result = {name: measure(regime, args.rounds, args.steps) for name, regime in REGIMES.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"threads": args.threads, "rounds": args.rounds, "steps": args.steps, **result})
    print("| | " + " | ".join(REGIMES) + " |\n|---|" + "---|" * len(REGIMES))
    for variant in VARIANTS:
        print(f"| {variant} | " + " | ".join(f"{result[name][variant]['ratio']:.3f}" for name in REGIMES) + " |")


def measure(regime: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Of each variant: seconds of a step and the ratio to stock TRL, medians over rounds, and the mean length."""
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    lengths: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(rounds):
        for name in list(VARIANTS)[:: 1 if turn % 2 == 0 else -1]:
            counted = train(name, regime, seed=turn, steps=steps)[WARM_UP:]
            seconds[name].append(statistics.mean(entry["step_time"] for entry in counted))
            tokens = [entry["completions/mean_length"] for entry in counted if "completions/mean_length" in entry]
            lengths[name].append(statistics.mean(tokens))
    return {
        name: {
            "seconds": statistics.median(own),
            "ratio": statistics.median(ours / stock for ours, stock in zip(own, seconds[STOCK], strict=True)),
            "tokens": statistics.mean(lengths[name]),
        }
        for name, own in seconds.items()
    }


def train(name: str, regime: dict[str, Any], seed: int, steps: int) -> list[dict[str, Any]]:
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
            **regime,
        }
        trainer_class: type[GRPOTrainer] = GRPOTrainer
        config = GRPOConfig(**options)
        if name != STOCK:
            own = {"length_coef": 1e-9, "length_token_budget": 2048, **VARIANTS[name]}
            config_class, trainer_class = TRAINERS[own.pop("algorithm", "grpo")]
            config = config_class(**own, **options)
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
