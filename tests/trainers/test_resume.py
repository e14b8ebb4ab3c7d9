import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from lenvm_rl.trainers.checkpoint import INCOMPLETE_FOLDER, MANIFEST_FILE, fault
from lenvm_rl.trainers.grpo import LenVMGRPOTrainer
from lenvm_rl.trainers.resume import STATE_FILE, AlignedSaves, ReplayedSampler, load_parts, load_states, save_states
from reward_fns import HistoryAwareLengthReward, LaserDReward

SAVING = {"save_strategy": "steps", "save_steps": 3, "length_coef": 0.0}


class Counter:
    """A reward function with a state."""

    def __init__(self, name="counter"):
        self.__name__ = name
        self.calls = 0

    def __call__(self, completions, **_):
        self.calls += 1
        return [float(place % 2) for place in range(len(completions))]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def prompts_of(trainer):
    return list(trainer._logs["prompt"])


# The file


def test_states_come_back_under_their_names(tmp_path):
    first, second = Counter(), Counter()
    first.calls, second.calls = 3, 5
    save_states({"a": first, "b": second}, tmp_path / "checkpoint-1")
    again = {"a": Counter(), "b": Counter()}
    load_states(again, tmp_path / "checkpoint-1")
    assert [part.calls for part in again.values()] == [3, 5]
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == [STATE_FILE]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    save_states({"a": Counter()}, tmp_path)
    before = (tmp_path / STATE_FILE).read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    changed = Counter()
    changed.calls = 9
    with pytest.raises(KeyboardInterrupt):
        save_states({"a": changed}, tmp_path)
    assert (tmp_path / STATE_FILE).read_text() == before


def test_a_state_that_json_cannot_hold_is_named(tmp_path):
    broken = Counter()
    broken.state_dict = lambda: {"calls": {1, 2}}
    with pytest.raises(ValueError, match="state of 'mine' cannot be saved with the checkpoint: Object of type set"):
        save_states({"mine": broken}, tmp_path)


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"without the state of 'a': it has no {STATE_FILE}"):
        load_states({"a": Counter()}, tmp_path)
    save_states({"b": Counter()}, tmp_path)
    with pytest.raises(ValueError, match="without the state of 'a': it holds 'b'"):
        load_states({"a": Counter()}, tmp_path)


# The prompts


def test_the_sampler_is_trls_in_a_run_without_interruption_and_catches_up_after_one():
    from trl.trainer.utils import RepeatSampler

    options = {"data_source": range(9), "mini_repeat_count": 2, "batch_size": 3, "seed": 7}
    stock, ours, resumed = RepeatSampler(**options), ReplayedSampler(**options), ReplayedSampler(**options)
    epochs = [list(stock) for _ in range(3)]
    for epoch, rows in enumerate(epochs):
        ours.set_epoch(epoch)
        assert list(ours) == rows
    resumed.set_epoch(2)
    assert list(resumed) == epochs[2]
    unannounced = ReplayedSampler(**options)
    assert [list(unannounced) for _ in range(3)] == epochs


# When a checkpoint is saved


@pytest.mark.parametrize(
    ("window", "due", "saved"),
    [(1, {3, 6}, [3, 6]), (4, {3, 6}, [4, 8]), (4, {1, 2, 3}, [4]), (4, {4}, [4]), (3, {7}, []), (4, {10}, [10])],
)
def test_a_checkpoint_due_inside_a_window_is_saved_at_its_end_and_the_last_one_where_the_run_ends(window, due, saved):
    step, done = 0, []
    callback = AlignedSaves(lambda: step % window == 0)
    for step in range(1, 11 if 7 not in due else 9):
        control = TrainerControl(should_save=step in due)
        callback.on_step_end(None, TrainerState(global_step=step, max_steps=10), control)
        done += [step] * control.should_save
    assert done == saved


def test_a_moved_checkpoint_is_said_once_and_resumes_exactly(train, prompts, caplog, tmp_path):
    options = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 8}
    options |= {"train_dataset": prompts(8), "per_device_train_batch_size": 4, "length_coef": 0.0}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole = train(**options)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    assert [r.message.split(" waits")[0] for r in caplog.records if "waits until" in r.message] == [
        "The checkpoint due at step 3",
        "The checkpoint due at step 6",
    ]
    resumed = train(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed.state.global_step == 8 and prompts_of(resumed) == prompts_of(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_a_best_model_must_be_where_a_checkpoint_can_be(train, prompts):
    options = {"eval_strategy": "steps", "eval_dataset": prompts(8), "num_iterations": 2}
    with pytest.raises(ValueError, match=r"eval_steps=3 lies inside one: .*_generation \* num_iterations = 2"):
        train(**options, **SAVING | {"save_strategy": "best"}, eval_steps=3, metric_for_best_model="eval_reward")


def test_the_best_checkpoint_is_known_by_the_name_it_got(train, prompts, tmp_path):
    options = {"eval_strategy": "steps", "eval_dataset": prompts(4), "eval_steps": 1, "max_steps": 2}
    options |= {"metric_for_best_model": "eval_reward", "per_device_eval_batch_size": 8, "load_best_model_at_end": True}
    train(**options, **SAVING | {"save_steps": 1})
    for step in (1, 2):
        saved = json.loads((tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert Path(saved["best_model_checkpoint"]).parent == tmp_path / "run"
    assert fault(tmp_path / "run" / "checkpoint-1") is None


def test_only_as_many_checkpoints_stay_as_asked(train, tmp_path):
    train(max_steps=3, save_total_limit=2, **SAVING | {"save_steps": 1})
    assert sorted(path.name for path in (tmp_path / "run").glob("*-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not (tmp_path / "run" / INCOMPLETE_FOLDER).exists()


# What a run resumes from


def test_a_damaged_checkpoint_is_refused_or_passed_over_visibly(train, tmp_path, caplog):
    run = tmp_path / "run"
    options = {"max_steps": 3, **SAVING, "save_steps": 1}
    train(**options)
    (run / "checkpoint-3" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"not as it was saved: optimizer.pt is missing. Resume from .*-2'"):
        train(**options, resume_from_checkpoint=str(run / "checkpoint-3"))
    again = train(**options | {"save_strategy": "no"}, resume_from_checkpoint="last")
    assert again.state.global_step == 3
    assert "checkpoint-3' is passed over, since it is not as it was saved: optimizer.pt is missing." in caplog.text


def test_last_begins_anew_where_there_is_nothing_and_true_does_not(train, tmp_path):
    options = {"max_steps": 1, "length_coef": 0.0}
    assert train(**options, resume_from_checkpoint="last").state.global_step == 1
    trainer = train(**options)
    with pytest.raises(ValueError, match=r"run' holds no checkpoint that is whole: start without resuming"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_more_processes_is_refused(train, tmp_path):
    options = {"max_steps": 1, **SAVING, "save_steps": 1}
    train(**options)
    path = tmp_path / "run" / "checkpoint-1" / MANIFEST_FILE
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))
    with pytest.raises(ValueError, match=r"saved by 2 processes, but 1 are running.*Launch as many"):
        train(**options, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


# In the trainer


class Killed(TrainerCallback):
    """Ends the process, as far as a test can, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        self._maybe(state)

    def on_pre_optimizer_step(self, args, state, control, **_):
        self._maybe(state)

    def _maybe(self, state):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(train):
    """Train 7 steps; and again, killed in the 6th and resumed from the checkpoint of the 3rd. Four prompts: the third
    step is in the second epoch, the last one in the fourth."""

    def _interrupted(make_rewards, prompts, **options):
        options = SAVING | {"max_steps": 7, "train_dataset": prompts(4)} | options
        whole = train(reward_funcs=make_rewards(), **options)

        class Dying(LenVMGRPOTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.add_callback(Killed(5))

        folder = Path(whole.args.output_dir)
        (folder / "checkpoint-3").rename(folder / "of-the-whole-run")
        with pytest.raises(KeyboardInterrupt):
            train(Dying, reward_funcs=make_rewards(), **options)
        resumed = train(reward_funcs=make_rewards(), resume_from_checkpoint=str(folder / "checkpoint-3"), **options)
        return whole, resumed

    return _interrupted


def assert_same_run(whole, resumed):
    assert resumed.state.global_step == whole.state.global_step == 7
    assert prompts_of(resumed) == prompts_of(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(resumed)[name]), name


def test_hapos_history_survives_a_killed_run(interrupted, prompts, short_is_right):
    def rewards():
        return [short_is_right, HistoryAwareLengthReward(correctness=short_is_right)]

    whole, resumed = interrupted(rewards, prompts)
    histories = [trainer.reward_funcs[1].reward_func.state_dict() for trainer in (whole, resumed)]
    assert histories[0] == histories[1] and histories[0]["calls"] == 7 and len(histories[0]["history"]) == 4
    assert_same_run(whole, resumed)


def test_laser_ds_targets_survive_a_killed_run(interrupted, prompts, short_is_right):
    def rewards():
        settings = {"shortest": 2, "longest": 12, "spacing": 1, "update_every": 2, "group_size": 4}
        return [short_is_right, LaserDReward(correctness=short_is_right, **settings)]

    whole, resumed = interrupted(rewards, prompts)
    states = [trainer.reward_funcs[1].reward_func.state_dict() for trainer in (whole, resumed)]
    assert states[0] == states[1] and states[0]["targets"] != dict.fromkeys(("high", "medium", "low"), 12)
    assert_same_run(whole, resumed)


def test_further_prompts_go_on_after_a_killed_run(interrupted, prompts):
    def hopeless(completions, number, **_):
        return [float(n % 2 and place % 2) for place, n in enumerate(number)]

    whole, resumed = interrupted(lambda: hopeless, prompts, dynamic_sampling=True, max_resample_rounds=3)
    assert resumed.refill_prompts.position == whole.refill_prompts.position > 7
    assert_same_run(whole, resumed)


def test_one_file_per_checkpoint_holds_all_states(train):
    rewards = [Counter(), Counter("second")]
    trainer = train(reward_funcs=rewards, max_steps=2, dynamic_sampling=True, **SAVING | {"save_steps": 1})
    for step in (1, 2):
        saved = json.loads((Path(trainer.args.output_dir) / f"checkpoint-{step}" / STATE_FILE).read_text())
        assert saved["rewards/0/counter"] == {"calls": step} and saved["rewards/1/second"] == {"calls": step}
        assert saved["refill_prompts"]["position"] == 0
        assert len(saved) == 3


def test_without_a_state_there_is_no_file(train):
    trainer = train(max_steps=1, **SAVING | {"save_steps": 1})
    assert (Path(trainer.args.output_dir) / "checkpoint-1").is_dir()
    assert not (Path(trainer.args.output_dir) / "checkpoint-1" / STATE_FILE).exists()


def test_a_run_does_not_forget_silently(train, tmp_path):
    train(max_steps=1, **SAVING | {"save_steps": 1})
    with pytest.raises(ValueError, match="without the state of 'rewards/0/counter'"):
        train(
            reward_funcs=Counter(), resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"), max_steps=2, **SAVING
        )


class Notebook:
    """A part of a trainer that keeps a file."""

    def __init__(self):
        self.text = "new"

    def save(self, folder, *, writes):
        assert writes
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text(self.text)

    def load(self, folder):
        self.text = (folder / "notes.txt").read_text()


def test_a_part_with_files_of_its_own_is_in_every_checkpoint_and_goes_on_from_there(train, tmp_path):
    notebook = Notebook()

    class Keeping(LenVMGRPOTrainer):
        def saved_parts(self):
            return {"notebook": notebook}

        def training_step(self, *args, **kwargs):
            notebook.text = f"{self.state.global_step}"
            return super().training_step(*args, **kwargs)

    train(Keeping, max_steps=3, **SAVING | {"save_steps": 1})
    run = tmp_path / "run"
    kept = [(run / f"checkpoint-{step}" / "notebook" / "notes.txt").read_text() for step in (1, 2, 3)]
    assert kept == ["0", "1", "2"]
    assert "notebook/notes.txt" in (run / "checkpoint-2" / MANIFEST_FILE).read_text()

    class Reading(LenVMGRPOTrainer):
        def saved_parts(self):
            return {"notebook": notebook}

    notebook.text = "lost"
    train(Reading, max_steps=3, **SAVING, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert notebook.text == "1"


def test_a_checkpoint_without_a_parts_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without the state of 'notebook': it has no folders of these names"):
        load_parts({"notebook": Notebook()}, tmp_path)
