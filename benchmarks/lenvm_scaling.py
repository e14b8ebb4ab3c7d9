"""What a Length Value Model gains from prompts, completions and size, and which of the paper's choices matter.

    python benchmarks/lenvm_scaling.py

On the embedded task, the shape of LenVM's figure 3 (validation loss over prompts, completions per prompt and model
size) and of its figures 5 and 6 (representation, discount, shuffling, precision). Each point trains one critic for the
same number of optimizer steps and evaluates it on the same held-out rollouts, in values of one discount, so that all
points can be compared. A finished point is a JSON file below --runs and is not repeated. Writes
docs/data/lenvm_scaling.json, the figures docs/figures/lenvm_scaling.png and lenvm_ablations.png, and the tables between
the markers in docs/pretraining.md.

One core: half an hour for a seed.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import numpy as np
import torch
from datasets import Dataset
from marked import write_between
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaModel, set_seed

from lenvm_rl.assets import model_path
from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.critic import micro_batches
from lenvm_rl.evaluation.length_scores import LengthValueStatistics
from lenvm_rl.evaluation.prompt_scores import prompt_scores
from lenvm_rl.launch import run
from lenvm_rl.length import logit_to_remaining
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.arguments import LengthValueTrainingArguments
from lenvm_rl.pretraining.data import LengthValueCollator, completion_lengths, prompt_groups, rollout_lengths
from lenvm_rl.pretraining.generators import TransformersGenerator
from lenvm_rl.pretraining.rollouts import sample_rollouts
from lenvm_rl.pretraining.trainer import LengthValueTrainer
from lenvm_rl.sampling import SamplingSettings
from lenvm_rl.tasks import load_task

matplotlib.use("Agg")
from matplotlib import pyplot as plt

POLICY = "embedded/policy"
LIMIT = 128
GAMMA = 0.01 ** (1 / LIMIT)
"""Of the embedded critic; all points are compared in its values."""
WIDE, DEEP = (500, 16), (4_000, 4)
"""Prompts and completions of the two sets of rollouts that the points take theirs from."""


@dataclass(frozen=True)
class Point:
    """One critic."""

    prompts: int = 2_000
    completions: int = 4
    hidden_size: int | None = None
    """Of a Llama with random weights; None starts from the policy."""
    horizon: float = 1.0
    """Horizon of its gamma, in token limits."""
    shuffled: bool = True
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    """Of `LengthValueTrainingArguments`."""


PROMPTS = {f"{n}": Point(prompts=n) for n in (60, 125, 250, 500, 1_000, 2_000, 4_000)}
COMPLETIONS = {f"{n}": Point(prompts=500, completions=n) for n in (1, 2, 4, 8, 16)}
SIZES = {f"{n}": Point(hidden_size=n) for n in (16, 32, 64, 96, 144)}
ABLATIONS = {
    "reference": Point(),
    "cross-entropy of the value": Point(settings={"loss": "bce"}),
    "length": Point(settings={"parameterization": "length"}),
    "log length": Point(settings={"parameterization": "log_length"}),
    "horizon / 4": Point(horizon=0.25),
    "horizon x 4": Point(horizon=4.0),
    "TD(0.95)": Point(settings={"td_lambda": 0.95}),
    "500 x 16, shuffled": Point(prompts=500, completions=16),
    "500 x 16, by prompt": Point(prompts=500, completions=16, shuffled=False),
    "bfloat16 activations": Point(settings={"bf16": True}),
    "bfloat16 weights": Point(dtype="bfloat16"),
}
STUDIES: dict[str, dict[str, Point]] = {
    "prompts": PROMPTS,
    "completions per prompt": COMPLETIONS,
    "hidden size": SIZES,
    "ablation": ABLATIONS,
}


@dataclass
class BenchmarkArguments:
    seeds: int = 2
    steps: int = 200
    """Optimizer steps of each critic."""
    rollouts_per_step: int = 64
    held_out_prompts: int = 500
    runs: str = "outputs/lenvm_scaling"
    docs: str = "docs"


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    rollouts = sample(args)
    results: dict[str, dict[str, list[dict[str, float]]]] = {
        study: {name: [] for name in points} for study, points in STUDIES.items()
    }
    for seed in range(args.seeds):
        for study, points in STUDIES.items():
            for name, point in points.items():
                results[study][name].append(score(point, seed, rollouts, args))
    docs = Path(args.docs)
    for folder in ("data", "figures"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
    (docs / "data" / "lenvm_scaling.json").write_text(json.dumps({**asdict(args), "results": results}, indent=2) + "\n")
    draw_scaling(results, docs / "figures" / "lenvm_scaling.png")
    draw_ablations(results["ablation"], docs / "figures" / "lenvm_ablations.png")
    text = tables(results)
    write_between(docs / "pretraining.md", "lenvm scaling", text)
    print(text)


def sample(args: BenchmarkArguments) -> dict[str, Dataset]:
    """Rollouts of the embedded policy: two sets to train on, one of few prompts and one of many, and held-out ones."""
    path = model_path(POLICY)
    tokenizer = AutoTokenizer.from_pretrained(path)
    policy: Any = AutoModelForCausalLM.from_pretrained(path)
    generator = TransformersGenerator(policy, tokenizer, batch_size=500, name=POLICY)
    task = load_task("arithmetic", train_size=DEEP[0], held_out_size=args.held_out_prompts, seed=1)
    prompts = task.train["prompt"][:]
    folder, settings = Path(args.runs) / "rollouts", SamplingSettings(LIMIT)
    wanted = {
        "wide": (prompts[: WIDE[0]], WIDE[1]),
        "deep": (prompts, DEEP[1]),
        "held_out": (task.held_out["prompt"], 4),
    }
    return {
        name: sample_rollouts(
            generator, tokenizer, some, settings, completions_per_prompt=count, seed=len(name), folder=folder / name
        )
        for name, (some, count) in wanted.items()
    }


def score(point: Point, seed: int, rollouts: dict[str, Dataset], args: BenchmarkArguments) -> dict[str, float]:
    """Train and evaluate one critic, unless that was done before."""
    name = "-".join(str(value) for value in (*asdict(point).values(), args.steps, args.rollouts_per_step, seed))
    path = Path(args.runs) / "points" / f"{''.join(c if c.isalnum() or c in '.-_' else '_' for c in name)}.json"
    if path.exists():
        return json.loads(path.read_text())
    started = time.process_time()
    set_seed(seed)
    critic = build(point)
    source = rollouts["wide"] if point.completions > DEEP[1] or point.prompts == WIDE[0] else rollouts["deep"]
    chosen = np.flatnonzero(
        (np.array(source["prompt_id"]) < point.prompts) & (np.array(source["sample"]) < point.completions)
    )
    with TemporaryDirectory() as output:
        arguments = LengthValueTrainingArguments(
            output,
            max_steps=args.steps,
            per_device_train_batch_size=args.rollouts_per_step,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            train_sampling_strategy="random" if point.shuffled else "sequential",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
            seed=seed,
            **point.settings,
        )
        trainer = LengthValueTrainer(critic, arguments, train_dataset=source.select(chosen), pad_token_id=0)
        trainer.train()
    found = evaluate(critic, rollouts["held_out"])
    found |= {"parameters": sum(p.numel() for p in critic.parameters()), "seconds": time.process_time() - started}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write((json.dumps(found) + "\n").encode())
    print(f"{path.stem}: {found}", flush=True)
    return found


def build(point: Point) -> LengthValueModel:
    gamma = 0.01 ** (1 / (point.horizon * LIMIT))
    if point.hidden_size is None:
        return LengthValueModel.from_backbone(model_path(POLICY), gamma, dtype=getattr(torch, point.dtype))
    width = point.hidden_size
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(model_path(POLICY))),
        hidden_size=width,
        intermediate_size=5 * width // 2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=512,
        initializer_range=1 / math.sqrt(width),
    )
    return LengthValueModel.from_backbone(LlamaModel(config), gamma)


@torch.no_grad()
def evaluate(critic: LengthValueModel, held_out: Dataset) -> dict[str, float]:
    """Metrics in values of `GAMMA`, whatever the critic's own discount: by way of the predicted length."""
    critic.eval()
    statistics_, collate = LengthValueStatistics(GAMMA), LengthValueCollator(0)
    values, arrays = np.empty(len(held_out)), held_out.with_format("numpy")
    for rows in micro_batches(rollout_lengths(held_out).tolist(), 8_192):
        batch = arrays[rows]
        members = [{name: column[i] for name, column in batch.items()} for i in range(len(rows))]
        tensors = collate(members)
        remaining = logit_to_remaining(critic(tensors["input_ids"]).logits.double(), critic.config.gamma or GAMMA)
        z = torch.log(torch.expm1(-math.log(GAMMA) * remaining.clamp(1e-6, 60 * LIMIT)))
        statistics_.add(z, tensors["labels"])
        for i, (row, member) in enumerate(zip(rows, members, strict=True)):
            values[row] = -torch.sigmoid(z[i, len(member["prompt_ids"]) - 1]).item()
    lengths, _ = completion_lengths(held_out)
    prompt = prompt_scores(values, lengths, prompt_groups(held_out), GAMMA)
    return {**statistics_.scores().metrics(), "prompt_relative_error": prompt.relative_error}


def mean(points: list[dict[str, float]], name: str) -> float:
    return statistics.mean(point[name] for point in points)


def tables(results: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """Markdown of all studies."""
    lines: list[str] = []
    for study, points in results.items():
        several = any(len(runs) > 1 for runs in points.values())
        lines += [
            f"| {study} | validation MSE{' (range)' if several else ''} "
            "| explained variance | error, tokens | MRE at the prompt |",
            "|---|---|---|---|---|",
        ]
        for name, runs in points.items():
            losses = [point["mean_squared_error"] for point in runs]
            spread = f"{statistics.mean(losses):.5f}"
            spread += f" ({min(losses):.5f} to {max(losses):.5f})" if len(losses) > 1 else ""
            label = f"{name} ({runs[0]['parameters'] / 1e3:,.0f} k parameters)" if study == "hidden size" else name
            lines.append(
                f"| {label} | {spread} | {mean(runs, 'explained_variance'):.4f} "
                f"| {mean(runs, 'length_error_tokens'):.2f} | {mean(runs, 'prompt_relative_error'):.1%} |"
            )
        lines.append("")
    lines += ["![Validation loss over data and size](figures/lenvm_scaling.png)", ""]
    lines += ["![Validation loss of the ablations](figures/lenvm_ablations.png)"]
    return "\n".join(lines)


def draw_scaling(results: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> None:
    numbers: dict[str, Callable[[str, dict[str, float]], float]] = {
        "prompts": lambda name, _: float(name),
        "completions per prompt": lambda name, _: float(name),
        "hidden size": lambda _, point: point["parameters"],
    }
    titles = {
        "prompts": "4 completions each",
        "completions per prompt": "of 500 prompts",
        "hidden size": "from random weights",
    }
    labels = {"prompts": "prompts", "completions per prompt": "completions per prompt", "hidden size": "parameters"}
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained", sharey=False)
    for axis, (study, number) in zip(axes, numbers.items(), strict=True):
        points = results[study]
        x = [number(name, runs[0]) for name, runs in points.items()]
        for name, runs in zip(x, points.values(), strict=True):
            axis.plot([name] * len(runs), [run["mean_squared_error"] for run in runs], ".", color="#9db8d9")
        axis.plot(x, [mean(runs, "mean_squared_error") for runs in points.values()], marker="o", color="#2a6fbb")
        axis.set(xscale="log", xlabel=labels[study], title=titles[study])
        axis.set_xticks(x, [f"{n / 1e3:,.0f}k" if study == "hidden size" else f"{n:g}" for n in x])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("validation loss (MSE of the value)")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_ablations(points: dict[str, list[dict[str, float]]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", sharey=True)
    panels = {
        "mean_squared_error": "validation loss (MSE of the value)",
        "length_error_tokens": "error of the remaining length, tokens",
    }
    y = np.arange(len(points))[::-1]
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for height, runs in zip(y, points.values(), strict=True):
            axis.plot([run[metric] for run in runs], [height] * len(runs), ".", color="#9db8d9")
        axis.plot([mean(runs, metric) for runs in points.values()], y, "o", color="#2a6fbb")
        axis.axvline(mean(points["reference"], metric), color="#8a8a8a", linewidth=1, linestyle="--")
        axis.set_yticks(y, list(points))
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
