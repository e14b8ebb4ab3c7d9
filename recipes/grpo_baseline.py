"""GRPO with a published length reward beside the task's own, by name: those of `lenvm_rl/evaluation/contest.py`.

    accelerate launch recipes/grpo_baseline.py --method shorterbetter
    accelerate launch recipes/grpo_baseline.py --method kimi --knob 0.8
    accelerate launch recipes/grpo_baseline.py --method laser --reward_settings '{target: 2048}' --config my.yaml

--knob sets the method's main setting, --reward_settings any of them. What is left out takes the values of the embedded
task there, and the published ones elsewhere. Methods that belong to the optimiser (DLER) set the trainer's fields too.
Other flags, those of recipes/grpo_lenvm.py, win over the method's fields, and those over the YAML of --config.
"""

import sys
from pathlib import Path

from lenvm_rl.experiment import read_contender_flags, run_experiment
from lenvm_rl.launch import run


def main() -> None:
    run_experiment(*read_contender_flags(sys.argv[1:], Path(__file__).parent / "configs" / "embedded.yaml"))


if __name__ == "__main__":
    run(main)
