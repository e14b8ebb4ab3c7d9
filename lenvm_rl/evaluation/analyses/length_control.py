"""LIFEBench, and its three constraints on a policy that was never told of a length: guided against unguided."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lenvm_rl.evaluation.length_control import (
    ControlledRun,
    ControlScore,
    TargetRequest,
    control_of,
    run_targets,
    score_targets,
    token_targets,
)
from lenvm_rl.evaluation.lifebench import TARGETS, Unit, length_requests, read_lifebench, subset
from lenvm_rl.evaluation.steered_sampling import correct_completions
from lenvm_rl.evaluation.target_scores import CONSTRAINTS, Constraint
from lenvm_rl.sampling import prompt_token_ids

from .findings import BLUE, GREY, ORANGE, Findings, Sheet, number, percent
from .setting import Bench

RANGE = (0.15, 0.3, 0.5, 0.7, 0.85)
"""Quantiles of the policy's own lengths that targets are spread over where no text asks for one."""
NAMES: dict[Constraint, str] = {"equal": "equal to n", "at_most": "at most n", "at_least": "at least n"}
RUNS = ("unguided", "guided")


@dataclass
class ControlArguments:
    """Which lengths are asked for."""

    data: str | None = None
    """LIFEBench's tasks, a JSONL file. Without it the prompts are the task's problems, which ask for no length, and
    targets are spread over the policy's own lengths."""
    life_tasks: int | None = None
    """Tasks of the file, a fixed choice as even over languages and categories as can be; all by default."""
    languages: list[str] = field(default_factory=list)
    """Only tasks in these (en, cn); all by default."""
    targets: list[int] = field(default_factory=list)
    """Lengths; 32, 64 and 128 by default, or those of the policy's range."""
    unit: str = "tokens"
    """"tokens" or "words" (which only a LIFEBench file can ask for)."""
    constraints: list[str] = field(default_factory=lambda: list(CONSTRAINTS))
    control_prompts: int = 100
    """Problems for each target where there is no file."""
    control_max_tokens: int | None = None
    """Limit of both runs; by default twice the largest target, or the bench's where there is no file."""


def control(bench: Bench, args: ControlArguments) -> Findings:
    """Both runs and their scores.

    Raises:
        FileNotFoundError: there is no such file of tasks.
        ValueError: arguments that do not fit.
    """
    requests, problems = _requests(bench, args)
    unit: Unit = "words" if args.unit == "words" else "tokens"
    limit = args.control_max_tokens or (bench.args.max_new_tokens if problems is not None else None)
    most = max(one.target for one in requests)
    # a word is rarely more than three tokens of its own language
    sampler = bench.sampler(limit or 2 * most * (3 if unit == "words" else 1))
    unguided = run_targets(sampler, requests, unit=unit, seed=bench.args.seed, name="unguided")
    wanted = token_targets(requests, unguided, unit)
    controls = [control_of(one.constraint, tokens) for one, tokens in zip(requests, wanted, strict=True)]
    guided = run_targets(sampler, requests, unit=unit, controls=controls, seed=bench.args.seed, name="guided")
    runs = dict(zip(RUNS, (unguided, guided), strict=True))
    scores = {
        name: score_targets(
            bench.policy,
            requests,
            run,
            unit=unit,
            temperature=bench.args.temperature,
            correct=None if problems is None else _judge(bench, problems, run),
        )
        for name, run in runs.items()
    }
    what = f"LIFEBench tasks of {args.data}" if args.data else f"problems of {bench.args.task}"
    return Findings(
        "lifebench",
        "Length control",
        {
            **bench.facts(),
            "data": args.data,
            "unit": unit,
            "requests": len(requests),
            "max_new_tokens": sampler.max_new_tokens,
            "targets": sorted({one.target for one in requests}),
            "scores": {
                name: {constraint: one.to_dict() for constraint, one in of_run.items()}
                for name, of_run in scores.items()
            },
        },
        [_score_sheet(scores, requests, what, unit, sampler.max_new_tokens), _quality_sheet(scores)],
        {"lengths.png": (_caption(unit), lambda figure: _draw(figure, requests, runs, unit))},
    )


def _requests(bench: Bench, args: ControlArguments) -> tuple[list[TargetRequest], list[int] | None]:
    """What is asked for, and the problem of each request where answers can be checked."""
    unknown = [name for name in args.constraints if name not in CONSTRAINTS]
    if unknown or not args.constraints:
        raise ValueError(f"constraints must be some of {', '.join(CONSTRAINTS)}, got {args.constraints}.")
    constraints: list[Any] = list(args.constraints)
    if args.data is not None:
        if bench.tokenizer.chat_template is None:
            raise ValueError(
                f"{bench.args.policy} has no chat template, and LIFEBench asks for lengths in words: evaluate an "
                "instruction-tuned model, or leave out --data to spread targets over the policy's own lengths."
            )
        tasks = subset(read_lifebench(args.data), args.life_tasks, languages=args.languages, seed=bench.args.seed)
        unit: Any = args.unit
        asked = length_requests(tasks, args.targets or TARGETS, constraints, unit=unit)
        ids = prompt_token_ids(bench.tokenizer, [one.prompt for one in asked])
        return [
            TargetRequest(prompt, one.target, one.constraint, one.task.lang)
            for prompt, one in zip(ids, asked, strict=True)
        ], None
    if args.unit != "tokens":
        raise ValueError("A length in words can only be asked for in words: give --data, or --unit tokens.")
    count = min(args.control_prompts, len(bench.task.held_out))
    prompts = prompt_token_ids(bench.tokenizer, bench.task.held_out["prompt"][:count])
    targets = args.targets or _own_range(bench, prompts)
    return [
        TargetRequest(ids, target, constraint) for constraint in constraints for target in targets for ids in prompts
    ], [row for _ in constraints for _ in targets for row in range(count)]


def _own_range(bench: Bench, prompts: list[list[int]]) -> list[int]:
    """Quantiles of the lengths that the policy writes by itself, from the same truncated candidates."""
    drawn = bench.sampler()(prompts, seed=bench.args.seed + 1, name="own range")
    finished = [len(completion.ids) for completion in drawn if completion.finished]
    if not finished:
        raise ValueError("No completion of the policy ended, so it has no range of lengths: raise max_new_tokens.")
    return sorted({max(2, int(n)) for n in np.quantile(finished, RANGE).round()})


def _judge(bench: Bench, problems: list[int], run: ControlledRun) -> Any:
    def correct(rows: Any) -> np.ndarray:
        asked = bench.task.held_out.select([problems[row] for row in rows])
        completions = [run.completions[row] for row in rows]
        return correct_completions(bench.tokenizer, asked, completions, bench.task.reward_funcs[0])

    return correct


def _score_sheet(scores: Any, requests: list[TargetRequest], what: str, unit: str, limit: int) -> Sheet:
    targets = sorted({one.target for one in requests})
    ruler = any(one.precise_match is not None for of_run in scores.values() for one in of_run.values())
    rows = []
    for constraint in scores[RUNS[0]]:
        for name in RUNS:
            one: ControlScore = scores[name][constraint]
            row = [f"{NAMES[constraint]}, {name}", number(one.score), percent(one.deviation)]
            row += [number(one.per_target[n]) for n in targets]
            if ruler:
                row += [percent(one.precise_match), percent(one.flexible_match)]
            rows.append(row)
    headings = ["constraint", "LS", "mean |LD|", *(f"n = {n}" for n in targets), *(["PM", "FM"] if ruler else [])]
    each = len(requests) // (len(targets) * len(scores[RUNS[0]]))
    return Sheet(
        "LIFEBench's length scores",
        headings,
        rows,
        f"{each} {what} for each target and constraint, lengths in {unit}, both runs cut at {limit} tokens and drawn "
        "from the same truncated candidates with the same seed. LS: 100 where the constraint is kept; LD: "
        "(length - n) / n." + (" PM, FM: Ruler's precise and flexible match." if ruler else ""),
    )


def _quality_sheet(scores: Any) -> Sheet:
    judged = any(one.accuracy is not None for of_run in scores.values() for one in of_run.values())
    rows = []
    for constraint in scores[RUNS[0]]:
        for name in RUNS:
            one: ControlScore = scores[name][constraint]
            quality = one.quality
            row = [f"{NAMES[constraint]}, {name}", percent(quality.repeated), number(quality.perplexity, 2)]
            row += [number(quality.end_surprise, 2), percent(quality.finished)]
            rows.append(row + ([percent(one.accuracy)] if judged else []))
    headings = ["constraint", "repeated 4-grams", "perplexity", "end token, nats", "finished"]
    return Sheet(
        "What became of the text",
        [*headings, *(["correct"] if judged else [])],
        rows,
        "Perplexity under the policy itself, without guidance and without truncation, of the tokens before the end; "
        "end token: mean -log p of ending there.",
    )


def _caption(unit: str) -> str:
    return (
        f"Lengths that came for lengths that were asked for, in {unit}: medians, and from the 5 % to the 95 % "
        "quantile. The shaded side of the diagonal keeps the constraint."
    )


def _draw(figure: Any, requests: list[TargetRequest], runs: dict[str, ControlledRun], unit: str) -> None:
    constraints = list(dict.fromkeys(one.constraint for one in requests))
    targets = sorted({one.target for one in requests})
    figure.set_size_inches(3.5 * len(constraints) + 0.4, 3.8)
    axes = np.atleast_1d(figure.subplots(1, len(constraints), sharey=True))
    asked = {c: np.array([one.constraint == c for one in requests]) for c in constraints}
    of_target = np.array([one.target for one in requests])
    top = 1.03 * max(
        float(np.quantile(run.lengths[asked[c] & (of_target == n)], 0.95))
        for run in runs.values()
        for c in constraints
        for n in targets
    )
    ends = np.array([0, 1.12 * targets[-1]])
    for axis, constraint in zip(axes, constraints, strict=True):
        axis.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", label="as asked for")
        if constraint != "equal":
            other = 0 if constraint == "at_most" else max(top, ends[1])
            axis.fill_between(ends, ends, other, color=GREY, alpha=0.12, linewidth=0)
        for name, colour, marker, shift in zip(RUNS, (ORANGE, BLUE), "so", (-1, 1), strict=True):
            found = [runs[name].lengths[asked[constraint] & (of_target == n)] for n in targets]
            low, middle, high = np.array([np.quantile(lengths, (0.05, 0.5, 0.95)) for lengths in found]).T
            x = np.array(targets) + shift * 0.008 * ends[1]
            axis.errorbar(
                x,
                middle,
                yerr=[middle - low, high - middle],
                color=colour,
                marker=marker,
                markersize=5,
                capsize=2,
                linewidth=0,
                elinewidth=1.2,
                label=name,
            )
        axis.set(title=NAMES[constraint], xlabel=f"n, {unit}", xlim=ends, ylim=(0, max(top, ends[1])))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"length, {unit}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, ncols=3, fontsize=9)
