"""What a length critic is worth at inference: prediction, scheduling, length control, trade-off, length tokens.

    python recipes/evaluate.py all          # all of it on the embedded policy and critic, about ten minutes of one core
    python recipes/evaluate.py predict      # MRE at the prompt beside its noise floor; a distribution of the length
    python recipes/evaluate.py schedule     # padding of batches formed by predicted length
    python recipes/evaluate.py lifebench    # equal to, at most, at least n: guided against unguided
    python recipes/evaluate.py tradeoff --policies outputs/demo    # tilt, hard budget, end bias, trained policies
    python recipes/evaluate.py tokens --after outputs/demo         # tokens that lengthen, and which RL removed

LIFEBench on a chat model, and its trade-off on reasoning-gym:

    python recipes/evaluate.py lifebench --policy models/smollm2-135m-instruct --lenvm outputs/smollm2_gsm8k_lenvm \\
        --data lifebench.jsonl --life_tasks 6 --temperature 0.7
    python recipes/evaluate.py tradeoff --policy models/smollm2-135m-instruct --lenvm outputs/smollm2_gsm8k_lenvm \\
        --task gym:chain_sum:min_terms=2,max_terms=3,min_digits=1,max_digits=1 --conversational --temperature 0.7 \\
        --max_new_tokens 96 --problems 100 --draws 1

Each leaves report.md, figures and summary.json in a folder of its own below --output_dir. `<command> --help` lists the
flags; `all` takes those of every command.
"""

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from lenvm_rl.evaluation.analyses import (
    Bench,
    BenchArguments,
    ControlArguments,
    Findings,
    PredictArguments,
    ScheduleArguments,
    TokenArguments,
    TradeoffArguments,
    control,
    predict,
    schedule,
    tokens,
    tradeoff,
)
from lenvm_rl.launch import one_process, run

ANALYSES: dict[str, tuple[Callable[[Bench, Any], Findings], Any, str]] = {
    "predict": (predict, PredictArguments, "length at the prompt, beside its noise floor, and its distribution"),
    "schedule": (schedule, ScheduleArguments, "padding of batches formed by predicted length"),
    "lifebench": (control, ControlArguments, "how well a length that was asked for is kept"),
    "tradeoff": (tradeoff, TradeoffArguments, "accuracy for tokens: tilt, budget, bias, prompt, trained policies"),
    "tokens": (tokens, TokenArguments, "tokens that lengthen and shorten, before and after RL"),
}


def main() -> None:
    command, flags = choose(sys.argv[1:])
    one_process("evaluate.py evaluates")
    chosen = list(ANALYSES) if command == "all" else [command]
    kinds = [BenchArguments, *(ANALYSES[name][1] for name in chosen)]
    parser = HfArgumentParser(kinds, prog=f"evaluate.py {command}")
    bench_args, *arguments = parser.parse_args_into_dataclasses(flags)
    bench = Bench(bench_args)
    for name, args in zip(chosen, arguments, strict=True):
        started = time.perf_counter()
        findings = ANALYSES[name][0](bench, args)
        findings.show()
        page = findings.write(Path(bench_args.output_dir) / name)
        print(f"{page}, figures, summary.json, after {time.perf_counter() - started:.0f} seconds", flush=True)


def choose(flags: list[str]) -> tuple[str, list[str]]:
    """The command, and the flags after it."""
    listed = "\n".join(f"  {name:<10} {what}" for name, (_, _, what) in ANALYSES.items())
    parser = ArgumentParser(
        usage="evaluate.py {" + ",".join([*ANALYSES, "all"]) + "} [flags]",
        description=f"commands:\n{listed}\n  {'all':<10} everything",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=[*ANALYSES, "all"])
    parsed = parser.parse_args(flags[:1])
    return parsed.command, flags[1:]


if __name__ == "__main__":
    run(main)
