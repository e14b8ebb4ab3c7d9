"""Problems with verifiable answers: training and held-out datasets, and the reward that says what is correct.

1. `load_task` knows four kinds by their name: `arithmetic` (embedded), `gym:<dataset>` (reasoning-gym), a local file or
   folder, and a hub dataset.
2. Held-out problems never occur among the training problems, whatever the source repeats: texts are compared.
3. The same arguments give the same problems, on every rank and in every session.
4. Left out: images, tools, and answers that only a model could judge.
"""

import difflib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from reward_fns.accuracy import AccuracyReward

from .arithmetic import arithmetic_dataset
from .files import SUFFIXES, read_problems
from .gym import GymReward, gym_problems

__all__ = ["BOX_INSTRUCTION", "GENERATED_TRAIN_SIZE", "GymReward", "Task", "load_task"]

BOX_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
"""Appended to the questions of every task but arithmetic, whose policy knows no other answers."""
GENERATED_TRAIN_SIZE = 2000
"""Training problems of a task that generates them, unless a number is asked for."""

_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+(:.+)?")


@dataclass(frozen=True)
class Task:
    """Problems, and what their answers are worth."""

    name: str
    train: Dataset
    """Columns `prompt` (text, or a list of messages), `solution` (text) and what else the source has."""
    held_out: Dataset
    """The same columns; no prompt of it is in `train`. Empty where no problems were held out."""
    reward_funcs: list[Any]
    """TRL reward functions. The first one says what is correct: a reward of 1.0."""


def load_task(
    name: str,
    *,
    train_size: int | None = None,
    held_out_size: int | None = 200,
    seed: int = 0,
    conversational: bool = False,
    instruction: str | None = None,
    split: str = "train",
    held_out: str | None = None,
    solution_column: str | None = None,
) -> Task:
    r"""Problems by name.

    Args:
        name: `arithmetic`; `gym:chain_sum`, also with settings, `gym:chain_sum:max_terms=2,max_digits=1`; the path of a
            `.jsonl`, `.json` or `.parquet` file or of a folder of them; or a hub dataset, `owner/name` or
            `owner/name:configuration`. See `lenvm_rl.tasks.files` for the columns.
        train_size: number of training problems. From a file or the hub it is the most to take, and None takes all;
            generated tasks give exactly as many, and `GENERATED_TRAIN_SIZE` for None.
        held_out_size: number of held-out problems. They are drawn from `held_out`, of which None takes all; without
            `held_out` they are split off, before the training problems are chosen.
        seed: of the generator, and of the choice of problems.
        conversational: make each question a message of the user, for models with a chat template.
        instruction: appended to each question on a line of its own; None appends `BOX_INSTRUCTION` (nothing to
            arithmetic), "" nothing. Prompts that are conversations already stay as they are.
        split: split of a folder or hub dataset to train on.
        held_out: held-out problems of a file or hub dataset: a second file, or another split of the same folder or hub
            dataset. Training problems that occur in it are dropped.
        solution_column: column of the golds in a file or hub dataset, where it is neither `solution` nor `answer`.

    Raises:
        FileNotFoundError: no such file, or a hub that cannot be reached.
        ImportError: reasoning-gym is not installed.
        ValueError: an argument that does not fit the task, or problems that cannot be used.
    """
    for argument, size in (("train_size", train_size), ("held_out_size", held_out_size)):
        if size is not None and size < 0:
            raise ValueError(f"{argument} is {size}, but a number of problems cannot be negative.")
    if name != "arithmetic" and not name.startswith("gym:"):
        _check_source(name)

        def read(source: str, split: str = "train") -> Dataset:
            return _ask(read_problems(source, split, solution_column=solution_column), instruction, conversational)

        problems = read(name, split)
        others = None if held_out is None else _read_held_out(read, name, held_out)
        train, evaluation = _split(problems, others, train_size, held_out_size, seed, name)
        return Task(name, train, evaluation, [AccuracyReward()])

    if held_out is not None or solution_column is not None or split != "train":
        raise ValueError(f"Task {name!r} generates its problems: leave out split, held_out and solution_column.")
    if held_out_size is None:
        raise ValueError(f"Task {name!r} generates its problems: say how many to hold out (held_out_size).")
    train_size = GENERATED_TRAIN_SIZE if train_size is None else train_size
    if name == "arithmetic":
        if conversational or instruction:
            raise ValueError(
                "The arithmetic task is plain text for a policy with a vocabulary of its own: leave out conversational "
                "and instruction, or take 'gym:chain_sum' for a chat model."
            )
        train = arithmetic_dataset(train_size, seed, held_out=False)
        return Task(name, train, arithmetic_dataset(held_out_size, seed, held_out=True), [AccuracyReward()])
    train, evaluation, reward = gym_problems(
        name.removeprefix("gym:"), train_size=train_size, held_out_size=held_out_size, seed=seed
    )
    train, evaluation = (_ask(part, instruction, conversational) for part in (train, evaluation))
    return Task(name, train, evaluation, [reward])


def _check_source(name: str) -> None:
    """Stop at what is neither a path nor a hub name: to ask the hub in vain takes half a minute.

    Raises:
        ValueError: no such task.
    """
    if name and (Path(name).exists() or Path(name).suffix in SUFFIXES or _HUB_NAME.fullmatch(name)):
        return
    close = difflib.get_close_matches(name, ["arithmetic", "gym:chain_sum"], n=1)
    raise ValueError(
        f"There is no task {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}: a task is 'arithmetic', "
        f"'gym:<dataset>', a file or folder (there is none of this name in {Path.cwd()}), or a hub dataset "
        "'owner/name'."
    )


def _read_held_out(read: Callable[..., Dataset], source: str, held_out: str) -> Dataset:
    if Path(held_out).suffix in SUFFIXES or Path(held_out).is_file():
        return read(held_out)
    if Path(source).is_file():
        raise FileNotFoundError(f"There is no file {held_out!r} of held-out problems (looked for from {Path.cwd()}).")
    return read(source, held_out)


def _split(
    problems: Dataset, others: Dataset | None, train_size: int | None, held_out_size: int | None, seed: int, source: str
) -> tuple[Dataset, Dataset]:
    """Training and held-out problems; the latter from `others` if there are any, else from `problems`."""
    rng = random.Random(seed)
    rows = rng.sample(range(len(problems)), len(problems))
    keys = [_key(prompt) for prompt in problems["prompt"]]
    held_out_keys: set[str] = set()
    if others is not None:
        # all of them, so that their choice does not change what is trained on
        held_out_keys.update(_key(prompt) for prompt in others["prompt"])
        evaluation = _sample(others, held_out_size, rng)
    elif held_out_size is None:
        raise ValueError(
            f"{source} has no held-out problems of its own: say how many to split off (held_out_size), or where others "
            "are (held_out)."
        )
    else:
        drawn: list[int] = []
        for row in rows:
            if len(drawn) < held_out_size and keys[row] not in held_out_keys:
                drawn.append(row)
                held_out_keys.add(keys[row])
        if len(drawn) < held_out_size:
            raise ValueError(
                f"{source} has {len(drawn)} different problems, too few to hold out {held_out_size}: lower "
                "held_out_size, or name others with held_out."
            )
        evaluation = problems.select(sorted(drawn))
    left = [row for row in rows if keys[row] not in held_out_keys][:train_size]
    if not left and train_size != 0:
        raise ValueError(
            f"All {len(problems)} problems of {source} are held out, none is left to train on: lower held_out_size, "
            "or set train_size to 0 if you only evaluate."
        )
    return problems.select(sorted(left)), evaluation


def _sample(problems: Dataset, size: int | None, rng: random.Random) -> Dataset:
    if size is None or size >= len(problems):
        return problems
    return problems.select(sorted(rng.sample(range(len(problems)), size)))


def _key(prompt: str | list[dict[str, Any]]) -> str:
    """What two prompts have in common when they ask the same: the text, but for white space."""
    text = prompt if isinstance(prompt, str) else "\n".join(f"{message['content']}" for message in prompt)
    return " ".join(text.split())


def _ask(problems: Dataset, instruction: str | None, conversational: bool) -> Dataset:
    """The problems with the instruction, and as conversations where these are asked for."""
    instruction = BOX_INSTRUCTION if instruction is None else instruction
    questions = list(problems["prompt"])
    if not questions or not isinstance(questions[0], str):
        return problems
    texts = [f"{question}\n{instruction}" if instruction else question for question in questions]
    prompts = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    return concatenate_datasets([Dataset.from_dict({"prompt": prompts}), problems.remove_columns("prompt")], axis=1)
