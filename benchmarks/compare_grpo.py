"""LenVM-GRPO beside plain GRPO: the same recipe, budget, prompts and evaluation; only the coefficient differs.

    python benchmarks/compare_grpo.py --seeds 2

Runs recipes/grpo_lenvm.py once for each method and seed and writes docs/data/grpo_comparison.json,
docs/figures/grpo_comparison.png, and a Markdown table to standard output. A finished run is not repeated: remove its
folder below --runs when the recipe has changed. The seed changes sampling and order; the problems are the same.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from transformers import HfArgumentParser

from lenvm_rl.launch import run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parent.parent
METHODS: dict[str, list[str]] = {"GRPO": ["--length_coef", "0"], "LenVM-GRPO": []}
"""What each method adds to the recipe's defaults."""


@dataclass
class BenchmarkArguments:
    seeds: int = 2
    workers: int = 2
    """Runs at the same time, one thread each."""
    eval_problems: int = 2_000
    runs: str = "outputs/compare_grpo"
    docs: str = "docs"


def main() -> None:
    (args,) = HfArgumentParser([BenchmarkArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    jobs = [(method, seed) for seed in range(args.seeds) for method in METHODS]
    with ThreadPoolExecutor(args.workers) as pool:
        summaries = dict(zip(jobs, pool.map(lambda job: one_run(args, *job), jobs), strict=True))
    rows = [{"method": "start", **mean([summaries[job]["before"] for job in jobs if job[0] == "GRPO"])}]
    for method in METHODS:
        rows.append({"method": method, **mean([summaries[job]["after"] for job in jobs if job[0] == method])})
    docs = Path(args.docs)
    (docs / "data").mkdir(parents=True, exist_ok=True)
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    content = {"seeds": args.seeds, "problems": args.eval_problems, "rows": rows}
    (docs / "data" / "grpo_comparison.json").write_text(json.dumps(content, indent=2) + "\n")
    figure(
        [(method, summaries[method, seed]["curve"]) for method, seed in jobs], docs / "figures" / "grpo_comparison.png"
    )
    print(table(rows))


def one_run(args: BenchmarkArguments, method: str, seed: int) -> dict[str, Any]:
    output = Path(args.runs) / f"{method}-{seed}"
    if not _finished(output / "summary.json", args.eval_problems):
        command = [sys.executable, str(ROOT / "recipes" / "grpo_lenvm.py"), *METHODS[method]]
        command += ["--seed", str(seed), "--output_dir", str(output), "--eval_problems", str(args.eval_problems)]
        environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        output.mkdir(parents=True, exist_ok=True)
        with (output / "log.txt").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, **environment})
    return json.loads((output / "summary.json").read_text())


def _finished(summary: Path, eval_problems: int) -> bool:
    if not summary.exists():
        return False
    content = json.loads(summary.read_text())
    return content["after"] is not None and content["after"]["problems"] == eval_problems


def mean(scores: list[dict[str, float]]) -> dict[str, Any]:
    return {
        key: {"mean": statistics.mean(values), "values": values}
        for key in ("accuracy", "completion_tokens", "tokens_per_correct")
        for values in [[score[key] for score in scores]]
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | accuracy | tokens | tokens per correct answer |", "|---|---|---|---|"]
    for row in rows:
        accuracy, tokens, cost = (row[key] for key in ("accuracy", "completion_tokens", "tokens_per_correct"))
        spread = f" ({min(accuracy['values']):.1%} to {max(accuracy['values']):.1%})"
        lines.append(
            f"| {row['method']} | {accuracy['mean']:.1%}{spread} | {tokens['mean']:.1f} | {cost['mean']:.1f} |"
        )
    return "\n".join(lines)


def figure(curves: list[tuple[str, list[dict[str, float]]]], path: Path) -> None:
    panel, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = dict(zip(METHODS, ("tab:gray", "tab:blue"), strict=True))
    for axis, key, label in ((axes[0], "accuracy", "share of correct completions"), (axes[1], "tokens", "tokens")):
        for i, (method, curve) in enumerate(curves):
            name = method if i < len(METHODS) else None
            axis.plot([p["step"] for p in curve], [p[key] for p in curve], color=colours[method], alpha=0.7, label=name)
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    panel.suptitle("Training rollouts, one line per seed")
    panel.savefig(path, dpi=130)


if __name__ == "__main__":
    run(main)
