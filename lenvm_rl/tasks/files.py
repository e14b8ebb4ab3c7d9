r"""Problems from a local file, a folder of files, or the hub: any table with a question and a gold.

1. `.jsonl` (an object per line), `.json` (the same, or a list of objects) and `.parquet`; a folder holds one such file
   per split (`train.jsonl`, `test.jsonl`); anything else is a hub name, `owner/name` or `owner/name:configuration`.
2. The prompt is the column `prompt`, `question` or `problem`, the gold `solution` or `answer`: the first that is there.
   Where a dataset has both golds (MATH), `solution` wins, unless `solution_column` names another.
3. A gold may be a worked solution: its last `\boxed{...}`, or the line after `####`, counts (`reward_fns.answers`).
   A number is taken as its decimal literal, `4` or `0.5`; any other type is refused. Rows are checked once, here.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset

from reward_fns.answers import check_gold

PROMPT_COLUMNS = ("prompt", "question", "problem")
GOLD_COLUMNS = ("solution", "answer")
SUFFIXES = (".jsonl", ".json", ".parquet")


def read_problems(source: str, split: str = "train", *, solution_column: str | None = None) -> Dataset:
    """All problems of one split.

    Args:
        source: path of a file or folder, or a hub name.
        split: split of a folder or of a hub dataset; a file is read whole.
        solution_column: column of the golds, where it is not the first of `GOLD_COLUMNS`.

    Returns:
        Columns `prompt` (strings, or lists of messages) and `solution` (strings), then the other columns as they are.

    Raises:
        FileNotFoundError: no such file or split, or a hub that cannot be reached.
        ValueError: no usable problems; names the row (counted from 0) or the line of the file (counted from 1).
    """
    path = Path(source)
    if path.is_dir():
        path = _file_of_split(path, split)
    is_file = path.exists() or path.suffix in SUFFIXES
    source = str(path) if is_file else source
    table = _read_file(path) if is_file else _read_hub(source, split)
    columns = table if isinstance(table, Mapping) else {name: table[name] for name in table.column_names}
    if not columns or len(next(iter(columns.values()))) == 0:
        raise ValueError(f"{source} is empty: it holds no problems.")

    prompt_column = _find_column(columns, PROMPT_COLUMNS, "question", source)
    gold_column = _find_column(columns, (solution_column,) if solution_column else GOLD_COLUMNS, "gold", source)
    where = f"{source}: row {{}} of column {prompt_column!r}"
    prompts = [_check_prompt(prompt, where.format(row)) for row, prompt in enumerate(columns[prompt_column])]
    golds = [_gold_text(gold, row, gold_column, source) for row, gold in enumerate(columns[gold_column])]
    others = [name for name in columns if name not in (prompt_column, gold_column, "prompt", "solution")]
    try:
        checked = Dataset.from_dict({"prompt": prompts, "solution": golds})
        if not others:
            return checked
        rest = (
            Dataset.from_dict({name: table[name] for name in others})
            if isinstance(table, Mapping)
            else table.select_columns(others)
        )
    except (pa.ArrowException, UnicodeEncodeError, OverflowError) as error:
        raise ValueError(f"{source}: its rows fit no table, since a column must have one type: {error}") from None
    return datasets.concatenate_datasets([checked, rest], axis=1)


def _check_prompt(prompt: object, where: str) -> Any:
    """The prompt, after making sure that there is something to answer.

    Args:
        prompt: a text or a conversation.
        where: how the message calls its place.

    Raises:
        ValueError: it is neither, or it is empty.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where} is an empty prompt: fill it in or drop the row.")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise ValueError(
            f"{where} holds {prompt!r:.200}, but a prompt is a text or a non-empty list of messages: fill it in or "
            "drop the row."
        )
    for message in prompt:
        if not isinstance(message, Mapping) or not message.get("role") or not message.get("content"):
            raise ValueError(
                f"{where} holds the message {message!r:.200}, but a message of a conversation has a role and a "
                "content: {'role': 'user', 'content': '...'}."
            )
    return prompt


def _gold_text(gold: object, row: int, column: str, source: str) -> str:
    if isinstance(gold, int | float) and not isinstance(gold, bool) and math.isfinite(gold):
        # no exponent: an answer is compared with a decimal literal
        gold = format(Decimal(repr(gold)), "f")
    try:
        check_gold(gold, row, column)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return str(gold)


def _find_column(columns: Iterable[str], wanted: Sequence[str], meaning: str, source: str) -> str:
    available = list(columns)
    for name in wanted:
        if name in available:
            return name
    raise ValueError(
        f"{source} has no column {' or '.join(map(repr, wanted))} for the {meaning}, only "
        f"{', '.join(map(repr, available))}: rename the one that holds it."
    )


def _file_of_split(folder: Path, split: str) -> Path:
    for suffix in SUFFIXES:
        if (path := folder / f"{split}{suffix}").is_file():
            return path
    found = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES))
    raise FileNotFoundError(
        f"Folder {folder} has no {' or '.join(split + suffix for suffix in SUFFIXES)}, only {found or 'other files'}: "
        "name another split."
    )


def _read_file(path: Path) -> Dataset | dict[str, list[Any]]:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}: convert it, e.g. to one JSON object per line.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} (looked for from {Path.cwd()}).")
    if path.suffix == ".parquet":
        try:
            return Dataset(pyarrow.parquet.read_table(path))
        except pa.ArrowException as error:
            raise ValueError(f"{path} is no readable parquet file: {error}") from None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}.") from None
    records = list(_json_records(text, path))
    # not Arrow's own reader: a column of numbers and strings is welcome, and errors have a line
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _json_records(text: str, path: Path) -> Iterator[dict[str, Any]]:
    if text.lstrip().startswith("["):
        lines = [(1, text)]
    else:
        # not splitlines, which also splits at characters that JSON allows inside a string
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number + error.lineno - 1}: invalid JSON ({error.msg}, column {error.colno}); expected "
                "one object per line, or one list of objects."
            ) from None
        except (ValueError, RecursionError) as error:
            # an integer of thousands of digits, or lists nested as deep
            raise ValueError(f"{path}, line {number}: unreadable JSON ({error}).") from None
        for record in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected one JSON object per problem, got {record!r:.100}.")
            yield record


def _read_hub(source: str, split: str) -> Dataset:
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except OSError as error:
        raise FileNotFoundError(
            f"{source!r} is no local file or folder (looked for from {Path.cwd()}), and the hub gave: "
            f"{_first_line(error)}"
        ) from error
    except ValueError as error:
        raise ValueError(f"Hub dataset {source!r}, split {split!r}, cannot be read: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
