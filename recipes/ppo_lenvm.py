"""LenVM-PPO: a task critic and a length critic teach a policy to reason in fewer tokens, inside TRL.

The embedded policy, critic and task, on whatever this machine has:

    accelerate launch recipes/ppo_lenvm.py

The same under DeepSpeed ZeRO-3, and a real model from its own configuration:

    accelerate launch --config_file recipes/accelerate/cpu_zero3.yaml recipes/ppo_lenvm.py
    accelerate launch --config_file recipes/accelerate/zero3.yaml recipes/ppo_lenvm.py \
        --config recipes/configs/ppo_qwen2.5-1.5b-gsm8k.yaml

Every flag of LenVMPPOConfig works, those of recipes/grpo_lenvm.py among them; flags win over the YAML of --config.
Plain PPO is --length_coef 0. The task critic is left in value_model inside the output folder, and
--value_model <that folder> starts another run from it.
"""

from pathlib import Path

from trl import ModelConfig, TrlParser

from lenvm_rl.experiment import ExperimentArguments, run_experiment
from lenvm_rl.launch import parse, run
from lenvm_rl.trainers.ppo import LenVMPPOConfig


def main() -> None:
    parser = TrlParser([ExperimentArguments, LenVMPPOConfig, ModelConfig])  # type: ignore[list-item]
    script, args, model_args = parse(parser, Path(__file__).parent / "configs" / "ppo_embedded.yaml")
    run_experiment(script, args, model_args)


if __name__ == "__main__":
    run(main)
