"""LIFEBench: writing tasks with a length to keep, in English and Chinese, from a local file (arXiv 2505.16234).

1. A line of the file is a JSON object with ``id``, ``category``, ``type``, ``lang`` ("en" or "cn") and ``task``, a text
   with the places ``{word_count_type}`` and ``{word_count}``. Other keys are not read.
2. In words the task stays as it is. In tokens, the unit in which a model writes, "N words long" becomes "N tokens
   long", and in Chinese the unit after the number is dropped and 字数 becomes token数.
3. A request is a conversation of one user message that starts with the instruction of LenVM's training prompts.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lenvm_rl.evaluation.target_scores import CONSTRAINTS, Constraint

__all__ = ["INSTRUCTION", "TARGETS", "LengthRequest", "LifeTask", "Unit", "length_requests", "read_lifebench", "subset"]

Unit = Literal["tokens", "words"]
INSTRUCTION = "Please follow the instructions below."
TARGETS = (32, 64, 128)
"""Of the lite runs; the paper's go up to 1024."""
PLACES = ("{word_count_type}", "{word_count}")
PHRASES: dict[str, dict[Constraint, str]] = {
    "en": {"equal": "equal to", "at_most": "at most", "at_least": "at least"},
    "cn": {"equal": "等于", "at_most": "至多", "at_least": "至少"},
}


@dataclass(frozen=True)
class LifeTask:
    """Something to write, of a length that is still open."""

    id: int | str
    category: str
    type: str
    lang: str
    """ "en" or "cn"."""
    task: str


@dataclass(frozen=True)
class LengthRequest:
    """A prompt that asks for a length."""

    prompt: list[dict[str, Any]]
    target: int
    constraint: Constraint
    task: LifeTask


def read_lifebench(path: str | Path) -> list[LifeTask]:
    """The tasks of a file in LIFEBench's format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no task, by its number.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path} (looked for from {Path.cwd()}). LIFEBench's tasks are not part of this package: "
            "give the path of a JSONL file with the keys id, category, type, lang and task."
        )
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                tasks.append(LifeTask(*(row[key] for key in ("id", "category", "type", "lang", "task"))))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number}: no task of LIFEBench ({type(error).__name__}: {error}). A line is a JSON "
                    "object with the keys id, category, type, lang and task."
                ) from None
            _check(tasks[-1], f"{path}, line {number}")
    if not tasks:
        raise ValueError(f"{path} holds no tasks.")
    return tasks


def subset(
    tasks: Sequence[LifeTask], count: int | None, *, languages: Sequence[str] = (), seed: int = 0
) -> list[LifeTask]:
    """A fixed choice of tasks, as even over languages and categories as there are any.

    Args:
        tasks: all of them.
        count: how many; None takes all.
        languages: only these; empty takes all.
        seed: of the choice within each language and category.

    Raises:
        ValueError: none are left, or fewer than asked for.
    """
    kept = [task for task in tasks if not languages or task.lang in languages]
    if count is None and kept:
        return kept
    if not kept or count is None or not 1 <= count <= len(kept):
        raise ValueError(
            f"{len(kept)} tasks in {' and '.join(languages) or 'any language'} are there, so {count} of them cannot be "
            "chosen."
        )
    rng = random.Random(seed)
    cells: dict[tuple[str, str], list[LifeTask]] = {}
    for task in kept:
        cells.setdefault((task.category, task.lang), []).append(task)
    piles = [rng.sample(cell, len(cell)) for _, cell in sorted(cells.items())]
    chosen: list[LifeTask] = []
    while len(chosen) < count:
        for pile in piles:
            if pile and len(chosen) < count:
                chosen.append(pile.pop())
    places = {id(task): place for place, task in enumerate(kept)}
    return sorted(chosen, key=lambda task: places[id(task)])


def length_requests(
    tasks: Sequence[LifeTask],
    targets: Sequence[int] = TARGETS,
    constraints: Sequence[Constraint] = CONSTRAINTS,
    *,
    unit: Unit = "tokens",
) -> list[LengthRequest]:
    """Every task with every target and constraint.

    Args:
        tasks: of `read_lifebench`.
        targets: lengths, at least 1.
        constraints: "equal", "at_most", "at_least".
        unit: "tokens" or "words".

    Raises:
        ValueError: another unit or constraint, or a target below 1.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"A length is asked for in {' or '.join(get_args(Unit))}, got {unit!r}.")
    if unknown := [c for c in constraints if c not in CONSTRAINTS]:
        raise ValueError(f"A length constraint is one of {', '.join(CONSTRAINTS)}, got {unknown[0]!r}.")
    if not targets or min(targets) < 1:
        raise ValueError(f"Target lengths must be at least 1, got {list(targets)}.")
    return [
        LengthRequest([{"role": "user", "content": _text(task, target, constraint, unit)}], target, constraint, task)
        for constraint in constraints
        for target in targets
        for task in tasks
    ]


def _text(task: LifeTask, target: int, constraint: Constraint, unit: Unit) -> str:
    text = task.task
    if unit == "tokens":
        if task.lang == "cn":
            text = text.replace("{word_count}字", "{word_count}").replace("字数", "token数")
        else:
            text = text.replace("{word_count} words", "{word_count} tokens")
    filled = text.replace(PLACES[0], PHRASES[task.lang][constraint]).replace(PLACES[1], str(target))
    return f"{INSTRUCTION}\n{filled}"


def _check(task: LifeTask, where: str) -> None:
    if task.lang not in PHRASES:
        raise ValueError(f"{where}: the language {task.lang!r} is none of {', '.join(PHRASES)}.")
    missing = [place for place in PLACES if not isinstance(task.task, str) or place not in task.task]
    if missing:
        raise ValueError(f"{where}: the task has no place {missing[0]}, so no length can be asked for.")
