import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from reward_fns.verify_pool import Question, VerifierPool

EASY, WRONG = Question("p - q", "-q + p"), Question("p - q", "q - p")
ENDLESS = Question("7", "9^{9^9}-1")


def new_pool(workers: int = 1, seconds_per_answer: float = 20.0, seconds_per_batch: float = 60.0) -> VerifierPool:
    return VerifierPool(workers, seconds_per_answer, seconds_per_batch)


@pytest.fixture(scope="module")
def pool():
    pool = new_pool(workers=2)
    yield pool
    pool.close()


def test_no_question_starts_no_process():
    pool = new_pool()
    assert pool.verify([]) == [] and pool.process_ids() == []


def test_verdicts_come_in_the_order_of_the_questions(pool):
    assert pool.verify([EASY, WRONG, EASY, WRONG, WRONG]) == ["equal", "different", "equal", "different", "different"]


def test_processes_are_kept_from_batch_to_batch(pool):
    pool.verify([EASY, WRONG])
    first = pool.process_ids()
    pool.verify([WRONG])
    assert pool.process_ids() == first and len(first) == 2


def test_endless_computation_is_killed_and_the_rest_is_answered(wait_until_gone):
    pool = new_pool(seconds_per_answer=1.0)
    assert pool.verify([EASY]) == ["equal"]
    first = pool.process_ids()
    start = time.monotonic()
    assert pool.verify([ENDLESS, EASY]) == ["timeout", "equal"]
    assert time.monotonic() - start < 15.0
    assert wait_until_gone(first, 5.0)
    pool.close()


def test_batch_ends_at_its_limit():
    pool = new_pool(workers=2, seconds_per_answer=1.5, seconds_per_batch=2.0)
    pool.verify([EASY])
    start = time.monotonic()
    verdicts = pool.verify([Question("7", f"9^{{9^9}}-{i}") for i in range(64)])
    assert verdicts == ["timeout"] * 64
    assert 1.9 < time.monotonic() - start < 6.0
    assert pool.verify([EASY]) == ["equal"]
    pool.close()


def test_idle_process_killed_from_outside_is_replaced(pool, wait_until_gone):
    pool.verify([EASY, WRONG])
    killed = pool.process_ids()
    for process_id in killed:
        os.kill(process_id, signal.SIGKILL)
    assert wait_until_gone(killed, 5.0)
    assert pool.verify([EASY, WRONG, EASY]) == ["equal", "different", "equal"]
    assert not set(killed) & set(pool.process_ids())


def kill_busy_processes(pool: VerifierPool, times: int) -> None:
    killed: set[int] = set()
    while len(killed) < times:
        for process_id in set(pool.process_ids()) - killed:
            os.kill(process_id, signal.SIGKILL)
            killed.add(process_id)
        time.sleep(0.01)


@pytest.mark.parametrize(("times", "verdict"), [(1, "equal"), (2, "crash")])
def test_busy_process_killed_from_outside_costs_one_more_attempt(times, verdict):
    pool = new_pool()
    killer = threading.Thread(target=kill_busy_processes, args=(pool, times))
    killer.start()
    assert pool.verify([EASY]) == [verdict]
    killer.join()
    pool.close()


def test_threads_take_turns(pool):
    verdicts: dict[int, list[str]] = {}

    def verify(thread: int) -> None:
        verdicts[thread] = pool.verify([EASY if (thread + i) % 2 else WRONG for i in range(6)])

    threads = [threading.Thread(target=verify, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for thread in range(4):
        assert verdicts[thread] == ["equal" if (thread + i) % 2 else "different" for i in range(6)]
    assert len(pool.process_ids()) == 2


def test_pool_that_is_collected_stops_its_processes(wait_until_gone):
    pool = new_pool()
    pool.verify([EASY])
    process_ids = pool.process_ids()
    del pool
    gc.collect()
    assert wait_until_gone(process_ids, 5.0)


def test_closed_pool_starts_anew(wait_until_gone):
    pool = new_pool()
    pool.verify([EASY])
    first = pool.process_ids()
    pool.close()
    assert wait_until_gone(first, 5.0) and pool.process_ids() == []
    assert pool.verify([EASY]) == ["equal"]
    pool.close()


def test_process_that_cannot_start_says_why(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no math-verify here')")
    monkeypatch.syspath_prepend(tmp_path)
    pool = new_pool()
    with pytest.raises(RuntimeError, match=r"exited with code 1 \(ModuleNotFoundError: no math-verify here\).*pip"):
        pool.verify([EASY])
    assert pool.process_ids() == []


def run_script(script: str, directory, environment, **options) -> subprocess.Popen[str]:
    path = directory / "script.py"
    path.write_text(textwrap.dedent(script))
    return subprocess.Popen(
        [sys.executable, str(path), os.getcwd()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=environment,
        **options,
    )


def test_script_without_main_guard_works_from_sys_path_alone(tmp_path, script_environment, wait_until_gone):
    # a module of the current directory must not shadow what the worker imports
    (tmp_path / "sympy.py").write_text("raise ImportError('shadowed')")
    script = """
        import sys
        sys.path = [sys.argv[1], *sys.path[1:]]
        from reward_fns import accuracy_reward
        print(accuracy_reward(completions=[r"\\boxed{-q + p}"], solution=["p - q"]))
        print(*accuracy_reward._pool.process_ids())
        """
    process = run_script(script, tmp_path, script_environment)
    printed, errors = process.communicate(timeout=60)
    assert errors == "" and process.returncode == 0
    rewards, process_ids = printed.splitlines()
    assert rewards == "[1.0]"
    assert wait_until_gone([int(process_id) for process_id in process_ids.split()], 5.0)


@pytest.mark.parametrize("answer", ["-q + p", "9^{9^9}-1"], ids=["idle", "computing"])
def test_no_process_outlives_a_parent_that_is_killed(answer, tmp_path, script_environment, wait_until_gone):
    script = f"""
        import sys, threading, time
        sys.path.insert(0, sys.argv[1])
        from reward_fns.verify_pool import Question, VerifierPool
        pool = VerifierPool(workers=1, seconds_per_answer=2.0, seconds_per_batch=60.0)
        pool.verify([Question("p - q", "-q + p")])
        threading.Thread(target=pool.verify, args=([Question("7", "{answer}")],)).start()
        time.sleep(0.3)
        print(*pool.process_ids(), flush=True)
        time.sleep(60)
        """
    process = run_script(script, tmp_path, script_environment)
    assert process.stdout is not None and process.stderr is not None
    process_ids = [int(process_id) for process_id in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    assert len(process_ids) == 1
    assert wait_until_gone(process_ids, 10.0)


def test_forked_child_starts_its_own_processes_and_leaves_the_parents(tmp_path, script_environment):
    script = """
        import os, sys
        sys.path.insert(0, sys.argv[1])
        from reward_fns.verify_pool import Question, VerifierPool
        pool = VerifierPool(workers=1, seconds_per_answer=20.0, seconds_per_batch=60.0)
        question = Question("p - q", "-q + p")
        pool.verify([question])
        before = pool.process_ids()
        child = os.fork()
        verdicts = pool.verify([question])
        if child == 0:
            sys.exit(verdicts != ["equal"] or pool.process_ids() == before)
        status = os.waitpid(child, 0)[1]
        print(status, pool.verify([question]), pool.process_ids() == before)
        """
    printed, errors = run_script(script, tmp_path, script_environment).communicate(timeout=60)
    assert (printed, errors) == ("0 ['equal'] True\n", "")
