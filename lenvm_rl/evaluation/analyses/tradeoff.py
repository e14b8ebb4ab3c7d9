"""What steering at inference buys, beside cutting, beside a bias of the end token, a prompt, and beside training."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from lenvm_rl.decoding.controls import LengthTilt
from lenvm_rl.evaluation.frontier import Outcomes, concave_hull
from lenvm_rl.evaluation.steered_sampling import SteeredSampler, correct_completions
from lenvm_rl.evaluation.tradeoff import Curve, CurvePoint, hard_budget, summarise_curves
from lenvm_rl.sampling import Completion, prompt_token_ids

from .findings import BLUE, GREEN, GREY, ORANGE, PINK, Findings, Sheet, number, percent
from .setting import Bench

BRIEF = "Be brief: use as few words as you can."
TILT, BUDGET, BIAS, BRIEFLY, TRAINED = (
    "tilt by the critic",
    "hard budget",
    "bias of the end token",
    "be brief",
    "trained",
)


@dataclass
class TradeoffArguments:
    """What is tried."""

    betas: list[float] = field(default_factory=lambda: [-0.5, -1.0, -2.0, -4.0, -8.0, -20.0])
    """Tilts; negative ones shorten. 0 is always among them: it is the policy as it is."""
    end_biases: list[float] = field(default_factory=lambda: [4.0, 6.0, 8.0, 10.0, 12.0, 15.0])
    """Added to the score of the end token; 0 alone leaves the baseline out."""
    budgets: list[int] = field(default_factory=list)
    """Tokens after which the unguided completions are cut; by default tenths of their lengths."""
    brief: str = BRIEF
    """Text after the question that asks a chat model to be short; empty leaves the baseline out."""
    policies: list[str] = field(default_factory=list)
    """Trained policies for the same axes: folders or hub names, of the policy's tokenizer."""
    draws: int = 1
    """Completions of each problem, for each point."""


def tradeoff(bench: Bench, args: TradeoffArguments) -> Findings:
    """All curves from the same problems, draws and truncated candidates."""
    sampler, problems = bench.sampler(), bench.task.held_out
    runs = _Runs(bench, sampler, problems, args.draws)
    unguided, finished = runs("unguided")
    tilts = [CurvePoint("0", unguided, 0.0)]
    tilts += [
        CurvePoint(f"{beta:g}", runs(f"tilt {beta:g}", controls=LengthTilt(beta))[0], beta)
        for beta in sorted(args.betas, reverse=True)
        if beta != 0
    ]
    budgets = args.budgets or _tenths(unguided)
    curves = [Curve(TILT, tuple(tilts), "beta"), hard_budget(unguided, finished, budgets)]
    if any(args.end_biases):
        biased = [CurvePoint("0", unguided, 0.0)]
        biased += [
            CurvePoint(f"{b:g}", runs(f"bias {b:g}", end_bias=b)[0], b) for b in sorted(args.end_biases) if b != 0
        ]
        curves.append(Curve(BIAS, tuple(biased), "b"))
    chat = bench.tokenizer.chat_template is not None and bench.args.conversational
    if args.brief and chat:
        brief = runs("brief prompt", problems=_with_text(problems, args.brief))[0]
        curves.append(Curve(BRIEFLY, (CurvePoint("", brief),)))
    for path in args.policies:
        trained = bench.load_policy(path, "policies")
        name = f"{TRAINED}: {bench.label(path)}"
        curves.append(Curve(name, (CurvePoint("", runs(bench.label(path), policy=trained)[0]),)))
    compare = {TILT: BUDGET}
    summary = {**bench.facts(), **summarise_curves(curves, unguided=unguided, compare=compare, seed=bench.args.seed)}
    if any(args.end_biases):
        against = summarise_curves(curves, unguided=unguided, compare={TILT: BIAS}, seed=bench.args.seed)
        summary["gaps"].update(against["gaps"])
    where = "" if chat else " A prompt that asks to be brief was left out: the policy reads no instructions."
    return Findings(
        "tradeoff",
        "Accuracy for tokens",
        summary,
        [_point_sheet(summary, bench, where), _gap_sheet(summary)],
        {
            "tradeoff.png": (
                "Accuracy over tokens, with 95 % intervals over problems and draws. Lines follow each knob; the policy "
                "as it is, where they all begin, is the star.",
                lambda figure: _draw(figure, summary, curves),
            )
        },
    )


@dataclass(frozen=True)
class _Runs:
    """Draws of every problem, in one way."""

    bench: Bench
    sampler: SteeredSampler
    problems: Dataset
    draws: int

    def __call__(self, name: str, *, problems: Dataset | None = None, **steering: Any) -> tuple[Outcomes, np.ndarray]:
        """Outcomes (draws, problems) and which completions ended."""
        asked = self.problems if problems is None else problems
        prompts = prompt_token_ids(self.bench.tokenizer, asked["prompt"])
        completions: list[Completion] = self.sampler(
            prompts * self.draws, seed=self.bench.args.seed, name=name, **steering
        )
        rows = concatenate_datasets([asked] * self.draws)
        correct = correct_completions(self.bench.tokenizer, rows, completions, self.bench.task.reward_funcs[0])
        shape = (self.draws, len(asked))
        tokens = np.array([len(completion.ids) for completion in completions]).reshape(shape)
        finished = np.array([completion.finished for completion in completions]).reshape(shape)
        return Outcomes(correct.reshape(shape), tokens, tuple(range(self.draws))), finished


def _tenths(unguided: Outcomes) -> list[int]:
    return sorted({int(n) for n in np.quantile(unguided.tokens, np.arange(0.1, 1.0, 0.1)).round()})


def _with_text(problems: Dataset, text: str) -> Dataset:
    """The problems with a text after the last message."""

    def longer(row: dict[str, Any]) -> dict[str, Any]:
        *before, last = row["prompt"]
        return {"prompt": [*before, {**last, "content": f"{last['content']}\n{text}"}]}

    return problems.map(longer)


def _point_sheet(summary: dict[str, Any], bench: Bench, where: str) -> Sheet:
    rows = []
    for curve in summary["curves"]:
        several = len(curve["points"]) > 1
        for place, point in enumerate(curve["points"]):
            knob = f", {curve['knob_name']} {point['label']}" if point["label"] else ""
            accuracy, tokens, cost = point["accuracy"], point["tokens"], point["tokens_per_correct"]
            rows.append(
                [
                    f"{curve['name']}{knob}",
                    f"{percent(accuracy['mean'])} ({100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f})",
                    number(tokens["mean"]),
                    "-" if cost is None else number(cost["mean"]),
                    number(curve["area"], 3) if place == 0 and several else "",
                ]
            )
    each = "one completion" if summary["draws"] == 1 else f"{summary['draws']} completions"
    return Sheet(
        "Accuracy and tokens",
        ("way to be short", "accuracy (95 % interval)", "tokens", "tokens per correct", "area"),
        rows,
        f"{summary['problems']:,} held-out problems, {each} each, all from the "
        f"{bench.args.top_k} most probable tokens of each step. A hard budget counts what has not ended "
        "within it as wrong. Area: mean accuracy of the frontier over mean budgets from 0 to "
        f"{summary['unguided']['tokens']['mean']:.1f} tokens, where answering a share of the problems is "
        f"allowed.{where}",
    )


def _gap_sheet(summary: dict[str, Any]) -> Sheet:
    rows = []
    for gap in summary["gaps"][f"{TILT} over {BUDGET}"]:
        difference = gap["difference"]
        rows.append(
            [
                gap["budget"],
                number(gap["tokens"]),
                percent(gap["theirs"]),
                percent(gap["ours"]),
                f"{100 * difference['mean']:+.1f} ({100 * difference['low']:+.1f} to {100 * difference['high']:+.1f})",
            ]
        )
    return Sheet(
        "The tilt against the hard budget, at every budget",
        ("budget", "mean tokens", "hard budget", "tilt", "points of accuracy (95 % interval)"),
        rows,
        "Frontiers of both (upper concave hulls from the origin) at the mean tokens that each budget comes to.",
    )


_LOOK = {
    TILT: (BLUE, "o"),
    BUDGET: (ORANGE, "s"),
    BIAS: (GREEN, "^"),
    BRIEFLY: (PINK, "D"),
}
_TRAINED_MARKERS = ("P", "X", "v", "d", "<", ">")


def _draw(figure: Any, summary: dict[str, Any], curves: list[Curve]) -> None:
    figure.set_size_inches(7.4, 4.6)
    axis = figure.subplots()
    trained = 0
    for curve in summary["curves"]:
        colour, marker = _LOOK.get(curve["name"], ("black", ""))
        if curve["name"].startswith(TRAINED):
            marker = _TRAINED_MARKERS[trained % len(_TRAINED_MARKERS)]
            trained += 1
        points = sorted(curve["points"], key=lambda point: point["tokens"]["mean"])
        x, y = ([point[name]["mean"] for point in points] for name in ("tokens", "accuracy"))
        axis.errorbar(
            x,
            [100 * value for value in y],
            yerr=_arms(points),
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.4,
            elinewidth=0.8,
            capsize=2,
            linestyle="-" if len(points) > 1 else "none",
            label=curve["name"] + (f" ({curve['knob_name']})" if curve["knob_name"] else ""),
        )
        if curve["name"] in (TILT, BIAS):
            for point in points:
                if point["knob"]:
                    place = (point["tokens"]["mean"], 100 * point["accuracy"]["mean"])
                    down = curve["name"] == BIAS
                    axis.annotate(
                        point["label"],
                        place,
                        xytext=(5, -10) if down else (-4, 6),
                        textcoords="offset points",
                        ha="left" if down else "right",
                        fontsize=7,
                        color=colour,
                    )
    hull = concave_hull([(0.0, 0.0), *curves[0].means])
    axis.plot(*zip(*[(t, 100 * a) for t, a in hull], strict=True), color=BLUE, linewidth=0.8, linestyle=":", zorder=1)
    start = summary["unguided"]
    axis.plot(
        start["tokens"]["mean"],
        100 * start["accuracy"]["mean"],
        marker="*",
        markersize=14,
        color=GREY,
        markeredgecolor="black",
        linestyle="none",
        zorder=5,
        label="the policy as it is",
    )
    highest = max(point["accuracy"]["high"] for curve in summary["curves"] for point in curve["points"])
    axis.set(
        xlabel="tokens per completion", ylabel="accuracy on held-out problems, %", ylim=(0, min(102, 120 * highest))
    )
    axis.set_xlim(left=0)
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", frameon=False, ncols=2 if len(curves) < 7 else 3, fontsize=9)


def _arms(points: list[dict[str, Any]]) -> list[list[float]]:
    accuracy = [point["accuracy"] for point in points]
    return [
        [100 * max(0.0, one["mean"] - one["low"]) for one in accuracy],
        [100 * max(0.0, one["high"] - one["mean"]) for one in accuracy],
    ]
