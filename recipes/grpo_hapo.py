"""HAPO (arXiv 2505.11225): an answer shall be shorter than the shortest right one so far to the same problem.

The embedded policy and task, on whatever this machine has, and the paper's run on its model and problems:

    accelerate launch recipes/grpo_hapo.py
    accelerate launch recipes/grpo_hapo.py --config recipes/configs/hapo-r1-distill-1.5b-deepscaler.yaml

A problem has no history, and its completions no length term, until it was solved once: train for several epochs on few
problems. The history is saved with the checkpoints. Every flag of recipes/grpo_lenvm.py works as well.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from trl import ModelConfig, TrlParser

from lenvm_rl.experiment import ExperimentArguments, LengthMethod, run_experiment
from lenvm_rl.launch import parse, run
from lenvm_rl.trainers.grpo import LenVMGRPOConfig


@dataclass
class HAPOArguments:
    """The history-aware length reward (`reward_fns.HistoryAwareLengthReward`)."""

    weight: float = 1.0
    """Weight of the length term, from 0 to 1; at 1 any right answer still earns more than any wrong one."""

    mode: str = "min"
    """What the history holds of a problem: "min", the shortest correct length, or "mean", the mean of all."""

    shape: str = "cosine"
    """"cosine", or "linear"."""

    correct_floor: float = -0.7
    """The least length term of a correct completion."""

    tolerance: float = 0.1
    """Share by which the linear shape lets a completion be longer than the history."""


def main() -> None:
    parser = TrlParser([HAPOArguments, ExperimentArguments, LenVMGRPOConfig, ModelConfig])  # type: ignore[list-item]
    parser.set_defaults(length_coef=0.0)
    hapo, script, args, model_args = parse(parser, Path(__file__).parent / "configs" / "embedded_hapo.yaml")
    run_experiment(script, args, model_args, LengthMethod("HAPO", "hapo", asdict(hapo)))


if __name__ == "__main__":
    run(main)
