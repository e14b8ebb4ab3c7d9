"""Length tokens: after which tokens more is to come than before, and whether RL removed those."""

import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from lenvm_rl.evaluation.length_tokens import (
    Occurrence,
    TokenComparison,
    TokenType,
    compare_tokens,
    strongest,
    td_scores,
    token_types,
)
from lenvm_rl.evaluation.state_logits import state_logits
from lenvm_rl.pretraining.data import completion_lengths
from lenvm_rl.sampling import end_token_ids

from .findings import BLUE, GREY, ORANGE, Findings, Sheet, number
from .setting import Bench


@dataclass
class TokenArguments:
    """What is counted."""

    after: str | None = None
    """The policy after RL, whose tokens are compared: a folder or hub name."""
    least_count: int = 50
    """Tokens that are rarer are left out of lists and correlations."""
    list_length: int = 12
    """Tokens of either list."""
    token_rollouts: int = 2_000
    """Completions that are looked at, of each policy; the held-out rollouts are thinned to as many."""


def tokens(bench: Bench, args: TokenArguments) -> Findings:
    """Lists of tokens that lengthen and shorten, and the comparison with a policy after RL."""
    rollouts = _thinned(bench.rollouts, args.token_rollouts)
    ends = end_token_ids(bench.policy, bench.tokenizer)
    logits, before = _types(bench, rollouts, ends)
    longer, shorter = strongest(before, args.list_length, least_count=args.least_count)
    summary: dict[str, Any] = {
        **bench.facts(),
        "completions": len(rollouts),
        "longer": [_entry(bench, one) for one in longer],
        "shorter": [_entry(bench, one) for one in shorter],
    }
    sheets = [
        _list_sheet(bench, "Tokens after which more is to come than before", longer, len(rollouts)),
        _list_sheet(bench, "Tokens after which less is to come than before", shorter, len(rollouts)),
    ]
    shown = _shown(rollouts)
    row = rollouts[shown]
    scores = td_scores(logits[shown], bench.gamma, finished=row["finished"])
    figures: dict[str, Any] = {
        "tokens.png": (
            "Mean score of the tokens that lengthen and shorten most, with two standard errors, and how often each was "
            "counted.",
            lambda figure: _draw_lists(figure, bench, longer, shorter),
        ),
        "completion.png": (
            "One completion. Orange: more is to come than before the token; blue: less.",
            lambda figure: _draw_completion(figure, bench, row, scores),
        ),
    }
    if args.after is not None:
        policy = bench.load_policy(args.after, "after")
        prompts = [list(ids) for ids in rollouts["prompt_ids"]]
        after_rollouts = _sampled(bench, policy, prompts)
        _, after = _types(bench, after_rollouts, ends)
        comparison = compare_tokens(before, after, least_count=args.least_count, seed=bench.args.seed)
        lengths = [float(completion_lengths(one)[0].mean()) for one in (rollouts, after_rollouts)]
        summary["comparison"] = {"after": args.after, "tokens": lengths, **comparison.to_dict()}
        for change in summary["comparison"]["changes"]:
            change["text"] = _text(bench, change["token"])
        sheets.append(_change_sheet(bench, comparison, lengths, args))
        figures["tokens_after_rl.png"] = (
            "Each token: its mean score before RL, and how its occurrences in a completion changed.",
            lambda figure: _draw_changes(figure, bench, comparison),
        )
    return Findings("tokens", "Length tokens", summary, sheets, figures)


def _thinned(rollouts: Dataset, most: int) -> Dataset:
    return rollouts.select(np.linspace(0, len(rollouts) - 1, min(most, len(rollouts))).round().astype(int).tolist())


def _sampled(bench: Bench, policy: Any, prompts: list[list[int]]) -> Dataset:
    """One completion of each of these prompts by another policy, drawn as the rollouts were."""
    from lenvm_rl.pretraining.generators import TransformersGenerator

    generator = TransformersGenerator(policy, bench.tokenizer, name="after", batch_size=bench.args.sampling_batch_size)
    drawn = generator(prompts, bench.settings, bench.args.seed, lambda completions, made: None)
    return Dataset.from_list(
        [
            {"prompt_ids": ids, "completion_ids": one.ids, "finished": one.finished}
            for ids, one in zip(prompts, drawn, strict=True)
        ]
    )


def _types(bench: Bench, rollouts: Dataset, ends: list[int]) -> tuple[list[np.ndarray], dict[int, TokenType]]:
    logits = state_logits(bench.critic, rollouts)
    completions, finished = rollouts["completion_ids"][:], rollouts["finished"][:]
    return logits, token_types(completions, logits, finished, bench.gamma, leave_out=ends)


def _shown(rollouts: Dataset) -> int:
    """A finished completion of middling length, the first of these."""
    lengths, finished = completion_lengths(rollouts)
    if not finished.any():
        return 0
    return int(np.argmin(np.where(finished, np.abs(lengths - np.median(lengths[finished]) * 1.2), np.inf)))


def _text(bench: Bench, token: int) -> str:
    """A token as it reads, with its white space made visible."""
    text = str(bench.tokenizer.decode([token]))
    if "\ufffd" in text:  # a part of a character
        text = str(bench.tokenizer.convert_ids_to_tokens(token))
    return text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u00b7") or repr(text)


def _context(bench: Bench, token: int, occurrence: Occurrence) -> str:
    before, after = (
        " ".join(str(bench.tokenizer.decode(ids)).split()) for ids in (occurrence.before, occurrence.after)
    )
    return f"{before[-36:]} [{_text(bench, token)}] {after[:36]}".strip()


def _entry(bench: Bench, one: TokenType) -> dict[str, Any]:
    return {
        "token": one.token,
        "text": _text(bench, one.token),
        "count": one.count,
        "per_completion": one.per_completion,
        "score": one.score,
        "error": one.error,
        "tokens": one.tokens,
        "contexts": [{"score": c.score, "text": _context(bench, one.token, c)} for c in one.contexts],
    }


def _list_sheet(bench: Bench, title: str, types: list[TokenType], completions: int) -> Sheet:
    rows = [
        [
            f"`{_text(bench, one.token)}`",
            f"{one.count:,}",
            number(one.per_completion, 2),
            f"{one.score:+.3f}",
            f"{one.tokens:+.1f}",
            _context(bench, one.token, one.contexts[0]),
        ]
        for one in types
    ]
    return Sheet(
        title,
        ("token", "count", "in a completion", "score", "tokens", "strongest context"),
        rows,
        f"{completions:,} completions. Score: mean of gamma u_t - u_(t-1) + 1 - gamma over all occurrences; tokens: "
        "mean change of the predicted length of the completion.",
    )


def _change_sheet(bench: Bench, comparison: TokenComparison, lengths: list[float], args: TokenArguments) -> Sheet:
    rows = [
        [
            f"`{_text(bench, one.token)}`",
            number(one.before, 2),
            number(one.after, 2),
            f"{one.change:+.2f}",
            f"{one.score:+.3f}",
        ]
        for one in comparison.changes[: args.list_length]
    ]
    return Sheet(
        "What RL removed",
        ("token", "before", "after", "change", "score before"),
        rows,
        f"Occurrences in a completion of the same prompts; {lengths[0]:.1f} tokens before, {lengths[1]:.1f} after. "
        f"Rank correlation of score and change over {len(comparison.changes)} tokens: {comparison.correlation:+.2f} "
        f"({comparison.low:+.2f} to {comparison.high:+.2f}); with the ratio instead of the change "
        f"{comparison.relative_correlation:+.2f}. Tokens of positive score are {100 * comparison.marked_before:.0f} % "
        f"of all occurrences before, and {100 * comparison.removed_marked:.0f} % of those that were removed.",
    )


def _drawable(text: str) -> str:
    """Characters that the figure's font lacks, as escapes."""
    return "".join(c if ord(c) < 0x2E80 else f"\\u{ord(c):04x}" for c in text).replace("$", "\\$")


def _draw_lists(figure: Any, bench: Bench, longer: list[TokenType], shorter: list[TokenType]) -> None:
    most = max(len(longer), len(shorter), 1)
    figure.set_size_inches(8.0, 0.28 * most + 1.1)
    axes = figure.subplots(1, 2)
    sides = ((longer, ORANGE, "more is to come"), (shorter, BLUE, "less is to come"))
    for axis, (types, colour, title) in zip(axes, sides, strict=True):
        places = np.arange(len(types))[::-1]
        scores = [one.score for one in types]
        axis.barh(places, scores, xerr=[2 * one.error for one in types], color=colour, height=0.7, capsize=2)
        axis.set_yticks(places, [_drawable(_text(bench, one.token)) for one in types], fontfamily="monospace")
        widest = max((abs(one.score) + 2 * one.error for one in types), default=1.0)
        sign = 1 if colour == ORANGE else -1
        for place, one in zip(places, types, strict=True):
            axis.annotate(
                f"{one.count:,}",
                (one.score + sign * 2 * one.error, place),
                xytext=(4 * sign, 0),
                textcoords="offset points",
                ha="left" if sign > 0 else "right",
                va="center",
                fontsize=7,
                color="0.35",
            )
        axis.set_xlim(*((0, 1.25 * widest) if sign > 0 else (-1.25 * widest, 0)))
        axis.set_ylim(-0.7, most - 0.3)
        axis.set(title=title, xlabel="mean score")
        axis.grid(alpha=0.25, axis="x")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)


def _draw_completion(figure: Any, bench: Bench, row: dict[str, Any], scores: np.ndarray) -> None:
    width = 88
    prompt = " ".join(str(bench.tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)).split())
    texts = [_drawable(_text(bench, token)) for token in row["completion_ids"]]
    lines: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for text, score in zip(texts, scores, strict=True):
        if column + len(text) > width and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((column, text, float(score)))
        column += len(text) + 1
        if text.endswith("\\n"):
            lines.append([])
            column = 0
    shown = [line for line in lines if line][:24]
    heading = textwrap.wrap(_drawable(prompt), width)[-3:]
    rows = len(shown) + len(heading)
    figure.set_size_inches(9.0, 0.27 * rows + 0.4)
    axis = figure.subplots()
    axis.set(xlim=(-1, width + 2), ylim=(rows - 0.4, -0.8))
    axis.axis("off")
    largest = float(np.quantile(np.abs(scores), 0.98)) or 1.0
    for place, text in enumerate(heading):
        axis.text(0, place, text, fontfamily="monospace", fontsize=9, color=GREY, va="center")
    for place, line in enumerate(shown, start=len(heading)):
        for start, text, score in line:
            strength = min(1.0, abs(score) / largest)
            axis.add_patch(_box(start, place, len(text), ORANGE if score > 0 else BLUE, 0.75 * strength))
            axis.text(start, place, text, fontfamily="monospace", fontsize=9, va="center")


def _box(start: float, place: float, length: int, colour: str, alpha: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((start - 0.25, place - 0.42), length + 0.5, 0.84, color=colour, alpha=alpha, linewidth=0)


def _draw_changes(figure: Any, bench: Bench, comparison: TokenComparison) -> None:
    figure.set_size_inches(6.6, 4.2)
    axis = figure.subplots()
    x = np.array([one.score for one in comparison.changes])
    y = np.array([one.change for one in comparison.changes])
    size = 12 + 60 * np.sqrt([one.before for one in comparison.changes])
    axis.scatter(x, y, s=size, color=np.where(x > 0, ORANGE, BLUE), alpha=0.55, linewidth=0)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.axvline(0, color=GREY, linewidth=0.8)
    # the most extreme first; what would stand on top of another joins its label, or is left out
    wide, high = np.ptp(x) or 1.0, np.ptp(y) or 1.0
    labels: list[tuple[float, float, list[str]]] = []
    for one in sorted(comparison.changes, key=lambda one: -abs(one.change) / high - abs(one.score) / wide)[:20]:
        text = _drawable(_text(bench, one.token))
        near = [a for a in labels if abs(a[0] - one.score) < 0.12 * wide and abs(a[1] - one.change) < 0.06 * high]
        if not near:
            labels.append((one.score, one.change, [text]))
        elif len(near[0][2]) < 3:
            near[0][2].append(text)
    for score, change, texts in labels:
        axis.annotate(
            "  ".join(texts),
            (score, change),
            xytext=(9, 3),
            textcoords="offset points",
            fontsize=8,
            fontfamily="monospace",
        )
    axis.set(xlabel="mean score before RL", ylabel="change of occurrences in a completion")
    axis.margins(0.1)
    axis.grid(alpha=0.25)
    axis.set_title(f"rank correlation {comparison.correlation:+.2f}", fontsize=10, loc="left")
