"""Runs of the recipe as processes, and whether two of them are the same run: for the benchmarks of resuming."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forks import fork
from safetensors.torch import load_file
from torch import Tensor

from lenvm_rl.experiment import read_contender_flags, run_experiment
from lenvm_rl.trainers.ppo import VALUE_FOLDER
from lenvm_rl.trainers.resume import STATE_FILE

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes" / "configs" / "embedded.yaml"
TIMES = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
"""What the log says of a process, and not of the run."""


@dataclass(frozen=True)
class Difference:
    """Between a run and the one that was left alone."""

    weights: float
    """Largest of a weight."""
    repeated: int
    """Steps more than once in the log."""
    lost: int
    """Steps not in the log."""
    unlike: int
    """Entries of the log, and saved states of rewards and prompts, that are not the same."""

    def any(self) -> bool:
        return bool(self.weights or self.repeated or self.lost or self.unlike)


def forked(flags: list[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """Exit code of recipes/grpo_baseline.py in a fork of this process, which has done nothing but import.

    Args:
        flags: of the recipe.
        log: file to which its output is added.
        before: called in the new process first.
    """

    def act() -> None:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        before()
        run_experiment(*read_contender_flags(flags, CONFIG))

    return os.waitstatus_to_exitcode(os.waitpid(fork(act), 0)[1])


def launched(flags: list[str], log: Path, launch_config: Path) -> int:
    """Exit code of recipes/grpo_baseline.py under `accelerate launch`."""
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    command = [accelerate, "launch", "--config_file", str(launch_config), str(ROOT / "recipes" / "grpo_baseline.py")]
    with log.open("a") as file:
        return subprocess.run(
            [*command, *flags], stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        ).returncode


def check_exit(code: int, wanted: int, log: Path) -> None:
    """
    Raises:
        RuntimeError: another exit code, with the end of the log.
    """
    if code != wanted:
        raise RuntimeError(f"A process ended with {code}, not {wanted}:\n{log.read_text()[-3000:]}")


def difference(whole: Path, other: Path, steps: int) -> Difference:
    """Compare two runs that saved a checkpoint at their last step."""
    expected, weights = (_weights(run) for run in (whole, other))
    ends = [run / f"checkpoint-{steps}" for run in (whole, other)]
    states = [(end / STATE_FILE).read_text() if (end / STATE_FILE).exists() else None for end in ends]
    logs = [json.loads((end / "trainer_state.json").read_text())["log_history"] for end in ends]
    counts = Counter(entry["step"] for entry in logs[1])
    cleaned = [[{k: v for k, v in entry.items() if k not in TIMES} for entry in log] for log in logs]
    return Difference(
        weights=max((expected[name].double() - weights[name].double()).abs().max().item() for name in expected),
        repeated=sum(count > 1 for count in counts.values()),
        lost=sum(step not in counts for step in range(1, steps + 1)),
        unlike=sum(a != b for a, b in zip(*cleaned, strict=False)) + (states[0] != states[1]),
    )


def _weights(run: Path) -> dict[str, Tensor]:
    """Of the policy, and of the task critic where there is one."""
    files = [run / "model.safetensors", *run.glob(f"{VALUE_FOLDER}/model.safetensors")]
    return {f"{file.relative_to(run)} {name}": weight for file in files for name, weight in load_file(file).items()}
