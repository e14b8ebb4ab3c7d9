"""Batches by predicted length, by arrival and by the oracle: how much padding each wastes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lenvm_rl.evaluation.scheduling import compare_schedules, leave_one_out_means
from lenvm_rl.evaluation.state_logits import state_logits
from lenvm_rl.length import logit_to_remaining
from lenvm_rl.pretraining.data import completion_lengths, prompt_groups

from .findings import BLUE, GREEN, GREY, ORANGE, Findings, Sheet, number, percent
from .setting import Bench


@dataclass
class ScheduleArguments:
    """How requests are batched."""

    schedule_batch_size: int = 16
    """Requests of a batch."""
    schedule_window: int = 256
    """Requests that wait together, from which batches are formed."""
    arrivals: int = 100
    """Random orders of arrival that are averaged over."""


def schedule(bench: Bench, args: ScheduleArguments) -> Findings:
    """One completion of each prompt as a request, all of them over several orders of arrival."""
    import torch

    rollouts = bench.rollouts
    lengths, groups = completion_lengths(rollouts)[0], prompt_groups(rollouts)
    z = np.array([of_row[0] for of_row in state_logits(bench.critic, rollouts)])
    predictions: dict[str, np.ndarray] = {
        "length of the prompt": np.array([len(ids) for ids in rollouts["prompt_ids"]]),
        "predicted length": logit_to_remaining(torch.from_numpy(z), bench.gamma).numpy(),
    }
    if np.bincount(groups).min() > 1:
        predictions["mean of the prompt's other completions"] = leave_one_out_means(lengths, groups)
    found = compare_schedules(
        lengths,
        predictions,
        batch_size=args.schedule_batch_size,
        window=args.schedule_window,
        arrivals=args.arrivals,
        seed=bench.args.seed,
    )
    first = found["arrival order"]
    rows = [
        [
            f"**{name}**" if name == "predicted length" else name,
            percent(one.waste),
            f"{100 * one.waste_low:.1f} to {100 * one.waste_high:.1f}",
            number(one.steps, 0),
            f"{100 * (one.steps / first.steps - 1):+.0f} %" if one is not first else "",
        ]
        for name, one in found.items()
    ]
    sheet = Sheet(
        "Batches formed by what is known of a length",
        ("batches formed by", "padding", "over arrivals", "decoding steps", "change"),
        rows,
        f"{len(lengths):,} requests, batches of {args.schedule_batch_size} out of {args.schedule_window} waiting ones, "
        f"{args.arrivals} orders of arrival. Padding: share of the computed positions after a completion has ended. "
        "The oracle knows what the policy will draw, which nobody can; the mean of the other completions is about what "
        "a predictor that knows the policy could reach.",
    )

    def draw(figure: Any) -> None:
        figure.set_size_inches(6.6, 2.6)
        axis = figure.subplots()
        names = list(found)[::-1]
        colours = {"arrival order": GREY, "predicted length": BLUE, "oracle": ORANGE}
        waste = [100 * found[name].waste for name in names]
        arms = [
            [100 * (found[name].waste - found[name].waste_low) for name in names],
            [100 * (found[name].waste_high - found[name].waste) for name in names],
        ]
        axis.barh(names, waste, xerr=arms, color=[colours.get(name, GREEN) for name in names], height=0.65, capsize=2)
        for place, value in enumerate(waste):
            axis.annotate(f"{value:.1f} %", (1, place), va="center", color="white", fontsize=9, xytext=(1.2, place))
        axis.set(xlabel="padding, % of the computed positions", xlim=(0, max(waste) * 1.08))
        axis.grid(alpha=0.25, axis="x")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)

    summary = {
        "requests": len(lengths),
        "batch_size": args.schedule_batch_size,
        "window": args.schedule_window,
        "schedules": {name: one.to_dict() for name, one in found.items()},
    }
    return Findings(
        "schedule",
        "Scheduling by predicted length",
        summary,
        [sheet],
        {"schedule.png": ("Padding of each way to form batches; lines: 95 % of the orders of arrival.", draw)},
    )
