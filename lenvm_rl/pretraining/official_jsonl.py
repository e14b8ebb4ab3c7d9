"""The JSONL of the official LenVM code (ShareGPT style), read and written.

One line holds one completion as text: ``conversations`` (turns of ``human`` and ``gpt``, the last one the completion)
and ``meta_info`` with ``lenvm_idx`` (which prompt), ``answer_token_length`` (end token included), ``model_name``,
``temperature``, ``top_p``, ``top_k``, ``max_tokens``. It cannot hold

1. token ids: text is tokenised again, and may become other ids than those that were sampled;
2. the finish reason: a completion that was cut looks like one that ended. Where the file says its ``max_tokens``, a
   completion of that many tokens is taken as cut (one that ended at exactly the limit, too);
3. the tokenizer, the chat template and the seed.

A folder of `lenvm_rl.pretraining.storage` keeps all of these: use it for anything that is sampled here.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lenvm_rl.atomic_file import atomic_file
from lenvm_rl.pretraining.storage import SCHEMA, write_stream
from lenvm_rl.sampling import Prompt, prompt_token_ids

__all__ = ["read_official_jsonl", "write_official_jsonl"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def read_official_jsonl(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    conversational: bool | None = None,
    arrow_path: str | Path | None = None,
) -> Dataset:
    """Rollouts from an official file.

    Args:
        path: the JSONL.
        tokenizer: the generator's; it must have an end token.
        conversational: apply the chat template to the turns before the completion. By default where the tokenizer has
            one; without it the prompt is the text of the only human turn.
        arrow_path: where to put the rollouts, to be memory-mapped. Without one they stay in memory, four bytes a token.

    Returns:
        Columns of `storage.SCHEMA`; sampling settings are null where the file does not say them. What cannot be known
        is guessed as the module's docstring says, and counted in a warning.

    Raises:
        ValueError: a line that is no such record (names it), an empty file, or a tokenizer without an end token.
        OSError: no such file.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer names no end token, so no completion could ever finish: set its eos_token.")
    if conversational is None:
        conversational = bool(tokenizer.chat_template)
    notes: Counter[str] = Counter()
    batches = _batches(Path(path), tokenizer, conversational, notes)
    if arrow_path is None:
        rollouts = Dataset(pa.Table.from_batches(batches, SCHEMA))
    else:
        with atomic_file(Path(arrow_path)) as file:
            write_stream(file, batches, {})
        rollouts = Dataset.from_file(str(arrow_path))
    if len(rollouts) == 0:
        raise ValueError(f"{path} holds no records.")
    for note, count in notes.items():
        warnings.warn(f"{count:,} of {len(rollouts):,} completions of {path} {note}", stacklevel=2)
    return rollouts


def write_official_jsonl(
    rollouts: Dataset,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt] | None = None,
    meta_info: Mapping[str, Any] | None = None,
    source_fields: Mapping[str, Any] | None = None,
) -> None:
    """Rollouts as an official file. Empty completions are left out.

    Args:
        rollouts: columns of `storage.SCHEMA`.
        path: of the JSONL; appears when it is complete.
        tokenizer: the generator's.
        prompts: what was sampled from, by ``prompt_id``. Needed where the tokenizer has a chat template: the turns
            cannot be told from token ids. Without them the human turn is the prompt's text.
        meta_info: further entries for each line, such as ``model_name``, ``dataset_name`` and ``split``.
        source_fields: the entry of this name.

    Raises:
        ValueError: a chat template but no prompts.
    """
    if prompts is None and tokenizer.chat_template:
        raise ValueError(
            "The tokenizer has a chat template, and the turns of a conversation cannot be told from its token ids: "
            "pass the prompts that were sampled from."
        )
    with atomic_file(Path(path)) as file:
        for row in rollouts:
            if not row["completion_ids"]:
                continue
            turns = _turns(prompts[row["prompt_id"]] if prompts is not None else _text(tokenizer, row["prompt_ids"]))
            ids = row["completion_ids"][:-1] if row["finished"] else row["completion_ids"]
            record = {
                "conversations": [*turns, {"from": "gpt", "value": _text(tokenizer, ids)}],
                "meta_info": {
                    "answer_token_length": len(row["completion_ids"]),
                    "lenvm_idx": row["prompt_id"],
                    "split": "train",
                    "temperature": row.get("temperature"),
                    "top_p": row.get("top_p"),
                    "top_k": -1,
                    "max_tokens": row.get("max_new_tokens"),
                    **(meta_info or {}),
                },
                "source_fields": dict(source_fields or {}),
            }
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    if isinstance(prompt, str):
        return [{"from": "human", "value": prompt}]
    strangers = [turn["role"] for turn in prompt if turn["role"] not in _SPEAKERS]
    if strangers:
        raise ValueError(f"The official format has no turns of {strangers[0]!r}, only of {', '.join(_SPEAKERS)}.")
    return [{"from": _SPEAKERS[turn["role"]], "value": str(turn["content"])} for turn in prompt]


def _batches(
    path: Path, tokenizer: PreTrainedTokenizerBase, conversational: bool, notes: Counter[str]
) -> Iterator[pa.RecordBatch]:
    samples: Counter[int] = Counter()
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                rows.append(_row(json.loads(line), number, tokenizer, conversational, notes))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(f"{path}, line {number}, is no record of the official format: {reason}.") from error
            rows[-1]["sample"] = samples[rows[-1]["prompt_id"]]
            samples[rows[-1]["prompt_id"]] += 1
            if len(rows) == 1000:
                yield pa.RecordBatch.from_pylist(rows, SCHEMA)
                rows = []
    if rows:
        yield pa.RecordBatch.from_pylist(rows, SCHEMA)


def _row(
    record: dict[str, Any],
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    conversational: bool,
    notes: Counter[str],
) -> dict[str, Any]:
    if record.get("images"):
        raise ValueError("it has images, which a text critic cannot read")
    turns = [{"role": _role(turn["from"]), "content": turn["value"]} for turn in record["conversations"]]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError("its conversation does not end with an answer")
    *before, answer = turns
    if not conversational and len(before) > 1:
        raise ValueError("it has several turns before the answer, which need a chat template")
    meta = record.get("meta_info") or {}
    ids = tokenizer(answer["content"], add_special_tokens=False).input_ids
    counted, limit = meta.get("answer_token_length"), meta.get("max_tokens")
    if counted is None or limit is None:
        notes["do not say whether they were cut, and are taken as finished."] += 1
    finished = counted is None or limit is None or counted < limit
    if finished and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if counted is not None and counted != len(ids):
        notes["have another length in tokens than the file says: text was tokenised again."] += 1
    if not ids:
        raise ValueError("its answer is empty")
    prompt_id = meta.get("lenvm_idx", number - 1)
    return {
        "prompt_id": int(prompt_id),
        "prompt_ids": prompt_token_ids(tokenizer, [before if conversational else before[0]["content"]])[0],
        "completion_ids": ids,
        "finish_reason": "stop" if finished else "length",
        "finished": finished,
        "max_new_tokens": limit,
        "temperature": meta.get("temperature"),
        "top_p": meta.get("top_p"),
    }


def _role(speaker: str) -> str:
    if speaker not in _ROLES:
        raise ValueError(f"nobody called {speaker!r} is known, only {', '.join(_ROLES)}")
    return _ROLES[speaker]
