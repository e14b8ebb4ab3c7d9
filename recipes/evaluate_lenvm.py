"""How good a Length Value Model is, on rollouts of its policy that it was not trained on.

    python recipes/evaluate_lenvm.py --lenvm outputs/lenvm --rollouts outputs/rollouts/held_out \\
        --fit_rollouts outputs/rollouts/train --generator embedded/policy

Prints the error at the prompt beside its noise floor and beside predictions that need no critic, and leaves a page with
figures. Rollouts are a folder of pretrain_lenvm.py --rollouts_dir, or a JSONL file of the official code.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from lenvm_rl.assets import model_path
from lenvm_rl.evaluation.length_report import summary, write_length_report
from lenvm_rl.evaluation.length_values import evaluate_lenvm
from lenvm_rl.launch import check_model, one_process, run
from lenvm_rl.model import LengthValueModel
from lenvm_rl.pretraining.official_jsonl import read_official_jsonl
from lenvm_rl.pretraining.storage import load_rollouts


@dataclass
class EvaluateArguments:
    """What to evaluate, on what."""

    rollouts: str
    """Folder or official JSONL of rollouts, several of each prompt, that the critic was not trained on."""

    lenvm: str = "embedded/length_critic"
    """The critic: a folder or hub name, of this project or of the official code."""

    fit_rollouts: str | None = None
    """Rollouts of other prompts that the baselines are fitted to; by default each half of the prompts predicts the
    other."""

    generator: str | None = None
    """The policy, for the baseline of first-token entropy; without it that one is left out."""

    length_gamma: float | None = None
    """Discount of an official checkpoint, which does not store it."""

    output_dir: str = "outputs/lenvm_report"
    token_budget: int = 16_384
    """Tokens of one forward, padding included."""
    seed: int = 0


def main() -> None:
    (args,) = HfArgumentParser([EvaluateArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    one_process("evaluate_lenvm.py evaluates")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    lenvm_path = check_model(model_path(args.lenvm), "lenvm")
    critic: Any = LengthValueModel.from_pretrained(lenvm_path, gamma=args.length_gamma)
    critic.to(device)
    tokenizer = AutoTokenizer.from_pretrained(lenvm_path)
    policy: Any = None
    if args.generator is not None:
        path = check_model(model_path(args.generator), "generator")
        policy = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        policy.to(device)
    evaluation = evaluate_lenvm(
        critic,
        read(args.rollouts, tokenizer),
        fit_on=None if args.fit_rollouts is None else read(args.fit_rollouts, tokenizer),
        policy=policy,
        token_budget=args.token_budget,
        seed=args.seed,
    )
    facts = {"critic": args.lenvm, "generator": critic.config.generator or "not recorded", "read from": args.rollouts}
    page = write_length_report(
        evaluation, args.output_dir, title=f"Length critic {Path(args.lenvm).name}", tokenizer=tokenizer, facts=facts
    )
    print(summary(evaluation), f"The whole page: {page}", sep="\n")


def read(rollouts: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rollouts of a folder or an official file."""
    return read_official_jsonl(rollouts, tokenizer) if Path(rollouts).is_file() else load_rollouts(rollouts)


if __name__ == "__main__":
    run(main)
