"""DLER (arXiv 2510.15110): the simplest length penalty, truncation, and an optimiser that makes it work.

The embedded policy and task, on whatever this machine has, and the paper's run on its model and problems:

    accelerate launch recipes/grpo_dler.py
    accelerate launch recipes/grpo_dler.py --config recipes/configs/dler-r1-distill-1.5b-deepscaler.yaml

A completion that does not end within --limit tokens earns nothing; rewards are centred per group and divided by the
standard deviation of the batch (eq. 3); groups without a signal are replaced by groups of further prompts; the upper
clip range is the wider one. --easy_limit makes it DA-DLER. Every flag of recipes/grpo_lenvm.py works as well.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from trl import ModelConfig, TrlParser

from lenvm_rl.experiment import ExperimentArguments, LengthMethod, run_experiment
from lenvm_rl.launch import parse, run
from lenvm_rl.trainers.grpo import LenVMGRPOConfig


@dataclass
class DLERArguments:
    """The truncation reward (`reward_fns.TruncationReward`)."""

    limit: int = 4000
    """Tokens within which a completion must end, the end token included."""

    kept: float = 0.0
    """Share of its reward that a cut completion keeps: 0 in the paper, 0.1 in the released code."""

    easy_limit: int | None = None
    """DA-DLER: the shorter limit of prompts that are mostly solved; published 2000. None is DLER."""

    easy_ratio: float = 0.5
    """DA-DLER: a prompt is easy when more than this share of its completions is correct within the limit."""


def main() -> None:
    parser = TrlParser([DLERArguments, ExperimentArguments, LenVMGRPOConfig, ModelConfig])  # type: ignore[list-item]
    # the method itself, where a configuration does not say otherwise
    parser.set_defaults(
        length_coef=0.0,
        advantage_normalization="group_centred_batch_std",
        dynamic_sampling=True,
        epsilon=0.2,
        epsilon_high=0.28,
    )
    dler, script, args, model_args = parse(parser, Path(__file__).parent / "configs" / "embedded_dler.yaml")
    name = "DLER" if dler.easy_limit is None else "DA-DLER"
    run_experiment(script, args, model_args, LengthMethod(name, "dler", asdict(dler)))


if __name__ == "__main__":
    run(main)
