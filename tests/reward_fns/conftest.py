import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from reward_fns import AccuracyReward
from reward_fns.completions import completion_text


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


END = 1


def says_right(completions: Sequence[object], **_: object) -> list[float | None]:
    """Correctness for the tests of length rewards: by the text, "right", "wrong" or "unknown"."""
    verdicts = {"right": 1.0, "wrong": 0.0, "unknown": None}
    return [verdicts[completion_text(completion)] for completion in completions]


@pytest.fixture(scope="session", name="says_right")
def fixture_says_right() -> Callable[..., list[float | None]]:
    return says_right


@pytest.fixture(scope="session")
def batch() -> Callable[..., dict[str, Any]]:
    """What TRL passes, from rows (prompt, tokens, "right" | "wrong" | "unknown" | a bool); `cut` rows have no end."""

    def build(
        rows: Sequence[tuple[str, int, str | bool]], cut: Sequence[int] = (), conversational: bool = False, **more: Any
    ) -> dict[str, Any]:
        texts = [said if isinstance(said, str) else ("right" if said else "wrong") for _, _, said in rows]
        prompts: list[Any] = [prompt for prompt, _, _ in rows]
        completions: list[Any] = texts
        if conversational:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [
            [7] * tokens if index in cut or tokens == 0 else [7] * (tokens - 1) + [END]
            for index, (_, tokens, _) in enumerate(rows)
        ]
        return {"prompts": prompts, "completions": completions, "completion_ids": ids, **more}

    return build
