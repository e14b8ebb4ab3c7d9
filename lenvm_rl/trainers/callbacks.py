"""What a person sees of a run while it trains, and how they stop it."""

import atexit
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lenvm_rl.progress import SECONDS_BETWEEN_LINES

SHOWN = {
    "length/correct_rate": "correct {:.0%}",
    "completions/mean_length": "{:.1f} tokens",
    "length/explained_variance": "critic {:.2f}",
}


class TrainingProgress(TrainerCallback):
    """A progress bar with the share of correct completions, their length, and how well the critic still fits; where
    stderr is a file, a line now and then instead."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self._said = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.progress = Progress(
                TextColumn("     train"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.progress.start()
            atexit.register(self.progress.stop)  # gives the cursor back when training ends in an error
            self.task = self.progress.add_task("train", total=state.max_steps, completed=state.global_step, shown="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.progress is not None:
            logs = kwargs["logs"]
            shown = [text.format(logs[key]) for key, text in SHOWN.items() if logs.get(key) is not None]
            if shown:
                self.progress.update(self.task, shown=", ".join(shown))
                self._say(state, ", ".join(shown))

    def _say(self, state: TrainerState, shown: str) -> None:
        assert self.progress is not None
        elapsed = self.progress.tasks[self.task].elapsed or 0.0
        if not self.progress.console.is_terminal and elapsed - self._said >= SECONDS_BETWEEN_LINES:
            self._said = elapsed
            line = f"train: step {state.global_step:,} of {state.max_steps:,}, {shown}"
            self.progress.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C, or a scheduler's SIGTERM, ends training after a step, on all processes; a second Ctrl-C at once.

    Args:
        accelerator: of the trainer.
        may_stop: says, alike on all processes, whether training may end with this step: a run that saves a checkpoint
            then must be where it can be continued.

    A second SIGTERM changes nothing: a scheduler sends one to every process, and a launcher passes its own on.
    """

    interrupted: bool
    """Training was ended so; the same on all processes."""
    terminated: bool
    """SIGTERM reached this process."""

    def __init__(self, accelerator: Accelerator, may_stop: Callable[[], bool] = lambda: True) -> None:
        self.accelerator, self.may_stop = accelerator, may_stop
        self.interrupted = self.terminated = False
        self._asked = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.terminated = True
        elif self._asked:
            self._give_back()  # no on_train_end follows
            raise KeyboardInterrupt
        self._asked = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        stop = self._asked
        if self.accelerator.num_processes > 1:
            # the signal may reach the processes in different steps, or one of them while it waits here: what was agreed
            # decides, or one would stop alone
            stop = bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.accelerator.device)))
        if stop and self.may_stop():
            self.interrupted = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
