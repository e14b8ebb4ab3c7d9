"""Largest difference between runs that were resumed and runs that were not: a table of methods and ways to launch.

    python benchmarks/resume.py --write
    python benchmarks/resume.py --methods lenvm hapo --launches one

Every run goes through recipes/grpo_baseline.py on the embedded task, 10 steps with an epoch every four; rollouts serve
two steps, and the checkpoint due at step 5 moves to step 6, from which the second run of each pair resumes in another
process, in the middle of its second epoch. --write puts the table between the markers of docs/resume.md.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from marked import DOCS, write_between
from same_run import ROOT, Difference, check_exit, difference, forked, launched
from transformers import HfArgumentParser

from lenvm_rl.launch import run

METHODS = {
    "lenvm": "GRPO-LenVM",
    "dler": "DLER (dynamic sampling)",
    "hapo": "HAPO",
    "grpo": "GRPO",
    "ppo-lenvm": "PPO-LenVM",
}
LAUNCHES = {"one": "one process", "zero2": "ZeRO-2, 2 processes", "zero3": "ZeRO-3, 2 processes"}
STEPS, RESUMED_AT = 10, 6
FLAGS = "--eval_problems 0 --per_device_train_batch_size 8 --num_generations 4 --max_completion_length 24 "
FLAGS += f"--num_iterations 2 --save_strategy steps --save_steps 5 --max_steps {STEPS}"
OWN_FLAGS = {"dler": ["--knob", "16"]}
"""DLER punishes completions above a limit, which must lie below the longest."""


@dataclass
class ResumeArguments:
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    launches: list[str] = field(default_factory=lambda: list(LAUNCHES))
    write: bool = False


def main() -> None:
    (args,) = HfArgumentParser([ResumeArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    lines = [
        "| | " + " | ".join(LAUNCHES[launch] for launch in args.launches) + " |",
        "|---" * (len(args.launches) + 1) + "|",
    ]
    found = []
    for method in args.methods:
        cells = []
        for launch in args.launches:
            found.append(resumed(method, launch))
            cells.append(f"{found[-1].weights:g}" + (", log differs" if found[-1].unlike else ""))
        lines.append(f"| {METHODS[method]} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if args.write:
        write_between(DOCS / "resume.md", "resumed runs", "\n".join(lines))
    if any(one.any() for one in found):
        raise ValueError("A resumed run is not the run that was not interrupted.")


def resumed(method: str, launch: str) -> Difference:
    """A run, and a second one from its checkpoint, compared."""
    with TemporaryDirectory() as folder:
        whole, second, log = Path(folder) / "whole", Path(folder) / "second", Path(folder) / "log.txt"
        problems = 4 if launch == "one" else 8
        flags = [
            *FLAGS.split(),
            "--method",
            method,
            *OWN_FLAGS.get(method, []),
            "--train_problems",
            str(problems),
            "--output_dir",
        ]
        from_checkpoint = [str(second), "--resume_from_checkpoint", str(second / f"checkpoint-{RESUMED_AT}")]
        for end in ([str(whole)], from_checkpoint):
            if launch == "one":
                code = forked([*flags, *end], log)
            else:
                code = launched([*flags, *end], log, ROOT / "recipes" / "accelerate" / f"cpu_{launch}.yaml")
            check_exit(code, 0, log)
            if not second.exists():
                shutil.copytree(whole / f"checkpoint-{RESUMED_AT}", second / f"checkpoint-{RESUMED_AT}")
        return difference(whole, second, STEPS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
