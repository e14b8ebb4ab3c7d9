"""Several training runs side by side, each in a process of its own, on the cores or GPUs of one machine.

1. A job is a command that can be started again after it was killed; what it prints goes to its log.
2. One thread for each worker; where there are GPUs, each worker sees one of them.
3. The first SIGINT or SIGTERM asks the workers to end after their current step, the second one ends them at once. Where
   the system can (Linux), workers also end when the pool itself is killed, so that none is left behind.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

GRACE_SECONDS = 120.0
"""Time for the workers to end after they were asked."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Job:
    """Something to run once."""

    name: str
    command: Sequence[str]
    log: Path
    """What it prints, appended."""
    done: Callable[[], float]
    """Share of it that is done, in [0, 1], also while it runs."""
    tidy: Callable[[], None] = lambda: None
    """Called once it is done."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    worker: int
    started: float
    done_at_start: float


@dataclass
class PoolResult:
    finished: list[str]
    failed: dict[str, str]
    """Name of the job -> last line of its log."""
    interrupted: bool


def devices() -> list[str]:
    """Names of the visible GPUs, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def default_workers() -> int:
    """One for each GPU, or else for each core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return len(devices()) or cores


class WorkerPool:
    """Runs jobs, so many at a time.

    Args:
        workers: jobs at a time.
        say: prints a line for people.
        environment: of the jobs, on top of this process's.
        status_seconds: between two lines that say how far everything is.

    Raises:
        ValueError: no worker.
    """

    def __init__(
        self,
        workers: int,
        say: Callable[[str], None],
        environment: Mapping[str, str] | None = None,
        status_seconds: float = 60.0,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}, but somebody has to do the work: give at least 1.")
        self.workers, self.say, self.status_seconds = workers, say, status_seconds
        self.environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
        self._signals = 0

    def run(self, jobs: Sequence[Job]) -> PoolResult:
        """Run all jobs. One that fails does not stop the others."""
        result = PoolResult([], {}, False)
        waiting, running = list(jobs), [None] * self.workers  # type: list[Job], list[_Running | None]
        gpus, began, gained = devices(), time.monotonic(), 0.0
        said = began
        with self._signals_counted():
            while (waiting and not self._signals) or any(running):
                for worker in range(self.workers):
                    if running[worker] is None and waiting and not self._signals:
                        running[worker] = self._start(waiting.pop(0), worker, gpus)
                if time.monotonic() - said >= self.status_seconds and not self._signals:
                    said = time.monotonic()
                    live = [one for one in running if one]
                    now = gained + sum(one.job.done() - one.done_at_start for one in live)
                    left = sum(1 - one.job.done() for one in live) + sum(1 - job.done() for job in waiting)
                    self.say(self._status(len(result.finished), len(jobs), live, left, now / (said - began)))
                if self._signals:
                    self._stop([one for one in running if one])
                time.sleep(0.2)
                for worker, one in enumerate(running):
                    if one is None or one.process.poll() is None:
                        continue
                    running[worker] = None
                    one.log.close()
                    gained += one.job.done() - one.done_at_start
                    self._note(one, result)
                    said = 0.0 if waiting or any(running) else said
        result.interrupted = self._signals > 0
        return result

    def _start(self, job: Job, worker: int, gpus: list[str]) -> _Running:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab")
        own = {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]} if gpus else {}
        process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **self.environment, **own},
            start_new_session=True,  # Ctrl-C reaches the pool alone, which passes it on once
            preexec_fn=_die_with_parent if _LIBC else None,
        )
        return _Running(job, process, log, worker, time.monotonic(), job.done())

    def _note(self, one: _Running, result: PoolResult) -> None:
        seconds = time.monotonic() - one.started
        if one.job.done() >= 1 and one.process.returncode == 0:
            one.job.tidy()
            result.finished.append(one.job.name)
            self.say(f"{one.job.name}: done in {duration(seconds)}")
        elif self._signals:
            self.say(f"{one.job.name}: stopped at {one.job.done():.0%}")
        else:
            lines = one.job.log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
            result.failed[one.job.name] = lines[-1]
            self.say(f"{one.job.name}: failed after {duration(seconds)}: {lines[-1]} (log: {one.job.log})")

    def _status(self, finished: int, total: int, live: list[_Running], left: float, rate: float) -> str:
        shares = ", ".join(f"{one.job.name} {one.job.done():.0%}" for one in live)
        remaining = f"about {duration(left / rate)} left" if rate > 0 else "time left not known yet"
        return f"{finished}/{total} runs done; {shares or 'none running'}; {remaining}"

    def _stop(self, live: list[_Running]) -> None:
        """Ask the workers to end, and wait; end them at once at the second signal or when the time is up."""
        self.say(f"Stopping {len(live)} runs after their current step; interrupt again to end them at once.")
        for one in live:
            one.process.send_signal(signal.SIGINT)
        until = time.monotonic() + GRACE_SECONDS
        while any(one.process.poll() is None for one in live):
            if self._signals > 1 or time.monotonic() > until:
                for one in live:
                    if one.process.poll() is None:
                        os.killpg(one.process.pid, signal.SIGKILL)
                        one.process.wait()
                return
            time.sleep(0.1)

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        def count(*_: Any) -> None:
            self._signals += 1

        previous = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _die_with_parent() -> None:
    """In the worker, before it starts: be killed when the thread that started it ends."""
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def duration(seconds: float) -> str:
    """Seconds for people: 42 s, 3 min, 2 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
