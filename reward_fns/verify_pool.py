"""Worker processes that compare answers by computer algebra, and are killed when they take too long.

1. Workers are started as `python -m reward_fns.verify_worker`, not forked or spawned by multiprocessing: a script of
   the user needs no main guard, and CUDA state is not inherited.
2. They start when the first answer needs one, serve until the interpreter exits, and are replaced when killed or dead.
3. The clock of an answer starts when its worker is ready: importing sympy from a cold disk is nobody's timeout.

For POSIX systems: elsewhere, pipes cannot be waited for.
"""

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["equal", "different", "timeout", "crash"]

_START_SECONDS = 120.0
_ATTEMPTS = 2  # a worker killed from outside is no fault of its answer


class Question(NamedTuple):
    """One comparison."""

    gold: str
    answer: str
    extract: bool = False
    """The answer is a text, in which math-verify looks for the expression."""


class VerifierPool:
    """Up to `workers` processes that answer questions; safe to use from any thread, one batch at a time.

    Args:
        workers: processes at most; as many are started as a batch has questions.
        seconds_per_answer: wall-clock limit of a question; its worker is killed at the limit.
        seconds_per_batch: wall-clock limit of `verify`, the first worker's start not counted.
    """

    def __init__(self, workers: int, seconds_per_answer: float, seconds_per_batch: float) -> None:
        self.workers = workers
        self.seconds_per_answer = seconds_per_answer
        self.seconds_per_batch = seconds_per_batch
        self._reset()

    def verify(self, questions: Sequence[Question]) -> list[Verdict]:
        """Verdicts in the order of the questions.

        Raises:
            RuntimeError: a worker cannot be started, e.g. because math-verify is not installed.
        """
        if self._process_id != os.getpid():
            # after a fork the workers, and a lock that may be held, belong to the parent
            self._reset()
        with self._lock:
            try:
                return self._verify(questions)
            except BaseException:
                # a worker that still computes would answer the wrong question next time
                _stop(self._crew, self._process_id)
                raise

    def process_ids(self) -> list[int]:
        """Ids of the workers that serve now."""
        return [worker.process_id for worker in self._crew]

    def close(self) -> None:
        """Stop the workers; the next `verify` starts new ones."""
        with self._lock:
            _stop(self._crew, self._process_id)

    def _reset(self) -> None:
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._crew: list[_Worker] = []
        # also runs at interpreter exit
        weakref.finalize(self, _stop, self._crew, self._process_id)

    def _verify(self, questions: Sequence[Question]) -> list[Verdict]:
        verdicts: list[Verdict] = ["timeout"] * len(questions)
        waiting = deque(range(len(questions)))
        attempts = [0] * len(questions)
        batch_deadline = math.inf
        while waiting or any(worker.question_id is not None for worker in self._crew):
            if batch_deadline == math.inf and any(worker.ready for worker in self._crew):
                batch_deadline = time.monotonic() + self.seconds_per_batch
            for worker in self._free_workers(len(waiting)):
                index = waiting.popleft()
                attempts[index] += 1
                worker.ask(index, questions[index], self.seconds_per_answer)
            busy = [worker for worker in self._crew if worker.question_id is not None]
            deadline = min([batch_deadline, *(worker.deadline for worker in busy)])
            for worker in _readable(busy, deadline - time.monotonic()):
                asked, status = worker.question_id, worker.read()
                if asked is None or status is None:
                    continue
                if status == "died" and attempts[asked] < _ATTEMPTS:
                    waiting.append(asked)
                else:
                    verdicts[asked] = "crash" if status == "died" else status
                if not worker.is_alive():
                    self._dismiss(worker)
            now = time.monotonic()
            for worker in [worker for worker in self._crew if worker.question_id is not None]:
                if now >= worker.deadline and not worker.ready:
                    raise RuntimeError(worker.failure(f"was not ready after {_START_SECONDS:.0f} seconds"))
                if now >= worker.deadline or now >= batch_deadline:
                    self._dismiss(worker)
            if now >= batch_deadline:
                break
        return verdicts

    def _free_workers(self, wanted: int) -> list["_Worker"]:
        for worker in [worker for worker in self._crew if worker.question_id is None and not worker.is_alive()]:
            self._dismiss(worker)
        free = [worker for worker in self._crew if worker.question_id is None][:wanted]
        for _ in range(min(wanted - len(free), self.workers - len(self._crew))):
            self._crew.append(_Worker())
            free.append(self._crew[-1])
        return free

    def _dismiss(self, worker: "_Worker") -> None:
        self._crew.remove(worker)
        worker.stop()


class _Worker:
    """One process, and the question it is at."""

    def __init__(self) -> None:
        # a file and not a pipe: it can be read after the end, and never fills up
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # -P: the parent's path alone decides what is imported, not the current directory
            [sys.executable, "-P", "-m", "reward_fns.verify_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._questions, self._replies = self._process.stdin, self._process.stdout
        self.process_id = self._process.pid
        self._buffer = b""
        self._seconds = 0.0
        self.ready = False
        self.question_id: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def fileno(self) -> int:
        return self._replies.fileno()

    def ask(self, question_id: int, question: Question, seconds: float) -> None:
        self.question_id, self._seconds = question_id, seconds
        if self.ready:
            self.deadline = time.monotonic() + seconds
        message = {"id": question_id, "seconds": seconds, **question._asdict()}
        # a few kB, which an empty pipe always holds; of a dead worker the end of stdout tells
        with contextlib.suppress(OSError):
            self._questions.write(json.dumps(message).encode() + b"\n")
            self._questions.flush()

    def read(self) -> Literal["died"] | Verdict | None:
        """What became of the question, None while there is no reply.

        Raises:
            RuntimeError: the process failed to start.
        """
        received = os.read(self.fileno(), 65536)
        if not received:
            code = self._process.wait()
            if not self.ready and code > 0:
                raise RuntimeError(self.failure(f"exited with code {code}"))
            # the worker's own timer, when this process was too busy to keep the time
            return "timeout" if code == -signal.SIGALRM else "died"
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "equal" in reply:
                self.question_id = None
                return "equal" if reply["equal"] else "different"
            self.ready = True
            self.deadline = time.monotonic() + self._seconds
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._questions, self._replies, self._errors):
            with contextlib.suppress(OSError):
                stream.close()

    def failure(self, what: str) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        detail = f" ({lines[-1]})" if lines else ""
        return (
            f"the answer checker, {sys.executable} -m reward_fns.verify_worker, {what}{detail}. Answers other than "
            "numbers are compared by math-verify in such processes: check that `import math_verify` works in this "
            "environment (pip install math-verify)."
        )


def _readable(workers: list[_Worker], seconds: float) -> list[_Worker]:
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(max(0.0, seconds)) if isinstance(key.fileobj, _Worker)]


def _environment() -> dict[str, str]:
    # the parent may have found this package, or math-verify, through sys.path alone
    package_parent = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = [os.path.abspath(entry) for entry in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*path, package_parent]))}


def _stop(crew: list[_Worker], process_id: int) -> None:
    # in a forked child these are the parent's workers
    if os.getpid() == process_id:
        while crew:
            crew.pop().stop()
