"""The commands of docs/resume.md, as short as they can be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def benchmark(name, *arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_a_run_killed_in_generation_at_the_optimizer_and_while_it_saves_is_the_run_that_was_left_alone():
    said = benchmark("kill_points.py", "--kills", "3", "--steps", "10")
    assert "1 in generation, 1 in optimizer, 1 in checkpoint" in said
    assert "weight 0, steps lost 0, steps repeated 0, entries of the log and states that differ 0." in said


@pytest.mark.distributed
def test_a_run_under_zero2_resumed_in_its_second_epoch_is_the_run_that_was_not_interrupted():
    assert "| HAPO | 0 |" in benchmark("resume.py", "--methods", "hapo", "--launches", "zero2")
