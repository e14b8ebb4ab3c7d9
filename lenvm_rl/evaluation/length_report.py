"""A page about a Length Value Model, for a person who has to decide whether to rely on it.

``report.md`` with figures beside it and ``metrics.json``: how good the predictions are, next to what no critic could do
better and what needs no critic; and, in words, what speaks against trusting it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lenvm_rl.evaluation.length_values import LengthEvaluation, ValueCurve
from lenvm_rl.evaluation.prompt_scores import PromptScores
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.length import logit_to_remaining

__all__ = ["doubts", "prompt_table", "summary", "write_length_report"]

BLUE, ORANGE, GREY = "#2a6fbb", "#d9772b", "#8a8a8a"


def prompt_table(evaluation: LengthEvaluation) -> str:
    """Markdown: predictions at the prompt by the critic, beside their noise floor and the baselines."""
    rows: dict[str, PromptScores] = {"**the critic**": evaluation.prompt, **evaluation.baselines}
    lines = [
        "| prediction at the prompt | MRE | explained variance | calibration error of V |",
        "|---|---|---|---|",
        f"| noise floor (the truth, known) | {_percent(evaluation.prompt.noise_floor)} | | |",
    ]
    for name, scores in rows.items():
        numbers = f"{_number(scores.explained_variance)} | {_number(scores.calibration_error)}"
        lines.append(f"| {name} | {_percent(scores.relative_error)} | {numbers} |")
    return "\n".join(lines)


def summary(evaluation: LengthEvaluation, ceiling: float | None = None) -> str:
    """The page in a few lines, for a terminal."""
    explained = f"explained variance along the completion {_number(evaluation.scores.explained_variance)}"
    if ceiling is not None:
        explained += f", of which the policy's own randomness leaves {_number(ceiling)}"
    return "\n".join([prompt_table(evaluation), explained, *(f"- {doubt}" for doubt in doubts(evaluation))])


def doubts(evaluation: LengthEvaluation) -> list[str]:
    """What speaks against trusting this critic, one sentence each; none if nothing does."""
    found = []
    scores, prompt = evaluation.scores, evaluation.prompt
    cut = float((~evaluation.finished).mean())
    if scores.completions < 200:
        found.append(f"The numbers rest on {scores.completions} finished completions: sample more.")
    if cut > 0.01:
        found.append(
            f"{cut:.1%} of the completions were cut. Token metrics leave them out and so describe the shorter ones; "
            "what the critic says beyond the limit is extrapolated."
        )
    better = [n for n, s in evaluation.baselines.items() if s.relative_error <= prompt.relative_error]
    if better:
        found.append(f"At the prompt, it is no better than {', '.join(better)}, which needs no critic.")
    if not scores.explained_variance > 0.2:
        found.append(
            f"It explains {_number(scores.explained_variance)} of the variance of the return. As a baseline in RL it "
            "would remove little noise: train it on more rollouts, or see by the ceiling whether more can be predicted."
        )
    if scores.calibration_error > 0.05:
        found.append(
            f"Its values are off by {scores.calibration_error:.2f} on average over the tenths of the states: it was "
            "trained on rollouts of another policy or other sampling settings, or for too long."
        )
    if math.isnan(prompt.noise_floor):
        found.append("Each prompt has one completion, so nobody knows how much of the error at the prompt is noise.")
    return found


def write_length_report(
    evaluation: LengthEvaluation,
    folder: str | Path,
    *,
    title: str = "Length critic",
    tokenizer: PreTrainedTokenizerBase | None = None,
    facts: Mapping[str, Any] | None = None,
    ceiling: float | None = None,
) -> Path:
    """Write ``report.md``, its figures and ``metrics.json``.

    Args:
        evaluation: of `evaluate_lenvm`.
        folder: created where it is missing.
        title: of the page.
        tokenizer: shows completions as text; without it only their curves.
        facts: further lines of the page and entries of ``metrics.json``, such as what the critic was trained on.
        ceiling: of the explained variance, by nested sampling.

    Returns:
        The page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "predicted_and_true.png": _draw_predicted_and_true,
        "calibration.png": _draw_calibration,
        "error_by_position.png": _draw_error_by_position,
        "lengths.png": _draw_lengths,
        "curves.png": _draw_curves,
    }
    figures = [name for name, draw in drawn.items() if _figure(folder / name, evaluation, draw)]
    captions = {
        "predicted_and_true.png": "States of finished completions: what was predicted, and what came. The line, the "
        "mean true length at each predicted one, lies above the diagonal where lengths are uncertain: a predicted "
        "length is a lower bound on the expected one.",
        "calibration.png": "Tenths of the states by predicted value. A calibrated critic is on the diagonal.",
        "error_by_position.png": "Error of the predicted remaining length, by how much of the completion was there.",
        "lengths.png": "Lengths of the completions, and what gamma makes of them: where the curve is flat, lengths can "
        "hardly be told apart.",
        "curves.png": "Remaining length along completions drawn at random.",
    }
    scores = evaluation.scores
    explained = f"{_number(scores.explained_variance)}" + (
        f" (ceiling {_number(ceiling)})" if ceiling is not None else ""
    )
    lines = [f"# {title}", ""]
    lines += [f"* {name}: {value}" for name, value in (facts or {}).items()]
    lines += [
        f"* gamma {evaluation.gamma:.7g}: half of the range of values at "
        f"{math.log(0.5) / math.log(evaluation.gamma):,.0f} remaining tokens",
        f"* evaluated on {len(evaluation.lengths):,} completions of {evaluation.prompt.prompts:,} prompts, of which "
        f"{(~evaluation.finished).sum():,} were cut",
        "",
    ]
    against = doubts(evaluation)
    lines += ["**Against trusting it:**", "", *(f"* {doubt}" for doubt in against), ""] if against else []
    lines += [
        "## At the prompt",
        "",
        prompt_table(evaluation),
        "",
        "MRE: mean |predicted - true| / true length, true being what the completions of the prompt say together.",
        "",
        "## Along the completion",
        "",
        "| states of finished completions | |",
        "|---|---|",
        f"| explained variance | {explained} |",
        f"| mean squared error of the value | {_number(scores.mean_squared_error, 4)} |",
        f"| calibration error of the value | {_number(scores.calibration_error, 4)} |",
        f"| error of the remaining length | {_number(scores.length_error_tokens, 1)} tokens, "
        f"{_percent(scores.length_error_relative)} |",
        *(
            f"| ... after {error.position:.0%} of the completion | {error.tokens:.1f} tokens, {error.relative:.1%} |"
            for error in scores.positions
        ),
        "",
    ]
    for name in figures:
        lines += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", "", captions[name], ""]
    if tokenizer is not None and evaluation.curves:
        lines += ["## Completions of the last figure", ""]
        for number, curve in enumerate(_shown(evaluation), start=1):
            prompt, text = (str(tokenizer.decode(ids)) for ids in (curve.prompt_ids, curve.completion_ids))
            lines += [f"{number}. `{_one_line(prompt, 300)}`", "", f"   `{_one_line(text, 700)}`", ""]
    page = folder / "report.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    numbers = {**evaluation.to_dict(), **(facts or {})}
    if ceiling is not None:
        numbers["explained_variance_ceiling"] = ceiling
    write_json(folder / "metrics.json", numbers)
    return page


def _figure(path: Path, evaluation: LengthEvaluation, draw: Callable[[Any, LengthEvaluation], bool]) -> bool:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(layout="constrained")
    shown = draw(figure, evaluation)
    if shown:
        figure.savefig(path, dpi=130)
    plt.close(figure)
    return shown


def _draw_predicted_and_true(figure: Any, evaluation: LengthEvaluation) -> bool:
    curves = [curve for curve in evaluation.curves if curve.finished]
    if not curves:
        return False
    true = np.concatenate([curve.true[:-1] for curve in curves]).astype(float)
    predicted = np.concatenate([_remaining(curve, evaluation.gamma)[:-1] for curve in curves])
    figure.set_size_inches(5.0, 4.4)
    axis = figure.subplots()
    limit = float(np.quantile(np.concatenate([true, predicted]), 0.995)) * 1.05
    inside = (true <= limit) & (predicted <= limit)
    drawn = axis.hexbin(
        predicted[inside], true[inside], gridsize=38, bins="log", cmap="Blues", mincnt=1, extent=(0, limit, 0, limit)
    )
    axis.plot([0, limit], [0, limit], color=GREY, linewidth=1, linestyle="--", label="predicted = true")
    order = np.array_split(np.argsort(predicted), 20)
    means = [(predicted[rows].mean(), true[rows].mean()) for rows in order if len(rows)]
    axis.plot(*zip(*means, strict=True), color=ORANGE, linewidth=1.8, label="mean true length")
    axis.set(xlabel="predicted remaining tokens", ylabel="true remaining tokens", xlim=(0, limit), ylim=(0, limit))
    axis.set_aspect("equal")
    axis.legend(frameon=False, loc="lower right")
    figure.colorbar(drawn, ax=axis, label="states", shrink=0.85)
    return True


def _draw_calibration(figure: Any, evaluation: LengthEvaluation) -> bool:
    bins = evaluation.scores.calibration
    if not bins:
        return False
    figure.set_size_inches(4.2, 4.0)
    axis = figure.subplots()
    predicted, true = [b.predicted for b in bins], [b.true for b in bins]
    low, high = min(*predicted, *true) - 0.03, max(*predicted, *true) + 0.03
    axis.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    axis.plot(predicted, true, marker="o", color=BLUE, label="tenths of the states")
    axis.set(xlabel="mean predicted value V", ylabel="mean return G", xlim=(low, high), ylim=(low, high))
    axis.set_aspect("equal")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, loc="upper left")
    return True


def _draw_error_by_position(figure: Any, evaluation: LengthEvaluation) -> bool:
    slices = evaluation.scores.slices
    if not slices:
        return False
    figure.set_size_inches(7.6, 3.2)
    tokens, relative = figure.subplots(1, 2)
    done = [100 * error.position for error in slices]
    tokens.plot(done, [error.tokens for error in slices], color=BLUE, marker="o", markersize=3)
    relative.plot(done, [100 * error.relative for error in slices], color=ORANGE, marker="o", markersize=3)
    tokens.set(ylabel="mean error, tokens")
    relative.set(ylabel="mean relative error, %")
    for axis in (tokens, relative):
        axis.set(xlabel="% of the completion that was there", xlim=(0, 100))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
    return True


def _draw_lengths(figure: Any, evaluation: LengthEvaluation) -> bool:
    lengths, finished, gamma = evaluation.lengths, evaluation.finished, evaluation.gamma
    figure.set_size_inches(7.0, 3.6)
    axis = figure.subplots()
    longest = float(lengths.max())
    edges = np.linspace(0, longest + 1, min(60, int(longest) + 1) + 1)
    parts, labels, colours = [lengths[finished]], ["finished"], [BLUE]
    if not finished.all():
        parts, labels, colours = [*parts, lengths[~finished]], [*labels, "cut"], [*colours, ORANGE]
    axis.hist(parts, bins=edges.tolist(), stacked=True, color=colours, label=labels, alpha=0.75)
    axis.set(xlabel="completion length, tokens", ylabel="completions", xlim=(0, edges[-1]))
    value = axis.twinx()
    x = np.linspace(0, edges[-1], 400)
    value.plot(x, 1 - gamma**x, color="black", linewidth=1.4, label="$1 - \\gamma^{length}$")
    value.set(ylabel="share of the value range used", ylim=(0, 1.05))
    for share in (0.5, 0.99):
        tokens = math.log(1 - share) / math.log(gamma)
        if tokens <= edges[-1]:
            value.plot([tokens, tokens], [0, share], color="black", linewidth=0.8, linestyle=":")
            on_the_right = tokens < 0.75 * edges[-1]
            value.annotate(
                f"{share:.0%} at {tokens:,.0f} tokens",
                (tokens, share),
                xytext=(6 if on_the_right else -6, -14),
                textcoords="offset points",
                ha="left" if on_the_right else "right",
                fontsize=8,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
            )
    (bars, bar_labels), (curve, curve_label) = (a.get_legend_handles_labels() for a in (axis, value))
    value.legend(
        bars + curve,
        bar_labels + curve_label,
        frameon=True,
        framealpha=0.85,
        edgecolor="none",
        loc="center right",
        fontsize=9,
    )
    return True


def _draw_curves(figure: Any, evaluation: LengthEvaluation) -> bool:
    curves = _shown(evaluation)
    if not curves:
        return False
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure.set_size_inches(3.3 * columns, 2.5 * rows)
    axes = np.atleast_1d(figure.subplots(rows, columns)).flatten()
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    for number, (axis, curve) in enumerate(zip(axes, curves, strict=False), start=1):
        time = np.arange(len(curve.true))
        axis.plot(time, _remaining(curve, evaluation.gamma), color=BLUE, linewidth=1.4, label="predicted")
        label = "true" if curve.finished else "until the cut"
        axis.plot(time, curve.true, color=ORANGE, linewidth=1.1, linestyle="--", label=label)
        ending = "" if curve.finished else ", cut"
        axis.set_title(f"{number}. {len(curve.completion_ids)} tokens{ending}", fontsize=9, loc="left")
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
        if number == 1 or not curve.finished:
            axis.legend(frameon=False, fontsize=8)
    figure.supxlabel("tokens generated", fontsize=9)
    figure.supylabel("remaining tokens", fontsize=9)
    return True


def _shown(evaluation: LengthEvaluation) -> list[ValueCurve]:
    """Six of the completions that were drawn, from short to long."""
    return sorted(evaluation.curves[:6], key=lambda curve: len(curve.completion_ids))


def _remaining(curve: ValueCurve, gamma: float) -> np.ndarray:
    return logit_to_remaining(torch.from_numpy(curve.logits).double(), gamma).numpy()


def _one_line(text: str, most: int) -> str:
    text = " ".join(text.replace("`", "'").split())
    return text if len(text) <= most else f"{text[:most]} ..."


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def _number(number: float, digits: int = 3) -> str:
    return "-" if math.isnan(number) else f"{number:.{digits}f}"
