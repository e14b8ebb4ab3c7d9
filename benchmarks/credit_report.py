"""From the folders of credit_ablation.py to a table and two figures.

1. A variant is the mean of its seeds, with a 95 % interval over them.
2. The held-out problems are all different, so few of them are short chains. What a controller or a target reached is
   judged at the training problems' mix: a held-out problem weighs as much as its number of steps does there.
3. What happened over the steps is the mean over seeds of what the runs logged, smoothed over ten batches of rollouts.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from lenvm_rl.evaluation.contest_report import START, Run, read_run, seeds_text
from lenvm_rl.evaluation.frontier import Interval, seed_interval
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.tasks.arithmetic import MAX_STEPS, sample_problems

LOGGED = {"explained_variance": "explained variance", "coef": "coefficient", "trust": "trust"}
"""Of the training curve -> heading; the mean over the last ten batches of rollouts."""
TRAIN_PROBLEMS = 320
"""Of recipes/configs/embedded_compare.yaml."""
SMOOTHED = 10
"""Batches that a point of a curve over the steps is the mean of."""
CONTROLLED = [f"{kind} from {start}" for kind in ("accuracy", "accuracy 0.9", "tokens 30") for start in (10, 0.1)]
PANELS = {
    "Tokens, by what shares one number": (
        "tokens",
        ["coef 0", "resolution batch", "resolution completion", "default", "coef 10"],
    ),
    "Tokens, with a length target": ("tokens", ["target 25, coef 3", "target 40, coef 3", "target 60, coef 3"]),
    "Tokens, under a controller": ("tokens", CONTROLLED),
    "Explained variance, all problems": (
        "explained_variance",
        ["default", "online", "refresh", "shared", "shared, backbone 0.1"],
    ),
    "Explained variance, one or two steps": (
        "explained_variance",
        ["short", "short, online", "short, refresh", "short, shared"],
    ),
    "Coefficient, under a controller": ("coef", CONTROLLED),
}
"""Title -> what is drawn over the steps, and of which variants."""


@dataclass(frozen=True)
class Variant:
    """The finished runs of a variant."""

    name: str
    runs: list[Run]

    def row(self) -> dict[str, Any]:
        """What the table and `summary.json` say."""
        return {
            "variant": self.name,
            "seeds": len(self.runs),
            "collapsed": sum(run.collapsed for run in self.runs),
            "accuracy": interval([float(run.correct.mean()) for run in self.runs]),
            "tokens": interval([float(run.tokens.mean()) for run in self.runs]),
            "accuracy_mix": mean_of_known([self.at_training_mix(run, run.correct) for run in self.runs]),
            "tokens_mix": mean_of_known([self.at_training_mix(run, run.tokens) for run in self.runs]),
            **{key: mean_of_known([at_end(run, key) for run in self.runs]) for key in LOGGED},
        }

    def at_training_mix(self, run: Run, outcomes: np.ndarray) -> float:
        """Mean of (problems,) outcomes at the training problems' mix of steps; nan for the variants "short"."""
        if self.name.startswith("short"):
            return float("nan")
        return float((outcomes * weights(len(outcomes))).mean())

    def over_steps(self, key: str) -> np.ndarray:
        """(steps - SMOOTHED + 1,) mean over the seeds that logged it; empty if none did."""
        logged = [values for run in self.runs if len(values := logged_by(run, key)) >= SMOOTHED]
        if not logged:
            return np.empty(0)
        shortest = min(len(values) for values in logged)
        mean = np.mean([values[:shortest] for values in logged], axis=0)
        return np.convolve(mean, np.full(SMOOTHED, 1 / SMOOTHED), mode="valid")


def report(output_dir: Path, names: Iterable[str]) -> str:
    """Table, figures and summary of what is finished; returns the table, as Markdown."""
    variants = read_variants(output_dir, names)
    rows = [variant.row() for variant in variants]
    write_json(output_dir / "summary.json", {"rows": rows})
    table = table_of(rows)
    (output_dir / "table.md").write_text(table)
    plot(rows, output_dir / "ablation.png")
    plot_over_steps(variants, output_dir / "over_steps.png")
    return table


def read_variants(output_dir: Path, names: Iterable[str]) -> list[Variant]:
    """Those of `names` that have a finished run, in that order, after the policy before training."""
    runs = [run for folder in sorted((output_dir / "runs").glob("*/")) if (run := read_run(folder)) is not None]
    found = [Variant(name, [run for run in runs if (run.knob_text or run.method) == name]) for name in (START, *names)]
    return [variant for variant in found if variant.runs]


@cache
def weights(problems: int) -> np.ndarray:
    """(problems,) of the held-out problems, mean 1: what gives them the training problems' mix of steps."""
    # all runs have the same problems, whatever their seed
    held_out = np.array([len(problem.steps) for problem in sample_problems(problems, 0, held_out=True)])
    training = np.array([len(problem.steps) for problem in sample_problems(TRAIN_PROBLEMS, 0, held_out=False)])
    shares = [
        np.mean(training == steps) / max(np.mean(held_out == steps), 1 / problems) for steps in range(MAX_STEPS + 1)
    ]
    return np.array(shares)[held_out]


def logged_by(run: Run, key: str) -> list[float]:
    return [entry[key] for entry in run.summary["curve"] if key in entry]


def at_end(run: Run, key: str) -> float:
    return mean_of_known(logged_by(run, key)[-10:])


def mean_of_known(values: list[float]) -> float:
    """nan if there is none."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def interval(values: list[float]) -> dict[str, float]:
    found: Interval = seed_interval(values)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"| variant | seeds | accuracy | tokens | at the training mix | {' | '.join(LOGGED.values())} |",
        f"|---|---|---|---|---|{'---|' * len(LOGGED)}",
    ]
    for row in rows:
        accuracy, tokens = row["accuracy"], row["tokens"]
        spread = f" ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})" if row["seeds"] > 1 else ""
        logged = " | ".join("" if np.isnan(row[key]) else f"{row[key]:.2f}" for key in LOGGED)
        mix = "" if np.isnan(row["tokens_mix"]) else f"{100 * row['accuracy_mix']:.1f} %, {row['tokens_mix']:.1f}"
        seeds = seeds_text(row["seeds"], row["collapsed"])
        result = f"{100 * accuracy['mean']:.1f} %{spread} | {tokens['mean']:.1f}"
        lines.append(f"| {row['variant']} | {seeds} | {result} | {mix} | {logged} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A line for each variant: accuracy and tokens, with intervals where there are seeds; the default's as a band."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (10, 1.2 + 0.24 * len(rows))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axis, key, scale, unit in zip(axes, ("accuracy", "tokens"), (100, 1), ("accuracy, %", "tokens"), strict=True):
        for place, row in enumerate(rows):
            found, color = row[key], "tab:red" if row["variant"] == "default" else "tab:blue"
            axis.plot(scale * found["mean"], place, "o", color=color, markersize=5)
            axis.plot([scale * found["low"], scale * found["high"]], [place, place], color=color, linewidth=1.2)
            if row["variant"] == "default":
                axis.axvline(scale * found["mean"], color=color, linewidth=0.8, alpha=0.5)
        axis.set(xlabel=unit)
        axis.grid(axis="x", alpha=0.3)
        means = [scale * row[key]["mean"] for row in rows]  # an interval of two seeds would take the whole width
        margin = 0.08 * (max(means) - min(means)) + 0.5
        axis.set_xlim(min(means) - margin, max(means) + margin)
    axes[0].set_yticks(range(len(rows)), [f"{row['variant']}  ({row['seeds']})" for row in rows], fontsize=8)
    axes[0].set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
    figure.suptitle("One factor of the length credit at a time (number of seeds)")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_over_steps(variants: list[Variant], path: Path) -> None:
    """What critics and controllers did in the course of training."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_name = {variant.name: variant for variant in variants}
    figure, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    for axis, (title, (key, names)) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            values = by_name[name].over_steps(key) if name in by_name else np.empty(0)
            if values.size:
                axis.plot(SMOOTHED + np.arange(values.size), values, label=name)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if key == "coef":
            axis.set_yscale("symlog", linthresh=0.1)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
