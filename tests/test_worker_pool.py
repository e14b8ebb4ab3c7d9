import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lenvm_rl import worker_pool
from lenvm_rl.worker_pool import Job, WorkerPool, duration


@pytest.fixture
def job(tmp_path):
    """A job that runs Python code in its folder; it is done when there is a file `done`, half done with `half`."""

    def make(name, code):
        folder = tmp_path / name
        folder.mkdir()
        script = f"import os, signal, sys, time; os.chdir({str(folder)!r})\n{code}"

        def done():
            return 1.0 if (folder / "done").exists() else 0.5 * (folder / "half").exists()

        return Job(name, [sys.executable, "-c", script], folder / "log.txt", done)

    return make


@pytest.fixture
def pool(monkeypatch):
    """A pool without GPUs, and the lines that it says."""
    monkeypatch.setattr(worker_pool, "devices", lambda: [])

    def make(workers, **options):
        lines = []
        return WorkerPool(workers, lines.append, **options), lines

    return make


FINISH = "open('done', 'w').close()"


def test_jobs_run_so_many_at_a_time_with_one_thread_each(pool, job, tmp_path):
    code = "print(time.monotonic(), os.environ['OMP_NUM_THREADS']); time.sleep(0.5); print(time.monotonic());" + FINISH
    jobs = [job(name, code) for name in "abc"]
    result = pool(2)[0].run(jobs)
    assert sorted(result.finished) == ["a", "b", "c"] and not result.failed and not result.interrupted
    times = []
    for one in jobs:
        begun, threads, ended = one.log.read_text().split()
        times.append((float(begun), float(ended)))
        assert threads == "1"
    overlaps = [sum(b < end and begin < e for b, e in times) for begin, end in times]
    assert max(overlaps) <= 3  # itself and another; the third begins when one of them has ended
    assert times[2][0] > min(times[0][1], times[1][1])


def test_a_job_is_tidied_once_it_is_done(pool, job):
    done, tidied = job("done", FINISH), []
    pool(1)[0].run([replace(job("bad", "sys.exit(1)"), tidy=lambda: tidied.append("bad"))])
    pool(1)[0].run([replace(done, tidy=lambda: tidied.append("done"))])
    assert tidied == ["done"]


def test_a_job_that_fails_is_named_with_its_last_line_and_stops_no_other(pool, job):
    working, lines = pool(1)
    failing = job("bad", "print('working'); sys.exit('error: no such thing')")
    silent = job("silent", "pass")  # ends well, but is not done
    result = working.run([failing, silent, job("good", FINISH)])
    assert result.finished == ["good"]
    assert result.failed == {"bad": "error: no such thing", "silent": "it printed nothing"}
    assert any("bad: failed" in line and "log.txt" in line for line in lines)


def test_status_lines_say_how_far_it_is_and_how_long_it_takes(pool, job):
    working, lines = pool(1, status_seconds=0.3)
    working.run([job("a", f"open('half', 'w').close(); time.sleep(1.5); {FINISH}"), job("b", FINISH)])
    assert any(re.fullmatch(r"0/2 runs done; a 50%; about \d+ s left", line) for line in lines)
    assert any(line.startswith("a: done in") for line in lines)
    assert any(line.startswith("1/2 runs done; b 0%") for line in lines)


def interrupt_when(path, number, times=1, pause=0.0):
    def send():
        while not path.exists():
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(pause)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_workers_to_end_and_starts_no_other(pool, job, tmp_path, number):
    before = signal.getsignal(number)
    code = """
def leave(*_):
    open('saved', 'w').close()
    sys.exit(0)
signal.signal(signal.SIGINT, leave)
open('half', 'w').close()
time.sleep(60)
"""
    working, lines = pool(1)
    interrupt_when(tmp_path / "a" / "half", number)
    result = working.run([job("a", code), job("b", FINISH)])
    assert result.interrupted and not result.finished and not result.failed
    assert (tmp_path / "a" / "saved").exists() and not (tmp_path / "b" / "log.txt").exists()
    assert "a: stopped at 50%" in lines
    assert signal.getsignal(number) is before


def test_the_second_signal_ends_workers_that_do_not_listen(pool, job, tmp_path):
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN); open('half', 'w').close(); time.sleep(60)"
    interrupt_when(tmp_path / "a" / "half", signal.SIGINT, times=2, pause=0.5)
    began = time.monotonic()
    result = pool(1)[0].run([job("a", code)])
    assert result.interrupted and time.monotonic() - began < 30


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent was killed")
def test_no_worker_outlives_a_pool_that_is_killed(tmp_path):
    code = f"""
import sys
from pathlib import Path
from lenvm_rl import worker_pool
worker_pool.devices = lambda: []
script = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
job = worker_pool.Job("a", [sys.executable, "-c", script], Path({str(tmp_path / "log.txt")!r}), lambda: 0.0)
worker_pool.WorkerPool(1, print).run([job])
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    log = tmp_path / "log.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.05)
        assert parent.poll() is None
    parent.kill()
    parent.wait()
    worker = Path(f"/proc/{log.read_text().strip()}/stat")
    until = time.monotonic() + 10
    while worker.exists() and worker.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not worker.exists() or worker.read_text().split()[2] == "Z"


def test_each_worker_sees_one_gpu(pool, job, monkeypatch, tmp_path):
    monkeypatch.setattr(worker_pool, "devices", lambda: ["3", "5"])
    jobs = [job(name, f"print(os.environ['CUDA_VISIBLE_DEVICES']); time.sleep(0.3); {FINISH}") for name in "ab"]
    WorkerPool(2, lambda line: None).run(jobs)
    assert sorted(one.log.read_text().strip() for one in jobs) == ["3", "5"]


def test_a_pool_without_workers_is_refused():
    with pytest.raises(ValueError, match="workers is 0"):
        WorkerPool(0, print)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89, "89 s"), (95, "2 min"), (3600, "60 min"), (7500, "2 h 05 min")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
