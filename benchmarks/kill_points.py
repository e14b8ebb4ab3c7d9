"""A run that is killed again and again, beside one that is not: nothing lost, nothing repeated.

    python benchmarks/kill_points.py
    python benchmarks/kill_points.py --kills 3 --steps 8

HAPO with dynamic sampling on the embedded task: a history and a stream of prompts to lose, rollouts used for two steps,
checkpoints that fall due between these, and an epoch every four steps. Each time the run is killed
(SIGKILL) in generation, at the optimizer's step, at a file of a checkpoint, or at any moment; it is started again with
--resume_from_checkpoint last. In the end its weights, its history and the log of every step must be those of the run
that was left alone. The result goes between the markers of docs/resume.md with --write.

Processes are forked from this one after its imports, which saves the seconds of a start; they share nothing else.
"""

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from marked import DOCS, write_between
from same_run import check_exit, difference, forked
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import HfArgumentParser

from lenvm_rl.launch import run
from lenvm_rl.trainers.checkpoint import INCOMPLETE_FOLDER, last_checkpoint
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer

FLAGS = "--method hapo --dynamic_sampling true --num_iterations 2 --train_problems 4 --eval_problems 0 "
FLAGS += "--per_device_train_batch_size 8 --num_generations 4 --max_completion_length 24 "
FLAGS += "--save_strategy steps --save_steps 3 --save_total_limit 2 --resume_from_checkpoint last"
PLACES = ("generation", "optimizer", "checkpoint", "any moment")


@dataclass
class KillArguments:
    kills: int = 20
    steps: int = 60
    seed: int = 0
    write: bool = False


@dataclass(frozen=True)
class KillPoint:
    """Where a process ends."""

    place: str
    step: int
    """Optimizer steps of this process before it; ignored where the place is a moment."""
    count: int
    """Tokens generated, or files of a checkpoint opened, until then."""
    seconds: float

    def set(self) -> None:
        """Arm it, in the process that shall die."""
        if self.place == "any moment":
            timer = threading.Timer(self.seconds, kill)
            timer.daemon = True
            timer.start()
        elif self.place == "checkpoint":
            sys.addaudithook(self._at_file())
        else:
            self._at_step()

    def _at_file(self) -> Callable[[str, tuple[Any, ...]], None]:
        seen = Counter[str]()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename") and INCOMPLETE_FOLDER in str(arguments[0]):
                seen["files"] += 1
                if seen["files"] == self.count:
                    kill()

        return hook

    def _at_step(self) -> None:
        steps = Counter[str]()
        generate = LenVMGRPOTrainer._rolled_out

        def after(*_: Any) -> None:
            steps["done"] += 1
            if self.place == "optimizer" and self.count % 2 and steps["done"] > self.step:
                kill()

        def before(*_: Any) -> None:
            if self.place == "optimizer" and self.count % 2 == 0 and steps["done"] == self.step:
                kill()

        def generating(trainer: Any, inputs: Any) -> Any:
            if self.place == "generation" and steps["done"] >= self.step:
                tokens = iter(range(self.count))
                trainer.model.register_forward_hook(lambda *_: kill() if next(tokens, None) is None else None)
            return generate(trainer, inputs)

        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)
        LenVMGRPOTrainer._rolled_out = generating  # type: ignore[method-assign, assignment]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    (args,) = HfArgumentParser([KillArguments]).parse_args_into_dataclasses()  # type: ignore[list-item]
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        whole, killed, log = Path(folder) / "whole", Path(folder) / "killed", Path(folder) / "log.txt"
        flags = [*FLAGS.split(), "--max_steps", str(args.steps), "--output_dir"]
        check_exit(forked([*flags, str(whole)], log), 0, log)
        rng, places = random.Random(args.seed), Counter[str]()
        for number in range(args.kills):
            # as many of each where there are few
            place = rng.choice(PLACES) if args.kills > 2 * len(PLACES) else PLACES[number % len(PLACES)]
            point = KillPoint(place, rng.randrange(1, 6), rng.randrange(1, 16), rng.uniform(0.1, 5))
            check_exit(forked([*flags, str(killed)], log, point.set), -signal.SIGKILL, log)
            places[place] += 1
            reached = last_checkpoint(killed)
            print(f"{number + 1}: killed in {place}; on disk: {reached.name if reached else 'nothing'}", flush=True)
        check_exit(forked([*flags, str(killed)], log), 0, log)
        found = difference(whole, killed, args.steps)
    where = ", ".join(f"{places[place]} in {place}" for place in PLACES if places[place]).replace("in any", "at any")
    result = (
        f"{args.kills} kills in a run of {args.steps} steps ({where}): largest difference of a weight "
        f"{found.weights:g}, steps lost {found.lost}, steps repeated {found.repeated}, entries of the log and states "
        f"that differ {found.unlike}."
    )
    print(f"{result} {time.perf_counter() - began:.0f} s")
    if args.write:
        write_between(DOCS / "resume.md", "kill points", result)
    if found.any():
        raise ValueError("The run that was killed is not the run that was left alone.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
