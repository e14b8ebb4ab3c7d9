import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import TrainerControl

from lenvm_rl import experiment
from lenvm_rl.experiment import ProgressFile, RecordedReward, SaveOnInterrupt


def test_a_recorded_reward_keeps_what_was_said_and_how_long_it_was():
    recorded = RecordedReward(lambda completion_ids, **inputs: [1.0, 0.5, None][: len(completion_ids)])
    assert recorded(completion_ids=[[1, 2], [3], [4, 5, 6]], prompts=["a", "b", "c"]) == [1.0, 0.5, None]
    assert recorded(completion_ids=[[7]], prompts=["d"]) == [1.0]
    assert recorded.correct == [True, False, False, True] and recorded.tokens == [2, 1, 3, 1]


def test_outcomes_of_several_processes_come_in_the_order_of_the_problems(monkeypatch):
    # problems 0 to 4: process 0 has 0, 2 and 4, process 1 has 1 and 3
    parts = [([True, False, True], [10, 12, 14]), ([False, True], [11, 13])]
    monkeypatch.setattr(experiment, "gather_object", lambda own: parts)
    correct, tokens = experiment._in_order(RecordedReward(print), 2, 5)
    assert correct.tolist() == [True, False, False, True, True]
    assert tokens.tolist() == [10, 11, 12, 13, 14] and tokens.dtype == np.int32


@pytest.mark.parametrize(
    ("interrupted", "strategy", "saves"), [(True, "steps", True), (True, "no", False), (False, "steps", False)]
)
def test_an_interrupted_run_saves_a_checkpoint_if_it_saves_any(interrupted, strategy, saves):
    control = TrainerControl()
    callback = SaveOnInterrupt(SimpleNamespace(interrupted=interrupted))
    callback.on_step_end(SimpleNamespace(save_strategy=strategy), SimpleNamespace(), control)
    assert control.should_save is saves


def test_progress_is_written_by_the_main_process(tmp_path):
    callback = ProgressFile(tmp_path / "progress")
    callback.on_step_end(
        SimpleNamespace(), SimpleNamespace(is_world_process_zero=False, global_step=2, max_steps=9), TrainerControl()
    )
    assert not (tmp_path / "progress").exists()
    callback.on_step_end(
        SimpleNamespace(), SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=9), TrainerControl()
    )
    assert (tmp_path / "progress").read_text() == "3/9\n"


def test_what_training_took_is_read_from_the_log():
    log = [
        {"step": 2, "step_time": 1.5, "num_tokens": 100.0},
        {"step": 4, "step_time": 2.0, "num_tokens": 250.0},
        {"step": 4, "train_runtime": 9.0},
    ]
    assert experiment._spent(log, 2) == {"step_seconds": 7.0, "sampled_tokens": 250.0}
    assert experiment._spent([], 1) == {"step_seconds": 0, "sampled_tokens": 0}
    assert json.loads(json.dumps(experiment._spent(log, 2)))
