"""What a comparison of methods found: from the folders of its runs to a summary, a table and a figure.

1. A run is a folder below ``runs`` with `run.json` (method, knob, seed), `summary.json` and `outcomes.npz`; one without
   the last two is not finished and does not count.
2. The run of the method "start" is the policy before training: the base of the efficiency score, and the least accuracy
   of the reference point of the hypervolume, whose most tokens are the limit of a completion.
3. Everything is recomputed from the folders each time.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lenvm_rl.evaluation.contest import CONTENDERS, knob_text
from lenvm_rl.evaluation.frontier import (
    Interval,
    Outcomes,
    bootstrap,
    efficiency_score,
    hypervolume,
    paired_bootstrap,
    seed_interval,
)

START = "start"
RUN_FILE = "run.json"
Key = tuple[str, str]
"""Method, and text of its knob's value."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    method: str
    knob: Any
    knob_text: str
    seed: int
    correct: np.ndarray
    tokens: np.ndarray
    summary: dict[str, Any]

    @property
    def collapsed(self) -> bool:
        """Training stopped early, at a policy that had lost accuracy and length together."""
        return bool(self.summary.get("collapsed"))


def seeds_text(runs: int, collapsed: int) -> str:
    """For the column of seeds."""
    return f"{runs}, {collapsed} collapsed" if collapsed else str(runs)


def read_run(folder: Path) -> Run | None:
    """The run in a folder; None if it is not finished."""
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        summary = json.loads((folder / "summary.json").read_text())
        name = "before" if run["method"] == START else "after"
        if summary["interrupted"] or summary[name] is None:
            return None
        with np.load(folder / "outcomes.npz") as outcomes:
            correct, tokens = outcomes[f"{name}_correct"], outcomes[f"{name}_tokens"]
    except (FileNotFoundError, KeyError):
        return None
    return Run(run["method"], run["knob"], run["knob_text"], run["seed"], correct, tokens, summary)


def read_runs(output_dir: Path) -> dict[Key, list[Run]]:
    """Finished runs of a comparison, by method and value, in the order of the seeds.

    Raises:
        ValueError: there is none, or they were evaluated on different problems.
    """
    runs = [run for folder in sorted((output_dir / "runs").glob("*/")) if (run := read_run(folder)) is not None]
    if not any(run.method != START for run in runs):
        raise ValueError(f"There is no finished run in {output_dir}: start some with recipes/compare.py METHODS.")
    if len({len(run.correct) for run in runs}) > 1:
        raise ValueError(f"The runs in {output_dir} were evaluated on different numbers of problems: keep them apart.")
    order = list(CONTENDERS)
    grouped: dict[Key, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (order.index(r.method) if r.method in order else -1, r.seed)):
        grouped.setdefault((run.method, run.knob_text), []).append(run)
    return grouped


def outcomes_of(runs: Sequence[Run]) -> Outcomes:
    return Outcomes(
        np.stack([run.correct for run in runs]), np.stack([run.tokens for run in runs]), tuple(run.seed for run in runs)
    )


def summarise(output_dir: Path, focus: str = "lenvm") -> dict[str, Any]:
    """All numbers of a comparison.

    Args:
        output_dir: with the finished runs in ``runs``.
        focus: method that is compared with every other one.

    Returns:
        ``rows``, one for each method and value; ``comparisons`` of the focus with each other row; ``methods`` with the
        hypervolume of each one's frontier; ``start``, ``reference_point``, ``problems``.

    Raises:
        ValueError: no finished run, or runs that cannot be compared.
    """
    grouped = read_runs(output_dir)
    outcomes = {key: outcomes_of(runs) for key, runs in grouped.items()}
    config = next(iter(grouped.values()))[0].summary["config"]
    start = outcomes.pop((START, ""), None)
    start_point = start.point if start else (math.nan, math.nan)
    reference = (float(config["max_completion_length"]), start_point[1])
    grpo = outcomes.get(("grpo", ""))
    bases = {"start": start_point, "grpo": grpo.point if grpo else (math.nan, math.nan)}
    rows = [_row(key, outcomes[key], runs, bases, reference) for key, runs in grouped.items() if key[0] != START]
    methods = [
        {
            "method": method,
            "label": label_of(method),
            "settings": len(points),
            "hypervolume": hypervolume(points, reference) if start else math.nan,
        }
        for method, points in _points(outcomes).items()
    ]
    return {
        "problems": int(next(iter(outcomes.values())).correct.shape[1]),
        "start": {"accuracy": start_point[1], "tokens": start_point[0]},
        "reference_point": {"tokens": reference[0], "accuracy": reference[1]},
        "rows": rows,
        "methods": methods,
        "focus": focus,
        "comparisons": _comparisons(outcomes, focus),
    }


def label_of(method: str) -> str:
    return CONTENDERS[method].label if method in CONTENDERS else method


def _points(outcomes: Mapping[Key, Outcomes]) -> dict[str, list[tuple[float, float]]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for (method, _), one in outcomes.items():
        points.setdefault(method, []).append(one.point)
    return points


def _row(
    key: Key,
    outcomes: Outcomes,
    runs: Sequence[Run],
    bases: Mapping[str, tuple[float, float]],
    reference: tuple[float, float],
) -> dict[str, Any]:
    accuracies, tokens = outcomes.correct.mean(1).tolist(), outcomes.tokens.mean(1).tolist()
    resampled, point = bootstrap(outcomes), outcomes.point
    contender = CONTENDERS.get(key[0])
    return {
        "method": key[0],
        "label": label_of(key[0]),
        "knob": runs[0].knob,
        "knob_name": contender.knob if contender else None,
        "knob_text": key[1],
        "recommended": contender is not None and key[1] == knob_text(contender.recommended),
        "seeds": len(outcomes.seeds),
        "seed_values": list(outcomes.seeds),
        "collapsed": sum(run.collapsed for run in runs),
        "accuracy": _over_seeds(accuracies, resampled.accuracy),
        "tokens": _over_seeds(tokens, resampled.tokens),
        "tokens_per_correct": resampled.tokens_per_correct._asdict(),
        "efficiency_score": {
            name: efficiency_score(point[1], point[0], base[1], base[0]) if base[1] > 0 else math.nan
            for name, base in bases.items()
        },
        "hypervolume": hypervolume([point], reference) if not math.isnan(reference[1]) else math.nan,
        "training_seconds": _mean([run.summary["step_seconds"] for run in runs]),
        "sampled_tokens": _mean([run.summary["sampled_tokens"] for run in runs]),
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _over_seeds(values: list[float], resampled: Interval) -> dict[str, Any]:
    """Mean and interval over seeds, beside the bootstrap's; one seed has no interval, and takes the bootstrap's."""
    mean, low, high = seed_interval(values) if len(values) > 1 else resampled
    ends = {"bootstrap_low": resampled.low, "bootstrap_high": resampled.high}
    return {"mean": mean, "low": low, "high": high, **ends, "values": values}


def _comparisons(outcomes: Mapping[Key, Outcomes], focus: str) -> list[dict[str, Any]]:
    """The focus at its recommended setting, or at the first there is, with every setting of the other methods."""
    own = [key for key in outcomes if key[0] == focus]
    if not own:
        return []
    recommended = knob_text(CONTENDERS[focus].recommended) if focus in CONTENDERS else ""
    first = next((key for key in own if key[1] == recommended), own[0])
    comparisons = []
    for key, theirs in outcomes.items():
        ours, others = outcomes[first], [outcomes[k] for k in own if k != first]
        # settings of the focus that share no seed with this baseline cannot be paired with it
        others = [one for one in others if set(one.seeds) >= set(ours.seeds) & set(theirs.seeds)]
        if key[0] == focus or not set(ours.seeds) & set(theirs.seeds):
            continue
        difference = paired_bootstrap(ours, theirs, others)
        comparisons.append(
            {
                "baseline": key[0],
                "label": label_of(key[0]),
                "knob_text": key[1],
                "ours": first[1],
                "seeds": sorted(set(ours.seeds) & set(theirs.seeds)),
                **{name: _plain(value) for name, value in difference._asdict().items()},
            }
        )
    return comparisons


def _plain(value: Interval | float) -> Any:
    return value._asdict() if isinstance(value, Interval) else value


def contest_table(summary: Mapping[str, Any]) -> str:
    """Markdown of a summary: the rows, the comparisons, and what their columns mean."""
    seeds = sorted({row["seeds"] for row in summary["rows"]})
    start, reference = summary["start"], summary["reference_point"]
    lines = [
        "| method | setting | seeds | accuracy | bootstrap | tokens | bootstrap | tokens per correct "
        "| AES, start | AES, GRPO | hypervolume | sampled tokens | training |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        f"| start | | | {_percent(start['accuracy'])} | | {_number(start['tokens'])} | | | | | | | |",
    ]
    for row in summary["rows"]:
        accuracy, tokens, score = row["accuracy"], row["tokens"], row["efficiency_score"]
        setting = f"{row['knob_name']} {row['knob_text']}" if row["knob_name"] else ""
        lines.append(
            f"| {row['label']} | {setting} | {seeds_text(row['seeds'], row['collapsed'])} "
            f"| {_with_interval(accuracy, _percent)} | {_range(accuracy, _percent)} "
            f"| {_with_interval(tokens, _number)} | {_range(tokens, _number)} "
            f"| {_with_interval(row['tokens_per_correct'], _number)} | {_signed(score['start'])} "
            f"| {_signed(score['grpo'])} | {_fixed(row['hypervolume'])} | {row['sampled_tokens'] / 1e6:.2f} M "
            f"| {row['training_seconds']:.0f} s |"
        )
    lines += [
        "",
        f"{summary['problems']:,} held-out problems, one sampled completion each; "
        f"{' or '.join(map(str, seeds))} training seeds. In brackets the 95 % interval over seeds (Student's t; with "
        "one seed the bootstrap's). Bootstrap: the 95 % interval over seeds and problems. AES: saved share of "
        "tokens + 3 times the relative rise of the accuracy, or 5 times its fall (O1-Pruner), against the policy "
        "before training and against GRPO. Hypervolume: share dominated of the rectangle from "
        f"{_number(reference['tokens'])} tokens and {_percent(reference['accuracy'])} accuracy to 0 tokens and 100 %. "
        "Sampled tokens: prompts and completions of training, trained on or not. Training: seconds in its steps.",
    ]
    if any(method["settings"] > 1 for method in summary["methods"]):
        lines += ["", "| method | settings | hypervolume of all |", "|---|---|---|"]
        lines += [f"| {m['label']} | {m['settings']} | {_fixed(m['hypervolume'])} |" for m in summary["methods"]]
    if summary["comparisons"]:
        focus = label_of(summary["focus"])
        lines += [
            "",
            f"| {focus} minus | accuracy | tokens | accuracy at its tokens | tokens at its accuracy |",
            "|---|---|---|---|---|",
        ]
        for one in summary["comparisons"]:
            lines.append(
                f"| {one['label']} {one['knob_text']} | {_with_interval(one['accuracy'], _points_of_percent)} "
                f"| {_with_interval(one['tokens'], _signed_number)} "
                f"| {_on_frontier(one, 'accuracy_within', _points_of_percent)} "
                f"| {_on_frontier(one, 'tokens_for', _signed_number)} |"
            )
        lines += [
            "",
            f"Paired bootstrap over common seeds and problems, 95 %. The last two columns compare the frontier of all "
            f"settings of {focus} with the baseline's accuracy at the baseline's tokens, and the other way round.",
        ]
    return "\n".join(lines) + "\n"


def _defined(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if _defined(value) else "-"


def _points_of_percent(value: float) -> str:
    return f"{100 * value:+.1f}"


def _number(value: float) -> str:
    return f"{value:.1f}" if _defined(value) else "-"


def _signed_number(value: float) -> str:
    return f"{value:+.1f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}" if _defined(value) else "-"


def _fixed(value: float) -> str:
    return f"{value:.3f}" if _defined(value) else "-"


def _with_interval(value: Mapping[str, float], text: Any) -> str:
    if not _defined(value["mean"]):
        return "-"
    if not _defined(value["low"]):
        return text(value["mean"])
    low, high = (text(value[end]).removesuffix(" %") for end in ("low", "high"))
    return f"{text(value['mean'])} ({low} to {high})"


def _range(value: Mapping[str, float], text: Any) -> str:
    return f"{text(value['bootstrap_low']).removesuffix(' %')} to {text(value['bootstrap_high']).removesuffix(' %')}"


def _on_frontier(one: Mapping[str, Any], name: str, text: Any) -> str:
    value, defined = one[name], one[f"{name}_defined"]
    if not _defined(value["mean"]):
        return "not reached"
    return _with_interval(value, text) + (f", in {defined:.0%} of draws" if defined < 1 else "")


# Okabe and Ito's colours, told apart by most colour-blind people; markers tell the rest
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def plot_frontier(summary: Mapping[str, Any], path: Path) -> None:
    """Accuracy over tokens: a point with 95 % intervals for each setting, a line along each method's knob.

    Where some end near the fewest tokens and the best accuracy and others do not, a second panel shows them closely.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    close = _short_and_accurate(summary["rows"])
    panels = 2 if close else 1
    figure, axes = plt.subplots(1, panels, figsize=(4.2 + 3.9 * panels, 4.8), layout="constrained", squeeze=False)
    for axis in axes[0]:
        _draw_frontier(axis, summary, annotate=axis is axes[0, -1])
        axis.set(xlabel="tokens per completion")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy on held-out problems, %")
    if close:
        least, most = (
            [choose(row[name][end] for row in close) for name in ("tokens", "accuracy")]
            for end, choose in (("low", min), ("high", max))
        )
        axes[0, 1].set(xlim=(least[0] - 0.2, most[0] + 0.2), ylim=(100 * least[1] - 0.5, 100 * most[1] + 0.5))
        axes[0, 1].set_title("short and accurate, closely")
    labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(*labels, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _short_and_accurate(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows within a fifth of the fewest tokens and a tenth of the best accuracy; none where that is less than three, or
    all of them."""
    fewest = min(row["tokens"]["mean"] for row in rows)
    best = max(row["accuracy"]["mean"] for row in rows)
    close = [r for r in rows if r["tokens"]["mean"] <= 1.2 * fewest and r["accuracy"]["mean"] >= best - 0.1]
    return close if 3 <= len(close) < len(rows) else []


def _draw_frontier(axis: Any, summary: Mapping[str, Any], *, annotate: bool) -> None:
    for number, method in enumerate(dict.fromkeys(row["method"] for row in summary["rows"])):
        rows = sorted((r for r in summary["rows"] if r["method"] == method), key=lambda r: r["tokens"]["mean"])
        # the seventh method meets the first colour again, with another marker
        colour, marker = _COLOURS[number % 7], _MARKERS[(number + number // 7) % 7]
        tokens, accuracy = ([row[name]["mean"] for row in rows] for name in ("tokens", "accuracy"))
        axis.errorbar(
            tokens,
            [100 * value for value in accuracy],
            xerr=_arms(rows, "tokens"),
            yerr=[[100 * arm for arm in arms] for arms in _arms(rows, "accuracy")],
            label=rows[0]["label"],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.2,
            elinewidth=0.7,
            capsize=2,
            linestyle="-" if len(rows) > 1 else "none",
        )
        for row in rows if annotate and len(rows) > 1 else []:
            place = (row["tokens"]["mean"], 100 * row["accuracy"]["mean"])
            axis.annotate(
                row["knob_text"],
                place,
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=7,
                color=colour,
                annotation_clip=True,
            )
    start = summary["start"]
    if _defined(start["accuracy"]):
        place = start["tokens"], 100 * start["accuracy"]
        axis.plot(*place, marker="*", markersize=11, color="0.4", linestyle="none", label="start")


def _arms(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Lengths of the error bars below and above; rounding may put an end on the wrong side of the mean."""
    return [
        [max(0.0, row[name]["mean"] - row[name]["low"]) for row in rows],
        [max(0.0, row[name]["high"] - row[name]["mean"]) for row in rows],
    ]
