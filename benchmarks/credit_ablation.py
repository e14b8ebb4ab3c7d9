"""One factor of the length credit at a time, on the embedded task: what each is worth, and what the default should be.

    python benchmarks/credit_ablation.py --seeds 3                 # all variants, about two hours on two cores
    python benchmarks/credit_ablation.py coef online --seeds 1     # those whose name starts so
    python benchmarks/credit_ablation.py --report_only

A variant is recipes/grpo_baseline.py --method lenvm under recipes/configs/embedded_compare.yaml with a few flags. The
same command goes on after an interruption. Writes `summary.json`, `table.md` and `ablation.png`.
"""

from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lenvm_rl.comparison import Comparison
from lenvm_rl.evaluation.contest_report import START, read_run
from lenvm_rl.evaluation.frontier import Interval, seed_interval
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.launch import run

REPOSITORY = Path(__file__).parents[1]
RESAMPLED = ["--dynamic_sampling", "true", "--resample_correct_groups", "true", "--max_resample_rounds", "2"]
PAPER = ["--length_gate", "all", "--length_unsolved_groups", "true"]
ACCURACY = ["--length_controller", "accuracy", "--length_controller_target", "0.9"]
TOKENS = ["--length_controller", "tokens", "--length_controller_target"]
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "coef 0": ["--length_coef", "0"],
    "coef 0.1": ["--length_coef", "0.1"],
    "coef 0.3": ["--length_coef", "0.3"],
    "coef 3": ["--length_coef", "3"],
    "coef 10": ["--length_coef", "10"],
    "lambda 0": ["--length_lambda", "0"],
    "lambda 0.9": ["--length_lambda", "0.9"],
    "lambda 0.95": ["--length_lambda", "0.95"],
    "gate all": ["--length_gate", "all"],
    "gate all, unsolved": PAPER,
    "gate solve_rate": ["--length_gate", "solve_rate"],
    "scale std": ["--length_scale", "std", "--length_coef", "0.13"],
    "clip 0.1": ["--length_clip", "0.1"],
    "resolution completion": ["--length_resolution", "completion"],
    "resolution batch": ["--length_resolution", "batch"],
    "trust all": ["--length_critic_trust", "0"],
    "online": ["--length_critic_update", "online"],
    "online, coef 3": ["--length_critic_update", "online", "--length_coef", "3"],
    "refresh": ["--length_critic_update", "refresh"],
    "shared": ["--length_critic", "shared"],
    "shaping": ["--length_mode", "shaping", *PAPER],
    "shaping, gated": ["--length_mode", "shaping"],
    "cosine from 2": ["--length_controller", "cosine", "--length_coef", "2"],
    "resampled, coef 5": [*RESAMPLED, "--length_coef", "5"],
    "resampled, cosine from 10": [*RESAMPLED, "--length_controller", "cosine", "--length_coef", "10"],
    "resampled, tokens 24": [*RESAMPLED, *TOKENS, "24", "--length_coef", "5"],
    "accuracy from 10": [*ACCURACY, "--length_coef", "10"],
    "accuracy from 0.1": [*ACCURACY, "--length_coef", "0.1"],
    "tokens 30 from 10": [*TOKENS, "30", "--length_coef", "10"],
    "tokens 30 from 0.1": [*TOKENS, "30", "--length_coef", "0.1"],
    "target 25": ["--length_target", "25"],
    "target 40": ["--length_target", "40"],
    "target 60": ["--length_target", "60"],
}
"""Name -> flags of the run. "Resolution batch" is the control: correct completions get one number, no length in it."""


def main() -> None:
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("variants", nargs="*", metavar="START_OF_A_NAME", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/credit_ablation"))
    parser.add_argument("--report_only", action="store_true", help="start nothing")
    args = parser.parse_args()
    chosen = [name for name in VARIANTS if not args.variants or any(name.startswith(word) for word in args.variants)]
    if not chosen:
        raise ValueError(f"No variant starts with {' or '.join(args.variants)}: choose among {', '.join(VARIANTS)}.")
    if not args.report_only:
        comparison = Comparison(
            args.output_dir,
            REPOSITORY / "recipes" / "grpo_baseline.py",
            REPOSITORY / "recipes" / "configs" / "embedded_compare.yaml",
        )
        start = {"method": START, "knob": None, "knob_text": "", "seed": 0}
        with comparison.alone():
            jobs = [comparison.job(START, start, ["--method", "grpo", "--evaluate_only"])]
            for seed in range(args.seeds):
                for name in chosen:
                    about = {"method": "lenvm", "knob": name, "knob_text": name, "seed": seed}
                    folder = f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
                    jobs.append(comparison.job(folder, about, ["--method", "lenvm", *VARIANTS[name]]))
            failed = comparison.finish(jobs, args.workers, partial(print, flush=True))
        for name, line in failed.items():
            print(f"{name} failed: {line}")
    report(args.output_dir)


def report(output_dir: Path) -> None:
    """Table, figure and summary of what is finished."""
    found = rows(output_dir)
    write_json(output_dir / "summary.json", {"rows": found})
    table = table_of(found)
    (output_dir / "table.md").write_text(table)
    plot(found, output_dir / "ablation.png")
    print(table)


def rows(output_dir: Path) -> list[dict[str, Any]]:
    """One row for each variant that has a finished run, in the order of `VARIANTS`."""
    runs = [(folder, read_run(folder)) for folder in sorted((output_dir / "runs").glob("*/"))]
    result = []
    for name in (START, *VARIANTS):
        own = [(folder, r) for folder, r in runs if r is not None and (r.knob_text or r.method) == name]
        if not own:
            continue
        result.append(
            {
                "variant": name,
                "seeds": len(own),
                "accuracy": interval([float(r.correct.mean()) for _, r in own]),
                "tokens": interval([float(r.tokens.mean()) for _, r in own]),
                **{key: float(np.mean([at_end(r.summary, key) for _, r in own])) for key in LOGGED},
            }
        )
    return result


LOGGED = {"explained_variance": "explained variance", "coef": "coefficient", "trust": "trust"}
"""Of the training curve -> heading; the mean over the last ten batches of rollouts."""


def at_end(summary: dict[str, Any], key: str) -> float:
    seen = [entry[key] for entry in summary["curve"] if key in entry]
    return float(np.mean(seen[-10:])) if seen else float("nan")


def interval(values: list[float]) -> dict[str, float]:
    found: Interval = seed_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def table_of(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| variant | seeds | accuracy | tokens | {' | '.join(LOGGED.values())} |",
        f"|---|---|---|---|{'---|' * len(LOGGED)}",
    ]
    for row in found:
        accuracy, tokens = row["accuracy"], row["tokens"]
        spread = f" ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})" if row["seeds"] > 1 else ""
        logged = " | ".join("" if np.isnan(row[key]) else f"{row[key]:.2f}" for key in LOGGED)
        lines.append(
            f"| {row['variant']} | {row['seeds']} | {100 * accuracy['mean']:.1f} %{spread} | {tokens['mean']:.1f} "
            f"| {logged} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over tokens, a point for each variant."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for row in found:
        x, y = row["tokens"]["mean"], 100 * row["accuracy"]["mean"]
        axis.plot(x, y, "o", color="tab:red" if row["variant"] == "default" else "tab:blue", markersize=5)
        axis.annotate(row["variant"], (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axis.set(xlabel="completion tokens", ylabel="accuracy, %", title="One factor of the length credit at a time")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    run(main)
