"""Length prediction at the prompt: MRE beside its floor, the bias of the value's length, a distribution without it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lenvm_rl.evaluation.length_forecast import LEVELS, fit_distribution, forecast_prompts, score_forecast
from lenvm_rl.evaluation.length_report import doubts
from lenvm_rl.evaluation.length_values import evaluate_lenvm
from lenvm_rl.length_distribution import LengthDistribution
from lenvm_rl.pretraining.data import completion_lengths

from .findings import BLUE, GREY, ORANGE, Findings, Sheet, number, percent
from .setting import Bench


@dataclass
class PredictArguments:
    """Of the distribution."""

    distribution: str | None = None
    """Folder of a critic whose length_distribution.safetensors is read, or written where there is none; by default
    one is fitted and not kept."""
    bins: int = 64
    """Of a distribution that is fitted, at most."""
    fit_states: int = 100_000
    """States that it is fitted to."""
    fit_steps: int = 1_500
    """Optimizer steps of 512 states."""


def predict(bench: Bench, args: PredictArguments) -> Findings:
    """The critic beside the noise floor and the baselines, and a distribution of the length beside its value."""
    rollouts, fit_on = bench.rollouts, bench.fit_rollouts
    evaluation = evaluate_lenvm(
        bench.critic, rollouts, fit_on=fit_on, policy=bench.policy, curves=0, seed=bench.args.seed
    )
    head = _distribution(bench, args)
    scores = score_forecast(bench.critic, head, rollouts, fit_on)
    rows = [["noise floor (the truth, known)", percent(evaluation.prompt.noise_floor), "", ""]]
    for name, one in {"**the critic**": evaluation.prompt, **evaluation.baselines}.items():
        rows.append(
            [
                name,
                percent(one.relative_error),
                number(one.explained_variance, 3),
                number(one.calibration_error, 3),
            ]
        )
    cut = float((~evaluation.finished).mean())
    at_prompt = Sheet(
        "Length at the prompt",
        ("prediction", "MRE", "explained variance", "calibration error of V"),
        rows,
        f"{len(evaluation.lengths):,} completions of {evaluation.prompt.prompts:,} prompts, {percent(cut)} of them "
        "cut. MRE: mean |predicted - true| / true, true being the length that the mean value of the prompt's "
        "completions stands for. Noise floor: what knowing the policy would still score.",
    )
    forecasts = Sheet(
        "Forecast of the length in tokens",
        ("forecast", "mean", "bias", "pinball loss", "in the 80 % interval", "its width"),
        [
            ["what came", number(scores.mean_length), "", "", "", ""],
            ["length that V stands for", number(scores.value_length), f"{100 * scores.value_bias:+.1f} %", "", "", ""],
            [
                "**distribution**",
                number(scores.forecast_length),
                f"{100 * scores.forecast_bias:+.1f} %",
                number(scores.pinball, 2),
                percent(scores.coverage),
                number(scores.width),
            ],
            ["quantiles of other prompts' lengths", "", "", number(scores.pinball_constant, 2), "", ""],
        ],
        "The value is concave in the length, so the length that it stands for lies below the mean even where the value "
        "is exact; the distribution is a second head on the same hidden states.",
    )
    values, means, quantiles = forecast_prompts(bench.critic, head, rollouts)
    lengths = completion_lengths(rollouts)[0]

    def draw(figure: Any) -> None:
        figure.set_size_inches(6.4, 4.0)
        axis = figure.subplots()
        order = np.array_split(np.argsort(means, kind="stable"), 10)
        came = [lengths[rows].mean() for rows in order]
        x = [means[rows].mean() for rows in order]
        low, high = ([quantiles[rows, column].mean() for rows in order] for column in (0, -1))
        limit = 1.05 * max(*high, *came)
        axis.plot([0, limit], [0, limit], color=GREY, linewidth=1, linestyle="--", label="mean length = forecast")
        axis.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0, label="80 % interval of the distribution")
        axis.plot(x, came, color=BLUE, marker="o", label="forecast: mean of the distribution")
        by_value = np.array_split(np.argsort(values, kind="stable"), 10)
        axis.plot(
            [values[rows].mean() for rows in by_value],
            [lengths[rows].mean() for rows in by_value],
            color=ORANGE,
            marker="s",
            label="forecast: length that V stands for",
        )
        axis.set(xlabel="forecast at the prompt, tokens", ylabel="mean length, tokens", xlim=(0, 1.05 * max(x)))
        axis.set_ylim(0, limit)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, loc="upper left", fontsize=9)

    return Findings(
        "predict",
        "Length prediction",
        {
            **bench.facts(),
            **evaluation.to_dict(),
            "forecast": {**scores.to_dict(), "levels": list(LEVELS)},
            "doubts": doubts(evaluation),
        },
        [at_prompt, forecasts],
        {
            "prediction.png": (
                "Tenths of the completions by what was forecast: the mean length that came. Above the diagonal a "
                "forecast is too short.",
                draw,
            )
        },
    )


def _distribution(bench: Bench, args: PredictArguments) -> LengthDistribution:
    if args.distribution is not None:
        try:
            return LengthDistribution.load(args.distribution)
        except FileNotFoundError:
            pass  # it is made, and kept there
    head = fit_distribution(
        bench.critic,
        bench.fit_rollouts,
        bins=args.bins,
        states=args.fit_states,
        steps=args.fit_steps,
        seed=bench.args.seed,
    )
    if args.distribution is not None:
        head.save(args.distribution)
    return head
