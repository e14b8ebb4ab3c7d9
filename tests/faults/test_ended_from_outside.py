"""A recipe whose processes get signals, as schedulers and failing nodes send them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import processes_of, wait_for

from lenvm_rl.launch import TERMINATED
from lenvm_rl.trainers.checkpoint import about, fault, last_checkpoint

ROOT = Path(__file__).parents[2]
FLAGS = "--length_coef 0 --eval_problems 0 --per_device_train_batch_size 8 --num_generations 4 --train_problems 8 "
FLAGS += "--max_completion_length 16 --save_strategy steps --resume_from_checkpoint last"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def start(output, *flags, launch=()):
    recipe = [str(ROOT / "recipes" / "grpo_lenvm.py"), *FLAGS.split(), "--output_dir", str(output), *flags]
    log = (output.parent / f"{output.name}.log").open("a")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *launch, *recipe], stdout=log, stderr=log, env=environment, start_new_session=True
    )


def rank_of(process):
    for variable in Path(f"/proc/{process}/environ").read_text().split("\0"):
        name, _, value = variable.partition("=")
        if name == "RANK":
            return value
    return None


def steps_done(progress):
    done = progress.read_text().partition("/")[0]
    return int(done) if done else 0  # just being written


def steps_logged(checkpoint):
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]


def test_sigterm_saves_where_the_run_can_be_continued_and_a_second_start_ends_it(tmp_path):
    output, log = tmp_path / "run", tmp_path / "run.log"
    # four steps share their rollouts; nothing but the signal makes a checkpoint
    flags = ["--num_iterations", "4", "--save_steps", "1000", "--logging_steps", "1"]
    progress = tmp_path / "progress"
    run = start(output, *flags, "--max_steps", "1000", "--progress_file", str(progress))
    wait_for(lambda: progress.exists() and steps_done(progress) >= 5, run, log)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == TERMINATED, log.read_text()[-3000:]
    checkpoint = last_checkpoint(output)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step % 4 == 0 and step >= 8 and about(checkpoint)["at_window_end"]
    assert json.loads((output / "summary.json").read_text())["interrupted"]

    # on with the same line, but for the end that is nearer
    again = start(output, *flags, "--max_steps", str(step + 4))
    assert again.wait(timeout=200) == 0, log.read_text()[-3000:]
    assert steps_logged(output / f"checkpoint-{step + 4}") == list(range(1, step + 5))
    assert not json.loads((output / "summary.json").read_text())["interrupted"]


@pytest.mark.distributed
def test_when_one_process_dies_the_others_end_with_the_reason_and_nothing_is_left(tmp_path):
    output, log = tmp_path / "run", tmp_path / "run.log"
    config = ROOT / "recipes" / "accelerate" / "cpu_zero2.yaml"
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    run = start(output, "--save_steps", "1", "--save_total_limit", "2", "--max_steps", "1000", launch=launch)
    try:
        wait_for(lambda: last_checkpoint(output) is not None, run, log)
        (victim,) = [process for process in processes_of(output) if rank_of(process) == "1"]
        os.kill(victim, signal.SIGKILL)
        assert run.wait(timeout=90) != 0
        left = processes_of(output)
    finally:
        for process in processes_of(output):
            os.kill(process, signal.SIGKILL)
    assert left == []
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in log.read_text()
    assert fault(last_checkpoint(output)) is None
