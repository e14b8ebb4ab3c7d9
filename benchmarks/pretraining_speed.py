"""Tokens per second and peak memory of LenVM pretraining, beside a straightforward trainer, in one run.

    python benchmarks/pretraining_speed.py

The straightforward one does what the official code does: it pads, computes and discards the vocabulary logits, and
makes its targets in float64 by a loop over time. Both are transformers' Trainer on the same rollouts in the same
batches and start from the same weights. Each lives in a process of its own, and they take turns, so that a noisy
machine is noisy for both; time is that of the processor, since the machine may be shared. SmolLM2 takes part where
recipes/smollm2.py has built it. Writes docs/data/pretraining_speed.json and prints a table.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lenvm_rl.assets import model_path
from lenvm_rl.launch import run
from lenvm_rl.model import LengthValueHead, LengthValueModel
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.data import LengthValueCollator
from lenvm_rl.pretraining.generators import TransformersGenerator
from lenvm_rl.pretraining.rollouts import sample_rollouts
from lenvm_rl.pretraining.trainer import LengthValueTrainer
from lenvm_rl.sampling import SamplingSettings
from lenvm_rl.tasks import load_task

SMOLLM2 = "models/smollm2-135m-instruct"
PLAIN, OURS = "straightforward", "LengthValueTrainer"


@dataclass
class Case:
    """What is trained, on how much."""

    model: str
    task: str
    prompts: int
    rows: int
    """Rollouts of an optimizer step."""
    settings: SamplingSettings
    gamma: float
    steps: int
    """Optimizer steps of each trainer in each turn; the first one warms up and is not counted."""
    conversational: bool = False
    instruction: str | None = None


CASES = {
    "embedded": Case("embedded/policy", "arithmetic", 512, 128, SamplingSettings(128), 0.9646616, steps=5),
    "SmolLM2-135M": Case(
        SMOLLM2,
        "gym:chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=1",
        64,
        8,
        SamplingSettings(128, temperature=0.7),
        0.9446,
        steps=6,
        conversational=True,
        instruction="Explain in a sentence or two, then end with the answer.",  # all as in smollm2_lenvm.yaml
    ),
}


@dataclass
class BenchmarkArguments:
    turns: int = 4
    threads: int = 1
    output: str = "docs/data/pretraining_speed.json"
    rollouts: str = "outputs/pretraining_speed"
    """Where rollouts are kept, so that they are sampled once."""


class PlainModel(nn.Module):
    """A causal language model, vocabulary head included, and a value head."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.lm = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        self.v_head = LengthValueHead(self.lm.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        output = self.lm(input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        return {"vocabulary": output.logits.float(), "values": self.v_head(output.hidden_states[-1])}


class PlainTrainer(Trainer):
    """Targets from a loop over time, in float64."""

    gamma: float

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        output = model(inputs["input_ids"], inputs["attention_mask"])
        values = -torch.sigmoid(output["values"].double())
        known, finished = labels >= 0, (labels == 0).any(1)
        old, targets = values.detach(), torch.zeros_like(values)
        advantage = torch.zeros_like(values[:, 0])
        for t in reversed(range(labels.size(1) - 1)):
            acting = labels[:, t] > 0
            last = labels[:, t] == 1
            follows = torch.where(last & finished, torch.zeros_like(advantage), old[:, t + 1])
            delta = -(1 - self.gamma) + self.gamma * follows - old[:, t]
            advantage = torch.where(last, delta, delta + self.gamma * advantage) * acting
            targets[:, t] = torch.where(acting, advantage + old[:, t], torch.zeros_like(advantage))
        loss = ((values - targets).square() * known).sum() / known.sum()
        return (loss, output) if return_outputs else loss


class PaddingCollator(LengthValueCollator):
    def __call__(self, rollouts: Any) -> dict[str, Tensor]:
        batch = super().__call__(rollouts)
        lengths = torch.tensor([len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rollouts])
        mask = torch.arange(batch["input_ids"].size(1)) < lengths[:, None]
        return {**batch, "attention_mask": mask.long()}


class Clock(TrainerCallback):
    """Processor seconds of each optimizer step, the making of its batch included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.process_time())


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(args.threads)
    names = [name for name, case in CASES.items() if case.model != SMOLLM2 or Path(SMOLLM2).is_dir()]
    results = {name: measure(CASES[name], args, Path(args.rollouts) / name) for name in names}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"threads": args.threads, **results}, indent=2) + "\n")
    print(table(results))


def measure(case: Case, args: BenchmarkArguments, folder: Path) -> dict[str, Any]:
    rollouts_of(case, folder)
    context = multiprocessing.get_context("spawn")
    pipes, workers = {}, []
    for name in (PLAIN, OURS):
        pipes[name], theirs = context.Pipe()
        workers.append(context.Process(target=work, args=(name, case, str(folder), args.threads, theirs), daemon=True))
        workers[-1].start()
        pipes[name].recv()  # it is ready; the next one loads alone
    found: dict[str, list[dict[str, float]]] = {PLAIN: [], OURS: []}
    for turn in range(args.turns):
        for name in (PLAIN, OURS) if turn % 2 == 0 else (OURS, PLAIN):
            pipes[name].send(turn)
            found[name].append(pipes[name].recv())
            print(f"{case.model}, turn {turn}: {name} {found[name][-1]['tokens_per_second']:,.0f} tokens/s", flush=True)
    for pipe, worker in zip(pipes.values(), workers, strict=True):
        pipe.send(None)
        worker.join()
    ratios = [
        ours["tokens_per_second"] / plain["tokens_per_second"]
        for plain, ours in zip(found[PLAIN], found[OURS], strict=True)
    ]
    return {
        "tokens_per_second": {
            name: statistics.median(turn["tokens_per_second"] for turn in turns) for name, turns in found.items()
        },
        "peak_memory_mb": {name: max(turn["peak_memory_mb"] for turn in turns) for name, turns in found.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "share_of_padding": found[PLAIN][0]["share_of_padding"],
    }


def rollouts_of(case: Case, folder: Path) -> Dataset:
    path = model_path(case.model)
    tokenizer = AutoTokenizer.from_pretrained(path)
    task = load_task(
        case.task,
        train_size=case.prompts,
        held_out_size=0,
        conversational=case.conversational,
        instruction=case.instruction,
    )
    policy: Any = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    generator = TransformersGenerator(policy, tokenizer, batch_size=64, name=case.model)
    return sample_rollouts(
        generator, tokenizer, task.train["prompt"], case.settings, completions_per_prompt=1, folder=folder
    )


def work(name: str, case: Case, folder: str, threads: int, pipe: Connection) -> None:
    """Train whenever told to, and tell how fast."""
    from lenvm_rl.pretraining.storage import load_rollouts

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rollouts, path = load_rollouts(folder), model_path(case.model)
    clock, tokens, positions = Clock(), [0], [0]
    with TemporaryDirectory() as output:
        options: dict[str, Any] = {
            "output_dir": output,
            "max_steps": case.steps,
            "per_device_train_batch_size": case.rows,
            "learning_rate": 1e-5,
            "use_cpu": not torch.accelerator.is_available(),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
        }
        trainer: Any
        if name == OURS:
            critic = LengthValueModel.from_backbone(path, case.gamma, dtype="float32")
            arguments = LengthValueTrainingArguments(**options)
            trainer = LengthValueTrainer(critic, arguments, train_dataset=rollouts, pad_token_id=0)
        else:
            plain = TrainingArguments(remove_unused_columns=False, **options)
            trainer = PlainTrainer(PlainModel(path), plain, data_collator=PaddingCollator(0), train_dataset=rollouts)
            trainer.gamma = case.gamma
        trainer.add_callback(clock)
        collate = trainer.data_collator

        def counted(rows: Any) -> Any:
            batch = collate(rows)
            tokens.append(sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows))
            positions.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counted
        pipe.send("ready")
        while (turn := pipe.recv()) is not None:
            trainer.args.seed = turn
            clock.marks, tokens[:], positions[:] = [], [], []
            trainer.train()
            seconds = clock.marks[-1] - clock.marks[0]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
            pipe.send(
                {
                    # a loader makes a batch ahead: what was trained on are the steps' own
                    "tokens_per_second": sum(tokens[1 : case.steps]) / seconds,
                    "peak_memory_mb": peak,
                    "share_of_padding": 1 - sum(tokens) / sum(positions),
                }
            )


def table(results: dict[str, Any]) -> str:
    lines = ["| model | trainer | tokens per second | ratio | peak memory |", "|---|---|---|---|---|"]
    for model, result in results.items():
        for name in (PLAIN, OURS):
            ratio = f"**{result['ratio']:.2f}**" if name == OURS else ""
            rate, peak = result["tokens_per_second"][name], result["peak_memory_mb"][name]
            lines.append(f"| {model} | {name} | {rate:,.0f} | {ratio} | {peak:,.0f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
