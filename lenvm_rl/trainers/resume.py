"""`trl.GRPOTrainer` whose interrupted runs continue as if nothing had happened.

1. Reward functions with `state_dict()` and `load_state_dict()` (HAPO's history, LASER-D's targets) are saved with every
   checkpoint and restored on resume, in one file; so is what a subclass adds to `stateful_parts`. What it adds to
   `saved_parts`, such as a model with an optimizer of its own, gets a folder in the checkpoint.
2. The prompts of a resumed run are those of the run that was not interrupted in any epoch, where TRL 1.16 repeats the
   first permutation from the second epoch on: its sampler's generator is not saved. Here the permutations are drawn
   again up to the epoch, so a run without interruption sees the prompts that it sees under TRL.

3. TRL does not save a generation batch that is in use. A checkpoint that falls due inside one
   (`steps_per_generation * num_iterations` batches of an optimizer) waits for its end.
4. A checkpoint is whole or absent, and is checked before a run resumes from it (`checkpoint.py`).

The guarantee needs the same number of processes, and map-style datasets.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.trainers import checkpoint as checkpoints
from lenvm_rl.trainers.full_disk import says_what_to_do
from lenvm_rl.trainers.prompts import check_prompts

logger = logging.getLogger(__name__)

STATE_FILE = "lenvm_rl_state.json"


@runtime_checkable
class Stateful(Protocol):
    """Something whose state goes through JSON. In several processes, all hold the same."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


class SavedPart(Protocol):
    """Something whose state is files. In several processes, all take part in saving and loading."""

    def save(self, folder: Path, *, writes: bool) -> None:
        """Write into a folder, which it makes; `writes` is true of the processes that write what all hold alike."""

    def load(self, folder: Path) -> None: ...


class ReplayedSampler(RepeatSampler):
    """TRL's sampler, whose permutation of an epoch does not depend on where the run was resumed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drawn = self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch, counted from 0, comes next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            for _ in range(self._drawn, self._epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        self._drawn = self._epoch = max(self._drawn, self._epoch) + 1
        return super().__iter__()


class EpochOfSampler(TrainerCallback):
    """Tells the sampler which epoch begins: on several processes, accelerate's `set_epoch` does not reach it after a
    resume (accelerate 1.15)."""

    sampler: ReplayedSampler | None = None

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))  # 1.33 in the middle of the second one


class AlignedSaves(TrainerCallback):
    """Lets a checkpoint that falls due inside a generation window wait for its end; the last one of a run is the last.

    Args:
        at_window_end: says whether the next step begins with new rollouts.
    """

    def __init__(self, at_window_end: Callable[[], bool]) -> None:
        self.at_window_end = at_window_end
        self._waiting = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        aligned = self.at_window_end()
        if control.should_save and not aligned and not (control.should_training_stop or _is_last(state)):
            if not self._waiting and state.is_world_process_zero:
                logger.warning(
                    f"The checkpoint due at step {state.global_step} waits until its rollouts are used up: a run "
                    "resumed from here could not have them back."
                )
            control.should_save = False
            self._waiting = True
        elif aligned and self._waiting:
            control.should_save = True
        if control.should_save:
            self._waiting = False


class ResumableGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the state that TRL does not save, and checkpoints that are whole or absent.

    Raises:
        ValueError: a row without a prompt; a best model to be chosen inside a generation window; on saving, a state
            that JSON cannot hold; on resuming, a checkpoint that is not whole, of another number of processes, or
            without the state that this run needs.
        OSError: a checkpoint that does not fit on the disk; the ones before it are as they were.
    """

    args: Any  # a GRPOConfig, whose numbers are all set once it is made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_prompts(self.train_dataset)
        self._check_best_model()
        self._writing = False
        self._checked: str | None = None
        self._epoch_of_sampler = EpochOfSampler()
        self._aligned_saves = AlignedSaves(lambda: self.at_window_end)
        for callback in (self._epoch_of_sampler, self._aligned_saves):
            self.add_callback(callback)

    @property
    def at_window_end(self) -> bool:
        """The next step begins with new rollouts, and a run can be continued from here."""
        return self._step % self._window == 0

    @property
    def _window(self) -> int:
        window: int = self.args.steps_per_generation * self.num_iterations
        return window

    def _check_best_model(self) -> None:
        """The best model is that of an evaluation, and its checkpoint cannot wait."""
        chosen = self.args.load_best_model_at_end or self.args.save_strategy == "best"
        batches = self.args.eval_steps and self.args.eval_steps * self.args.gradient_accumulation_steps
        if chosen and self.args.eval_strategy == "steps" and batches % self._window:
            raise ValueError(
                "save_strategy='best' and load_best_model_at_end need evaluations where a checkpoint can be saved, "
                f"between two generation batches, but eval_steps={self.args.eval_steps} lies inside one: make "
                "eval_steps * gradient_accumulation_steps a multiple of "
                f"steps_per_generation * num_iterations = {self._window}."
            )

    def stateful_parts(self) -> dict[str, Stateful]:
        """What is saved with a checkpoint, by name."""
        return {
            f"rewards/{number}/{name}": function
            for number, (name, reward) in enumerate(zip(self.reward_func_names, self.reward_funcs, strict=True))
            if (function := _stateful_function(reward)) is not None
        }

    def saved_parts(self) -> dict[str, SavedPart]:
        """What writes files of its own into a checkpoint, by the name of its folder there."""
        return {}

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(dataset)
        self._epoch_of_sampler.sampler = ReplayedSampler(
            sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )
        return self._epoch_of_sampler.sampler

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, from a `checked_checkpoint`."""
        resume = self.checked_checkpoint(resume_from_checkpoint)
        self.remove_callback(self._aligned_saves)
        self.add_callback(self._aligned_saves)  # sees what every other callback decided
        return super().train(resume, *args, **kwargs)

    def checked_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint to resume from, after its files were compared with its manifest. Collective.

        Args:
            wanted: a path; True for the last checkpoint of the run that is whole, and "last" for the same or, where
                there is none, None: what a scheduler can start again and again. Later ones that are not whole are named
                in the log.

        Raises:
            ValueError: as the class says; for True, if there is none.
        """
        if wanted and wanted == self._checked:
            return wanted
        run = Path(self.args.output_dir)
        self._on_each_disk(lambda: checkpoints.settle(run))
        searched = wanted is True or wanted == "last"
        if searched:
            found = [checkpoints.last_checkpoint(run, _say_skipped) if self.is_world_process_zero() else None]
            broadcast_object_list(found)
            if found[0] is None and wanted is True:
                raise ValueError(f"{str(run)!r} holds no checkpoint that is whole: start without resuming.")
            wanted = None if found[0] is None else str(found[0])
        if not wanted:
            return None
        folder = Path(str(wanted))
        looks = self.is_local_process_zero() and not (searched and self.is_world_process_zero())
        # all processes learn what one found, or the others would wait for it
        if wrong := [fault for fault in gather_object([checkpoints.fault(folder) if looks else None]) if fault]:
            other = checkpoints.last_checkpoint(folder.parent)
            raise ValueError(
                f"The checkpoint {str(folder)!r} is not as it was saved: {wrong[0]}. "
                + (f"Resume from {str(other)!r}, the last one that is whole." if other else "No other there is whole.")
            )
        self._check_origin(folder)
        self._checked = str(folder)
        return self._checked

    def _check_origin(self, folder: Path) -> None:
        about = checkpoints.about(folder)
        if about["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"The checkpoint {str(folder)!r} was saved by {about['processes']} processes, but "
                f"{self.accelerator.num_processes} are running, and each has its own random state and its own prompts. "
                "Launch as many, or begin a new run from its weights."
            )
        if not about["at_window_end"] and self.is_world_process_zero():
            logger.warning(
                f"The checkpoint {str(folder)!r} was the last of its run and lies inside a generation window: more "
                "steps from here are not those of a run that was longer from the start."
            )

    def _get_output_dir(self, trial: Any) -> str:
        # where transformers writes a checkpoint (5.23)
        run: str = super()._get_output_dir(trial)
        return str(Path(run) / checkpoints.INCOMPLETE_FOLDER) if self._writing else run

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder = run / checkpoints.INCOMPLETE_FOLDER / name
        self._on_each_disk(lambda: shutil.rmtree(folder.parent, ignore_errors=True))
        with says_what_to_do(folder, run):
            if self.args.should_save and (parts := self.stateful_parts()):
                save_states(parts, folder)
            self._writing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing = False
            for part_name, part in self.saved_parts().items():
                part.save(folder / part_name, writes=self.args.should_save)
            if (best := self.state.best_model_checkpoint) and Path(best).parent == folder.parent:
                self.state.best_model_checkpoint = str(run / name)
                if self.args.should_save:
                    self.state.save_to_json(str(folder / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            about = {"processes": self.accelerator.num_processes, "at_window_end": self.at_window_end}
            self._on_each_disk(lambda: checkpoints.publish(folder, run / name, about))
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            rotate_checkpoints(str(run), self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing yet: it is uploaded in the background, under the name that it still lacks."""

    def _on_each_disk(self, act: Callable[[], Any]) -> None:
        """Once for all nodes where they share a disk: by the first process, then by the first of every node."""
        for acts in (self.is_world_process_zero(), self.is_local_process_zero()):
            if acts:
                act()
            self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if parts := self.stateful_parts():
            load_states(parts, Path(checkpoint))
        load_parts(self.saved_parts(), Path(checkpoint))


def _say_skipped(checkpoint: Path, fault: str) -> None:
    logger.warning(f"The checkpoint {str(checkpoint)!r} is passed over, since it is not as it was saved: {fault}.")


def _is_last(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps


def save_states(parts: dict[str, Stateful], folder: Path) -> None:
    """Write all states to one file of the folder, whole or not at all.

    Raises:
        ValueError: a state that JSON cannot hold, with its name.
    """
    lines = {}
    for name, part in parts.items():
        try:
            lines[name] = json.loads(json.dumps(part.state_dict()))
        except TypeError as error:
            raise ValueError(
                f"The state of {name!r} cannot be saved with the checkpoint: {error}. state_dict() must return what "
                "JSON can hold: dicts with text as keys, lists, numbers, text."
            ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / STATE_FILE) as file:
        file.write(json.dumps(lines).encode())


def load_states(parts: dict[str, Stateful], folder: Path) -> None:
    """Give each part the state that was saved under its name. States of other names are left alone.

    Raises:
        ValueError: there is none for one of them.
    """
    path = folder / STATE_FILE
    saved = json.loads(path.read_text()) if path.is_file() else {}
    if missing := [name for name in parts if name not in saved]:
        held = f"it holds {', '.join(map(repr, saved))}" if saved else f"it has no {STATE_FILE}"
        raise _without_state(folder, missing, held)
    for name, part in parts.items():
        part.load_state_dict(saved[name])


def load_parts(parts: dict[str, SavedPart], folder: Path) -> None:
    """Have each part go on from its folder in a checkpoint.

    Raises:
        ValueError: there is none for one of them, or it cannot go on from there.
    """
    if missing := [name for name in parts if not (folder / name).is_dir()]:
        raise _without_state(folder, missing, "it has no folders of these names")
    for name, part in parts.items():
        part.load(folder / name)


def _without_state(folder: Path, missing: list[str], held: str) -> ValueError:
    return ValueError(
        f"The checkpoint {str(folder)!r} was saved without the state of {', '.join(map(repr, missing))}: {held}. "
        "Resuming would start it from nothing, in the middle of a run. Resume with the reward functions and "
        "settings that the checkpoint was saved with, or begin a new run from its weights."
    )


def _stateful_function(reward: Any) -> Stateful | None:
    """The reward function with a state, under the wrappers around it; None for others and for reward models."""
    while not isinstance(reward, torch.nn.Module):
        if isinstance(reward, Stateful):
            return reward
        if not hasattr(reward, "reward_func"):
            return None
        reward = reward.reward_func
    return None
