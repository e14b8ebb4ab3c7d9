"""LenVM-GRPO: a frozen length critic makes a policy reason in fewer tokens, inside TRL's GRPO.

The embedded policy, critic and task, on whatever this machine has:

    accelerate launch recipes/grpo_lenvm.py

The same under DeepSpeed ZeRO-2, and a real model from its own configuration:

    accelerate launch --config_file recipes/accelerate/cpu_zero2.yaml recipes/grpo_lenvm.py
    accelerate launch recipes/grpo_lenvm.py --config recipes/configs/smollm2.yaml

Every flag of TRL's GRPOConfig and ModelConfig works, every flag of LenVMGRPOConfig and of ExperimentArguments
(`lenvm_rl/experiment.py`, which also does the work); flags win over the YAML of --config. Plain GRPO is
--length_coef 0.
"""

from pathlib import Path

from trl import ModelConfig, TrlParser

from lenvm_rl.experiment import ExperimentArguments, run_experiment
from lenvm_rl.launch import parse, run
from lenvm_rl.trainers.grpo import LenVMGRPOConfig


def main() -> None:
    parser = TrlParser([ExperimentArguments, LenVMGRPOConfig, ModelConfig])  # type: ignore[list-item]
    script, args, model_args = parse(parser, Path(__file__).parent / "configs" / "embedded.yaml")
    run_experiment(script, args, model_args)


if __name__ == "__main__":
    run(main)
