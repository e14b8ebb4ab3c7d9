"""What a training run leaves behind for a person: a table, curves, sample completions and ``summary.json``."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.evaluation.accuracy import Score


def comparison_table(rows: Mapping[str, Score | None], title: str = "") -> Table:
    """Scores side by side; a change of tokens is shown against the first row. What was not evaluated is left out."""
    table = Table(title=escape(title) or None, title_justify="left")
    for heading in ("", "accuracy", "95 % interval", "tokens", "change", "tokens per correct", "finished"):
        table.add_column(heading, justify="left" if not heading else "right")
    scores = {name: score for name, score in rows.items() if score is not None}
    first = next(iter(scores.values()))
    for name, score in scores.items():
        change = 100 * (score.completion_tokens / first.completion_tokens - 1)
        table.add_row(
            escape(name),
            f"{100 * score.accuracy:.1f} %",
            f"{100 * score.accuracy_low:.1f} .. {100 * score.accuracy_high:.1f}",
            f"{score.completion_tokens:.1f}",
            f"{change:+.0f} %" if score is not first else "",
            f"{score.tokens_per_correct:.1f}" if score.tokens_per_correct else "-",
            f"{100 * score.finished:.1f} %",
        )
    return table


def sample_table(prompts: Sequence[Any], columns: Mapping[str, Sequence[str]]) -> Table:
    """Completions of the same prompts, one column for each policy."""
    table = Table(title="Sample completions", title_justify="left", show_lines=True)
    table.add_column("prompt", ratio=1)
    for name in columns:
        table.add_column(name, ratio=2)
    for prompt, *texts in zip(prompts, *columns.values(), strict=True):
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        table.add_row(escape(question), *(escape(text) for text in texts))
    return table


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A file that no reader sees by half; nan and infinities, no JSON, become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=2) + "\n").encode())


def write_results(
    output: Path,
    *,
    policy: str,
    critic: str | None,
    task: str,
    scores: Mapping[str, Score | None],
    log_history: list[dict[str, Any]],
    summary: dict[str, Any],
    method: str | None = None,
) -> None:
    """Model card, training curves and ``summary.json`` of a run, into its folder.

    Args:
        output: the folder, with the trained policy in it.
        policy, critic, task: names of what was trained, with what (None: no length critic) and on what.
        scores: evaluations, before and after; None where there was none.
        log_history: of the trainer's state.
        summary: what else ``summary.json`` shall say; ``steps`` is required.
        method: what it was trained with; LenVM-GRPO by default, or GRPO without a critic.
    """
    method = method or ("LenVM-GRPO" if critic else "GRPO")
    done = {name: score for name, score in scores.items() if score is not None}
    card = model_card(
        output.name, policy=policy, critic=critic, method=method, task=task, scores=done, steps=summary["steps"]
    )
    (output / "README.md").write_text(card)
    plot_training_curves(log_history, output / "curves.png", title=f"{method} on {task}")
    results = {name: score.to_dict() if score else None for name, score in scores.items()}
    write_json(output / "summary.json", {**results, **summary, "curve": training_curve(log_history)})


def model_card(
    name: str, *, policy: str, critic: str | None, method: str, task: str, scores: Mapping[str, Score], steps: int
) -> str:
    """Markdown that says what a trained policy is, how it was made and what it achieves."""
    method = f"{method} with the length critic `{critic}`" if critic else method
    rows = [
        f"| {label} | {score.accuracy:.1%} ({score.accuracy_low:.1%} to {score.accuracy_high:.1%}) "
        f"| {score.completion_tokens:.1f} | {score.problems:,} |"
        for label, score in scores.items()
    ]
    results = "\n".join(["| | accuracy (95 % interval) | completion tokens | problems |", "|---|---|---|---|", *rows])
    return f"""---
library_name: transformers
tags: [trl, grpo, lenvm, length-control]
---

# {name}

`{policy}`, trained for {steps} optimizer steps of {method} on the task `{task}` with lenvm_rl.

{results if rows else "It was not evaluated."}

One completion was sampled per held-out problem. `summary.json` holds the whole configuration, `curves.png` the course
of training.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

policy, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```

The length critic: Length Value Model, [arXiv 2604.27039](https://arxiv.org/abs/2604.27039).
GRPO: DeepSeekMath, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300).
"""


CURVES = {
    "accuracy": ("share of correct completions", ("length/correct_rate",)),
    "completion length": ("tokens", ("completions/mean_length", "length/correct_tokens", "length/wrong_tokens")),
    "length critic": ("explained variance", ("length/explained_variance",)),
    "length signal": ("coefficient", ("length/coef",)),
}
"""Panels of the training figure: title -> label of the axis and the logged metrics in it."""


def plot_training_curves(log_history: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw `CURVES` over the optimizer steps. Without any data no file is written.

    Panels without data are left out, and that of a coefficient which nothing changes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    series = {
        key: [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
        for _, keys in CURVES.values()
        for key in keys
    }
    panels = {name: (label, [k for k in keys if series[k]]) for name, (label, keys) in CURVES.items()}
    if len({value for _, value in series["length/coef"]}) <= 1:
        del panels["length signal"]
    panels = {name: panel for name, panel in panels.items() if panel[1]}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False, layout="constrained")
    for axis, (name, (label, keys)) in zip(axes[0], panels.items(), strict=True):
        for key in keys:
            axis.plot(*zip(*series[key], strict=True), label=key.rpartition("/")[2].replace("_", " "))
        axis.set(title=name, xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            axis.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def training_curve(log_history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Step, share of correct completions and mean tokens of the training rollouts; with a length critic also the
    coefficient, how well the critic fits, and how far it is trusted."""
    names = {
        "accuracy": "length/correct_rate",
        "tokens": "completions/mean_length",
        **{name: f"length/{name}" for name in ("coef", "explained_variance", "trust")},
    }
    return [
        {"step": entry["step"], **{name: entry[key] for name, key in names.items() if _is_number(entry.get(key))}}
        for entry in log_history
        if "length/correct_rate" in entry
    ]


def _is_number(logged: float | None) -> bool:
    return logged is not None and not math.isnan(logged)


def console() -> Console:
    """Wide enough for the tables where the output is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=140)
