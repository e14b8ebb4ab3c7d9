"""One factor of the length credit at a time, on the embedded task: what each is worth, and what the default should be.

    python benchmarks/credit_ablation.py --seeds 1                 # all variants, about two hours on two quiet cores
    python benchmarks/credit_ablation.py coef online --seeds 3     # those whose name starts so
    python benchmarks/credit_ablation.py --report_only --write     # what is finished, into docs/

A variant is recipes/grpo_baseline.py --method lenvm under recipes/configs/embedded_compare.yaml with a few flags. The
variants "short" train and evaluate on problems of one or two steps alone: there the frozen critic goes stale. The same
command goes on after an interruption. Writes `summary.json`, `table.md`, `ablation.png` and `over_steps.png`.
"""

import json
import shutil
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from credit_report import read_variants, report
from marked import DOCS, write_between

from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.comparison import Comparison
from lenvm_rl.evaluation.contest_report import START
from lenvm_rl.experiment import read_contender_flags
from lenvm_rl.launch import run
from lenvm_rl.length_controller import CONTROLLERS
from lenvm_rl.tasks.arithmetic import sample_problems

REPOSITORY = Path(__file__).parents[1]
RESAMPLED = ["--dynamic_sampling", "true", "--resample_correct_groups", "true", "--max_resample_rounds", "2"]
PAPER = ["--length_gate", "all", "--length_unsolved_groups", "true"]
ACCURACY = ["--length_controller", "accuracy"]
TOKENS = ["--length_controller", "tokens", "--length_controller_target"]
FOLDER_OF_SHORT = "FOLDER_OF_SHORT"
SHORT = ["--task", FOLDER_OF_SHORT, "--held_out", "test", "--instruction", "", "--eval_problems", "2000"]
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "coef 0": ["--length_coef", "0"],
    "coef 0.1": ["--length_coef", "0.1"],
    "coef 0.3": ["--length_coef", "0.3"],
    "coef 3": ["--length_coef", "3"],
    "coef 10": ["--length_coef", "10"],
    "lambda 0": ["--length_lambda", "0"],
    "lambda 0.9": ["--length_lambda", "0.9"],
    "lambda 0.95": ["--length_lambda", "0.95"],
    "gate all": ["--length_gate", "all"],
    "gate all, unsolved": PAPER,
    "gate solve_rate": ["--length_gate", "solve_rate"],
    "scale std": ["--length_scale", "std", "--length_coef", "0.13"],
    "clip 0.1": ["--length_clip", "0.1"],
    "resolution completion": ["--length_resolution", "completion"],
    "resolution batch": ["--length_resolution", "batch"],
    "trust all": ["--length_critic_trust", "0"],
    "online": ["--length_critic_update", "online"],
    "online, coef 3": ["--length_critic_update", "online", "--length_coef", "3"],
    "refresh": ["--length_critic_update", "refresh"],
    "shared": ["--length_critic", "shared"],
    "shared, backbone 0.1": ["--length_critic", "shared", "--length_backbone_coef", "0.1"],
    "shaping": ["--length_mode", "shaping", *PAPER],
    "shaping, gated": ["--length_mode", "shaping"],
    "cosine from 2": ["--length_controller", "cosine", "--length_coef", "2"],
    "resampled, coef 5": [*RESAMPLED, "--length_coef", "5"],
    "resampled, cosine from 10": [*RESAMPLED, "--length_controller", "cosine", "--length_coef", "10"],
    "resampled, tokens 24": [*RESAMPLED, *TOKENS, "24", "--length_coef", "5"],
    "accuracy from 10": [*ACCURACY, "--length_coef", "10"],
    "accuracy from 0.1": [*ACCURACY, "--length_coef", "0.1"],
    "accuracy 0.9 from 10": [*ACCURACY, "--length_controller_target", "0.9", "--length_coef", "10"],
    "accuracy 0.9 from 0.1": [*ACCURACY, "--length_controller_target", "0.9", "--length_coef", "0.1"],
    "tokens 30 from 10": [*TOKENS, "30", "--length_coef", "10"],
    "tokens 30 from 0.1": [*TOKENS, "30", "--length_coef", "0.1"],
    "target 25": ["--length_target", "25"],
    "target 40": ["--length_target", "40"],
    "target 60": ["--length_target", "60"],
    "target 25, coef 3": ["--length_target", "25", "--length_coef", "3"],
    "target 40, coef 3": ["--length_target", "40", "--length_coef", "3"],
    "target 60, coef 3": ["--length_target", "60", "--length_coef", "3"],
    "short": SHORT,
    "short, coef 0": [*SHORT, "--length_coef", "0"],
    "short, trust all": [*SHORT, "--length_critic_trust", "0"],
    "short, online": [*SHORT, "--length_critic_update", "online"],
    "short, refresh": [*SHORT, "--length_critic_update", "refresh"],
    "short, shared": [*SHORT, "--length_critic", "shared"],
    "short, resolution batch": [*SHORT, "--length_resolution", "batch"],
}
"""Name -> flags of the run. "Resolution batch" is the control: correct completions get one number, no length in it."""


def main() -> None:
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("variants", nargs="*", metavar="START_OF_A_NAME", help=", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/credit_ablation"))
    parser.add_argument("--report_only", action="store_true", help="start nothing")
    parser.add_argument("--write", action="store_true", help="table, figures and summary into docs/")
    args = parser.parse_args()
    chosen = [name for name in VARIANTS if not args.variants or any(name.startswith(word) for word in args.variants)]
    if not chosen:
        raise ValueError(f"No variant starts with {' or '.join(args.variants)}: choose among {', '.join(VARIANTS)}.")
    if not args.report_only:
        comparison = Comparison(
            args.output_dir,
            REPOSITORY / "recipes" / "grpo_baseline.py",
            REPOSITORY / "recipes" / "configs" / "embedded_compare.yaml",
        )
        short = str(write_short_problems(args.output_dir / "short"))
        start = {"method": START, "knob": None, "knob_text": "", "seed": 0}
        with comparison.alone():
            refuse_other_settings(comparison, chosen)
            jobs = [comparison.job(START, start, ["--method", "grpo", "--evaluate_only"])]
            for seed in range(args.seeds):
                for name in chosen:
                    about = {"method": "lenvm", "knob": name, "knob_text": name, "seed": seed}
                    folder = f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
                    flags = [short if flag == FOLDER_OF_SHORT else flag for flag in VARIANTS[name]]
                    jobs.append(comparison.job(folder, about, ["--method", "lenvm", *flags]))
            failed = comparison.finish(jobs, args.workers, partial(print, flush=True))
        for name, line in failed.items():
            print(f"{name} failed: {line}")
    table = report(args.output_dir, VARIANTS)
    print(table)
    if args.write:
        write_between(DOCS / "credit.md", "ablation", table)
        shutil.copy(args.output_dir / "summary.json", DOCS / "data" / "credit_ablation.json")
        shutil.copy(args.output_dir / "ablation.png", DOCS / "figures" / "credit_ablation.png")
        shutil.copy(args.output_dir / "over_steps.png", DOCS / "figures" / "credit_over_steps.png")


def refuse_other_settings(comparison: Comparison, names: Sequence[str]) -> None:
    """Finished runs that were made under other settings than their variant has now cannot stand in for it.

    Raises:
        ValueError: there is one.
    """
    for variant in read_variants(comparison.output_dir, names):
        if variant.name == START:
            continue
        _, args, _, _ = read_contender_flags(["--method", "lenvm", *VARIANTS[variant.name]], comparison.config)
        now = {name: value for name, value in args.to_dict().items() if name.startswith("length_")}
        if now["length_controller"] not in CONTROLLERS:
            now = {name: value for name, value in now.items() if not name.startswith("length_controller_")}
        for finished in variant.runs:
            then = finished.summary["config"]
            changed = [f"{key} {then[key]} then, {now[key]} now" for key in now if then.get(key, now[key]) != now[key]]
            if changed:
                raise ValueError(
                    f"The finished run of {variant.name!r}, seed {finished.seed}, in {comparison.output_dir} was made "
                    f"under other settings ({'; '.join(changed)}): delete its folder, or name another --output_dir."
                )


def write_short_problems(folder: Path) -> Path:
    """Arithmetic problems of one or two steps, 2,000 to train on and 2,000 held out, in a folder for `--task`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, held_out in (("train", False), ("test", True)):
        problems = [p for p in sample_problems(12_000, 0, held_out=held_out) if len(p.steps) <= 2][:2_000]
        rows = (json.dumps({"prompt": p.prompt, "solution": p.solution}) for p in problems)
        with atomic_file(folder / f"{split}.jsonl") as file:
            file.write("".join(row + "\n" for row in rows).encode())
    return folder


if __name__ == "__main__":
    run(main)
