import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from reward_fns import AccuracyReward


def is_running(process_id: int) -> bool:
    # a zombie, which nobody may reap in a container, does not run
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process_ids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_running(process_id) for process_id in process_ids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture(scope="session", name="wait_until_gone")
def fixture_wait_until_gone() -> Callable[[list[int], float], bool]:
    """Whether all of some processes end within some seconds."""
    return wait_until_gone


@pytest.fixture(scope="session")
def reward() -> Iterator[AccuracyReward]:
    """Simplest form; one process, which the tests share."""
    reward = AccuracyReward(workers=1, seconds_per_answer=20.0, seconds_per_batch=60.0)
    yield reward
    process_ids = reward._pool.process_ids()
    reward.close()
    assert wait_until_gone(process_ids, 5.0)


@pytest.fixture(scope="session")
def lenient() -> Iterator[AccuracyReward]:
    """math-verify's own judgement; one process."""
    reward = AccuracyReward(simplest_form=False, workers=1, seconds_per_answer=20.0, seconds_per_batch=60.0)
    yield reward
    reward.close()


@pytest.fixture
def metrics() -> dict[str, float]:
    """What a reward logs through `log_metric=metrics.__setitem__`."""
    return {}


@pytest.fixture
def script_environment() -> dict[str, str]:
    """Environment of a script that knows nothing of the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
