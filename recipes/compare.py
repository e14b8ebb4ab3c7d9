"""Methods that shorten reasoning under equal conditions: one table, one figure of accuracy over tokens.

    python recipes/compare.py lenvm dler hapo grpo --seeds 5             # each at its recommended setting
    python recipes/compare.py lenvm dler --sweep                         # each at all values of its knob
    python recipes/compare.py lenvm=0.5,1 dler=40 grpo --max_steps 50    # values, and flags of recipes/grpo_lenvm.py
    python recipes/compare.py --report_only                              # table and figure of what is there

All methods get the same problems, visited as often and in an order that the seed fixes, the same steps, completions per
step, optimizer and evaluation: recipes/configs/embedded_compare.yaml, or --config. What each method adds is in
`lenvm_rl/evaluation/contest.py`. Dynamic sampling (DLER) generates completions that are not trained on, of further
prompts from the same problems: the column of sampled tokens shows it, and `dler-static` does without.

Runs go to processes of their own (--workers, one thread or one GPU each). The same command goes on after an
interruption or a crash: finished runs are kept, others start from their last checkpoint.
"""

from argparse import ArgumentParser
from pathlib import Path

from lenvm_rl.comparison import Comparison
from lenvm_rl.evaluation.contest import CONTENDERS, read_entries
from lenvm_rl.evaluation.contest_report import contest_table, plot_frontier, summarise
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.launch import run

RECIPES = Path(__file__).parent


def main() -> None:
    parser = ArgumentParser(allow_abbrev=False, epilog="Any other flag goes to every run.")
    parser.add_argument("methods", nargs="*", metavar="METHOD[=VALUE,...]", help=", ".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=3, help="training runs of each setting (default 3)")
    parser.add_argument("--sweep", action="store_true", help="all values of each method's knob")
    parser.add_argument("--workers", type=int, help="runs at a time; by default one for each GPU, or else core")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    parser.add_argument("--config", type=Path, default=RECIPES / "configs" / "embedded_compare.yaml")
    parser.add_argument("--report_only", action="store_true", help="start nothing")
    args, flags = parser.parse_known_args()
    if args.report_only:
        report(args.output_dir)
        return
    if not args.methods or args.seeds < 1:
        raise ValueError(f"Nothing to compare: name methods ({', '.join(CONTENDERS)}) and at least one seed.")
    entries = read_entries(args.methods, args.sweep)
    comparison = Comparison(args.output_dir, RECIPES / "grpo_baseline.py", args.config, flags)
    with comparison.alone():
        comparison.check(entries)
        failed = comparison.finish(comparison.jobs(entries, args.seeds), args.workers, say)
        report(args.output_dir)
    if failed:
        failures = "; ".join(f"{name}: {line}" for name, line in failed.items())
        raise ValueError(f"{len(failed)} runs failed and are not in the report. {failures}")


def report(output_dir: Path) -> None:
    """Write `summary.json`, `table.md` and `frontier.png` from the finished runs, and print the table."""
    summary = summarise(output_dir)
    write_json(output_dir / "summary.json", summary)
    table = contest_table(summary)
    (output_dir / "table.md").write_text(table)
    plot_frontier(summary, output_dir / "frontier.png")
    print(table)
    say(f"{output_dir}/table.md, frontier.png, summary.json")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run(main)
