"""Time of a step and memory of LenVM-GRPO and LenVM-PPO beside those of plain `trl.GRPOTrainer`, in one run.

    python benchmarks/step_time.py             # writes docs/data/step_time.json, prints the table
    python benchmarks/step_time.py --write     # also into docs/benchmarks.md

The embedded default. All train from the same weights with the same seed; the coefficient is so small that their
completions stay the same. They take turns, so that a noisy machine is noisy for all: a ratio is that of one round, and
the table has the median over rounds. On a CPU, time is the processor's, which other processes cannot take. Where every
batch of rollouts makes two updates, TRL computes old log-probabilities, and a shared critic reads them. Memory is that
of weights, gradients and optimizer states, counted in their tensors.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from marked import DOCS, write_between
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback
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
    rounds: int = 3
    steps: int = 6
    """Optimizer steps of each trainer in each round."""
    threads: int = 1
    output: Path = Path("docs/data/step_time.json")
    write: bool = False
    """Put the table between the markers of docs/benchmarks.md."""


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(args.threads)
    result = {name: measure(regime, args.rounds, args.steps) for name, regime in REGIMES.items()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, {"threads": args.threads, "rounds": args.rounds, "steps": args.steps, **result})
    table = table_of(result)
    print(table)
    if args.write:
        write_between(DOCS / "benchmarks.md", "step time", table)


def table_of(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"| | {' | '.join(f'{name}: s, ratio' for name in REGIMES)} | memory, MB | ratio |"]
    lines.append("|---|" + "---:|" * (len(REGIMES) + 2))
    for variant in VARIANTS:
        found = [result[name][variant] for name in REGIMES]
        times = " | ".join(f"{one['seconds']:.2f}, {one['ratio']:.2f}" for one in found)
        held, stock = found[0]["bytes"], result[next(iter(REGIMES))][STOCK]["bytes"]
        lines.append(f"| {variant} | {times} | {held / 1e6:.2f} | {held / stock:.2f} |")
    return "\n".join(lines)


def measure(regime: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Of each variant: seconds of a step and the ratio to stock TRL, medians over rounds; mean length; bytes held."""
    runs: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    for turn in range(rounds):
        for name in list(VARIANTS)[:: 1 if turn % 2 == 0 else -1]:
            runs[name].append(train(name, regime, seed=turn, steps=steps))
    return {
        name: {
            "seconds": statistics.median(run.seconds for run in own),
            "ratio": statistics.median(
                run.seconds / stock.seconds for run, stock in zip(own, runs[STOCK], strict=True)
            ),
            "tokens": statistics.mean(run.tokens for run in own),
            "bytes": own[0].held,
        }
        for name, own in runs.items()
    }


@dataclass(frozen=True)
class Run:
    seconds: float
    """Of a step, the mean."""
    tokens: float
    """Of a completion, the mean."""
    held: int
    """Bytes of weights, gradients and optimizer states."""


class Stopwatch(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
            self.ends.append(time.perf_counter())
        else:
            self.ends.append(time.process_time())


def bytes_held(trainer: Any) -> int:
    """Of the policy and of every critic: weights, a gradient of each that is trained, and optimizer states."""
    models, optimizers = [trainer.model], [trainer.optimizer]
    for critic in (getattr(trainer, "length_critic", None), getattr(trainer, "task_critic", None)):
        side = getattr(critic, "side", None)
        models += [side.model] if side is not None else [critic.model] if critic is not None else []
        optimizers += [side.optimizer] if side is not None else []
    weights = [weight for model in models for weight in model.parameters()]
    states = [state for optimizer in optimizers for state in tensors(list(optimizer.state.values()))]
    found = [*weights, *(weight for weight in weights if weight.requires_grad), *states]
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def tensors(values: Any) -> Iterator[Tensor]:
    """In lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from tensors(value)


def train(name: str, regime: dict[str, Any], seed: int, steps: int) -> Run:
    """One short run."""
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
        watch = Stopwatch()
        trainer = trainer_class(
            callbacks=[watch],
            model=AutoModelForCausalLM.from_pretrained(policy),
            reward_funcs=task.reward_funcs,
            args=config,
            train_dataset=task.train,
            processing_class=AutoTokenizer.from_pretrained(policy),
        )
        trainer.train()
        lengths = [e["completions/mean_length"] for e in trainer.state.log_history if "completions/mean_length" in e]
        seconds = (watch.ends[-1] - watch.ends[WARM_UP - 1]) / (steps - WARM_UP)
        return Run(seconds, statistics.mean(lengths), bytes_held(trainer))


if __name__ == "__main__":
    run(main)
