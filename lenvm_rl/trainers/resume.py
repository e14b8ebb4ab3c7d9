"""`trl.GRPOTrainer` whose interrupted runs continue as if nothing had happened.

1. Reward functions with `state_dict()` and `load_state_dict()` (HAPO's history, LASER-D's targets) are saved with every
   checkpoint and restored on resume, in one file; so is what a subclass adds to `stateful_parts`.
2. The prompts of a resumed run are those of the run that was not interrupted in any epoch, where TRL 1.16 repeats the
   first permutation from the second epoch on: its sampler's generator is not saved. Here the permutations are drawn
   again up to the epoch, so a run without interruption sees the prompts that it sees under TRL.

The guarantee holds for a checkpoint between two generation batches: `save_steps * gradient_accumulation_steps` must be
a multiple of `steps_per_generation * num_iterations`, since TRL does not save a batch that is in use. It also needs the
same number of processes, and map-style datasets.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from lenvm_rl.atomic_file import atomic_file

STATE_FILE = "lenvm_rl_state.json"


@runtime_checkable
class Stateful(Protocol):
    """Something whose state goes through JSON. In several processes, all hold the same."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


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


class ResumableGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` with the state that TRL does not save.

    Raises:
        ValueError: on saving, a state that JSON cannot hold; on resuming, a checkpoint without the state that this run
            needs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch_of_sampler = EpochOfSampler()
        self.add_callback(self._epoch_of_sampler)

    def stateful_parts(self) -> dict[str, Stateful]:
        """What is saved with a checkpoint, by name."""
        return {
            f"rewards/{number}/{name}": function
            for number, (name, reward) in enumerate(zip(self.reward_func_names, self.reward_funcs, strict=True))
            if (function := _stateful_function(reward)) is not None
        }

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

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # before TRL's own files: a checkpoint that looks complete is complete
        if self.args.should_save and (parts := self.stateful_parts()):
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            save_states(parts, folder)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (parts := self.stateful_parts()):
            load_states(parts, Path(checkpoint))


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
        raise ValueError(
            f"The checkpoint {str(folder)!r} was saved without the state of {', '.join(map(repr, missing))}: {held}. "
            "Resuming would start it from nothing, in the middle of a run. Resume with the reward functions and "
            "settings that the checkpoint was saved with, or begin a new run from its weights."
        )
    for name, part in parts.items():
        part.load_state_dict(saved[name])


def _stateful_function(reward: Any) -> Stateful | None:
    """The reward function with a state, under the wrappers around it; None for others and for reward models."""
    while not isinstance(reward, torch.nn.Module):
        if isinstance(reward, Stateful):
            return reward
        if not hasattr(reward, "reward_func"):
            return None
        reward = reward.reward_func
    return None
