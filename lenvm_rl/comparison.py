"""The runs of a comparison: a folder and a command for each, and the conditions that they share.

A folder of ``runs`` holds `run.json` (which run it is), what `run_experiment` leaves, `log.txt`, and checkpoints as
long as the run is not finished; a run that is started again goes on from the last one.
"""

import fcntl
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lenvm_rl.evaluation.contest import Entry, build_length_reward
from lenvm_rl.evaluation.contest_report import RUN_FILE, START, read_run
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.experiment import read_contender_flags
from lenvm_rl.launch import INTERRUPTED
from lenvm_rl.trainers.checkpoint import INCOMPLETE_FOLDER, last_checkpoint
from lenvm_rl.trainers.grpo import check_limits
from lenvm_rl.worker_pool import Job, WorkerPool, default_workers

CONDITIONS_FILE = "conditions.json"
_PROGRESS_FILE = "progress"


@dataclass(frozen=True)
class Comparison:
    """Where a comparison lies, and what all of its runs are given.

    Args:
        output_dir: of the comparison.
        recipe: script that trains one contender (recipes/grpo_baseline.py).
        config: YAML of all runs.
        flags: of all runs; they win over the YAML and over what belongs to the methods.
    """

    output_dir: Path
    recipe: Path
    config: Path
    flags: Sequence[str] = ()

    def check(self, entries: Sequence[Entry]) -> None:
        """Refuse flags that a run would not take, and conditions that differ from those of the runs that are there.

        Raises:
            OSError: no such config file.
            ValueError: either of them, or a limit that no completion can reach.
        """
        for entry in entries:
            _, args, _, method = read_contender_flags([*_method_flags(entry), *self._shared_flags()], self.config)
            if method is not None:
                reward = build_length_reward(method.reward, method.settings, correctness=None, eos_token_ids=None)
                check_limits([reward], int(args.max_completion_length or 0))
        path = self.output_dir / CONDITIONS_FILE
        before = json.loads(path.read_text()) if path.exists() else {"methods": {}}
        shared = {"config": yaml.safe_load(self.config.read_text()), "flags": list(self.flags)}
        methods = {entry.name: list(entry.contender.turned(entry.value)) for entry in entries}
        now = json.loads(json.dumps({**shared, "methods": methods}))
        changed = [name for name, value in now["methods"].items() if before["methods"].get(name, value) != value]
        changed += [name for name in shared if name in before and before[name] != now[name]]
        if changed:
            raise ValueError(
                f"{self.output_dir} holds runs made under other conditions ({', '.join(changed)}), which cannot share "
                f"a table with these: name another --output_dir, or repeat what {path} says."
            )
        write_json(path, {**now, "methods": {**before["methods"], **now["methods"]}})

    def jobs(self, entries: Sequence[Entry], seeds: int) -> list[Job]:
        """The evaluation of the policy before training, then every entry once for each seed, seed after seed."""
        about: dict[str, Any] = {"method": START, "knob": None, "knob_text": "", "seed": 0}
        jobs = [self.job(START, about, ["--method", "grpo", "--evaluate_only"])]
        for seed in range(seeds):
            for entry in entries:
                text = f"-{entry.value_text}" if entry.value is not None else ""
                about = {"method": entry.method, "knob": entry.value, "knob_text": entry.value_text, "seed": seed}
                jobs.append(self.job(f"{entry.method}{text}-seed{seed}", about, _method_flags(entry)))
        return jobs

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process runs this comparison.

        Raises:
            ValueError: another one does.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(
                    f"Another comparison runs in {self.output_dir}: wait, or name another --output_dir."
                ) from None
            yield

    def finish(self, jobs: Sequence[Job], workers: int | None, say: Callable[[str], None]) -> dict[str, str]:
        """Run what is not finished, several at a time.

        Args:
            jobs: of `jobs` or `job`.
            workers: runs at a time; None is one for each GPU, or else core.
            say: prints a line.

        Returns:
            Names of the runs that failed, with their last lines.

        Raises:
            SystemExit: interrupted, after the runs were told to stop.
        """
        workers = default_workers() if workers is None else workers
        waiting = [job for job in jobs if job.done() < 1]
        done = len(jobs) - len(waiting)
        say(f"{len(jobs)} runs, {done} of them done before; {workers} at a time; {self.output_dir}/")
        result = WorkerPool(workers, say).run(waiting)
        if result.interrupted:
            say(f"Interrupted with {len(waiting) - len(result.finished)} runs unfinished: the same command goes on.")
            sys.exit(INTERRUPTED)
        return result.failed

    def _shared_flags(self) -> list[str]:
        return ["--config", str(self.config), *self.flags]

    def job(self, name: str, about: dict[str, Any], own: list[str]) -> Job:
        """One run: its folder, which is made here, and the command that starts it or goes on with it."""
        folder = self.output_dir / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, about)
        command = [sys.executable, str(self.recipe), *own, *self._shared_flags(), "--seed", str(about["seed"])]
        command += ["--output_dir", str(folder), "--progress_file", str(folder / _PROGRESS_FILE)]
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            command += ["--resume_from_checkpoint", str(checkpoint)]
        job = Job(name, command, folder / "log.txt", lambda: share_done(folder), lambda: remove_checkpoints(folder))
        if job.done() == 1:  # what stopped the last session may have come before this
            job.tidy()
        return job


def _method_flags(entry: Entry) -> list[str]:
    # a schedule prints as YAML reads it
    return ["--method", entry.method, *(["--knob", str(entry.value)] if entry.value is not None else [])]


def share_done(folder: Path) -> float:
    """How far a run is: 1 when it is finished, and below while it trains and evaluates."""
    if read_run(folder) is not None:
        return 1.0
    try:
        step, _, steps = (folder / _PROGRESS_FILE).read_text().partition("/")
        return 0.95 * int(step) / int(steps)
    except (FileNotFoundError, ValueError):  # not begun, or just being written
        return 0.0


def remove_checkpoints(folder: Path) -> None:
    """Of a finished run: nobody will resume it."""
    for checkpoint in (*folder.glob("checkpoint-*"), *folder.glob(INCOMPLETE_FOLDER)):
        shutil.rmtree(checkpoint)
    (folder / _PROGRESS_FILE).unlink(missing_ok=True)
