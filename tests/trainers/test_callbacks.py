import signal
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState

from lenvm_rl.trainers import callbacks
from lenvm_rl.trainers.callbacks import StopOnInterrupt, TrainingProgress
from lenvm_rl.trainers.grpo import LenVMGRPOConfig, LenVMGRPOTrainer

ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture(autouse=True)
def own_handler():
    """A handler of the test's own, which no Ctrl-C of these tests may reach; and the one that was there, afterwards."""
    reached = []
    before = signal.signal(signal.SIGINT, lambda *_: reached.append(True))
    yield signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert not reached


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def begin(callback):
    callback.on_train_begin(None, TrainerState(is_world_process_zero=True, max_steps=10), None)
    return callback


def step(callback):
    """Ends a step; says whether training should stop."""
    control = TrainerControl()
    callback.on_step_end(None, TrainerState(global_step=1), control)
    return control.should_training_stop


def test_without_ctrl_c_training_goes_on(own_handler):
    stop = begin(StopOnInterrupt(ALONE))
    assert not step(stop)
    stop.on_train_end(None, None, None)
    assert not stop.interrupted and signal.getsignal(signal.SIGINT) is own_handler


def test_ctrl_c_stops_after_the_step():
    stop = begin(StopOnInterrupt(ALONE))
    assert not step(stop)
    ctrl_c()  # in the middle of a step: nothing happens yet
    assert step(stop) and stop.interrupted
    stop.on_train_end(None, None, None)


def test_the_second_ctrl_c_stops_at_once_and_gives_the_handler_back(own_handler):
    begin(StopOnInterrupt(ALONE))
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is own_handler


def test_ctrl_c_at_one_process_stops_all_in_the_same_step():
    first = begin(StopOnInterrupt(SimpleNamespace(num_processes=2, device="cpu", reduce=lambda own: own + 1)))
    assert step(first) and first.interrupted  # the signal reached the other one only
    first.on_train_end(None, None, None)


def test_a_ctrl_c_that_comes_while_the_processes_agree_waits_for_the_next_step():
    # the others have been told that this process goes on: stopping alone would leave them waiting for ever
    def reduce(own):
        sums.append(own.item())
        if len(sums) == 1:
            ctrl_c()
        return own

    sums = []
    stop = begin(StopOnInterrupt(SimpleNamespace(num_processes=2, device="cpu", reduce=reduce)))
    assert not step(stop) and not stop.interrupted
    assert step(stop) and stop.interrupted
    assert sums == [0.0, 1.0]
    stop.on_train_end(None, None, None)


def test_sigterm_stops_as_ctrl_c_does_and_a_second_one_changes_nothing():
    before = signal.getsignal(signal.SIGTERM)
    stop = begin(StopOnInterrupt(ALONE))
    for _ in range(2):  # a scheduler's, and a launcher's
        signal.raise_signal(signal.SIGTERM)
    assert step(stop) and stop.interrupted and stop.terminated
    stop.on_train_end(None, None, None)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_stops_where_it_can_be_continued():
    ready = []
    stop = begin(StopOnInterrupt(ALONE, lambda: bool(ready)))
    ctrl_c()
    assert not step(stop) and not stop.interrupted
    ready.append(True)
    assert step(stop) and stop.interrupted and not stop.terminated
    stop.on_train_end(None, None, None)


class CtrlCInStep(TrainerCallback):
    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                ctrl_c()


@pytest.fixture
def trainer(policy_folder, tokenizer, tmp_path, tiny_run, prompts, short_is_right):
    args = LenVMGRPOConfig(str(tmp_path), length_coef=0.0, **(tiny_run | {"max_steps": 5}))
    trainer = LenVMGRPOTrainer(policy_folder, short_is_right, args, prompts(), processing_class=tokenizer)
    trainer.add_callback(StopOnInterrupt(trainer.accelerator))
    return trainer


def test_a_trainer_finishes_its_step_and_returns(trainer, own_handler):
    trainer.add_callback(CtrlCInStep(2))
    trainer.train()
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGINT) is own_handler


def test_a_trainer_that_is_interrupted_twice_raises(trainer, own_handler):
    trainer.add_callback(CtrlCInStep(2, times=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 1
    assert signal.getsignal(signal.SIGINT) is own_handler


def test_progress_shows_steps_and_what_was_logged_on_stderr(capsys):
    progress = begin(TrainingProgress())
    logs = {
        "length/correct_rate": 0.81,
        "completions/mean_length": 41.26,
        "length/explained_variance": None,
        "loss": 1.0,
    }
    progress.on_log(None, None, None, logs=logs)
    progress.on_step_end(None, TrainerState(global_step=4), None)
    progress.on_log(None, None, None, logs={"train_runtime": 3.0})  # leaves what is shown
    progress.on_train_end(None, None, None)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "train" in shown.err and "4/10" in shown.err and "correct 81%, 41.3 tokens" in shown.err
    assert "critic" not in shown.err


def test_progress_is_shown_by_the_first_process_only(capsys):
    progress = TrainingProgress()
    progress.on_train_begin(None, TrainerState(is_world_process_zero=False, max_steps=10), None)
    progress.on_step_end(None, TrainerState(global_step=4), None)
    progress.on_log(None, None, None, logs={"length/correct_rate": 0.8})
    progress.on_train_end(None, None, None)
    assert capsys.readouterr().err == ""


def test_without_a_terminal_lines_say_how_far_training_is(capsys, monkeypatch):
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_LINES", 0.0)
    progress = begin(TrainingProgress())
    progress.on_log(None, TrainerState(global_step=4, max_steps=10), None, logs={"length/correct_rate": 0.8})
    progress.on_train_end(None, None, None)
    assert "train: step 4 of 10, correct 80%" in capsys.readouterr().err
