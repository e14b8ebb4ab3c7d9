"""From rollouts to batches: one row per completion, labelled with the tokens that remained after each state.

A label is the remaining length of a state: the last prompt token, or any completion token, the end token included.
States without a known target carry -100: the prompt before its last token, padding, and the last state of a completion
that was cut, whose own value stands in for the tail. So a row has a label 0 if and only if its completion finished.
A row without a completion has no label at all.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

NO_TARGET = -100
COLUMNS = ("prompt_ids", "completion_ids", "finished")
SETTINGS = ("max_new_tokens", "temperature", "top_p")
"""Columns that rollouts may have, of one value in all rows."""


class LengthValueCollator:
    """Pads rollouts on the right, to ``input_ids`` and ``labels``, both (B, S).

    A causal model never sees what is to its right, so the rows need no attention mask.

    Args:
        pad_token_id: fills the rows.
        official: label cut completions as if they had ended.
    """

    def __init__(self, pad_token_id: int, *, official: bool = False) -> None:
        self.pad_token_id, self.official = pad_token_id, official

    def __call__(self, rollouts: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rollouts)
        input_ids = np.full((len(rollouts), width), self.pad_token_id, dtype=np.int64)
        labels = np.full((len(rollouts), width), NO_TARGET, dtype=np.int64)
        for i, row in enumerate(rollouts):
            own = state_labels(row, official=self.official)
            input_ids[i, : len(own)] = np.concatenate([row["prompt_ids"], row["completion_ids"]])
            labels[i, : len(own)] = own
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


def state_labels(rollout: dict[str, Any], *, official: bool = False) -> np.ndarray:
    """(P + T,) labels of one rollout; ``official`` labels a cut one as if it had ended."""
    prompt, completion = len(rollout["prompt_ids"]), len(rollout["completion_ids"])
    labels = np.full(prompt + completion, NO_TARGET, dtype=np.int64)
    if completion:
        labels[prompt - 1 :] = np.arange(completion, -1, -1)
        if not (rollout["finished"] or official):
            labels[-1] = NO_TARGET
    return labels


def check_rollouts(rollouts: Dataset, vocab_size: int) -> Dataset:
    """The rollouts that a critic of this vocabulary can learn from; empty completions are left out, with a warning.

    Reads a thousand rows at a time.

    Raises:
        ValueError: a missing column, no rows, an empty prompt, an id outside the vocabulary (names the row), or rows
            that were sampled with different settings.
    """
    missing = [name for name in COLUMNS if name not in rollouts.column_names]
    if missing:
        raise ValueError(f"Rollouts need the columns {', '.join(COLUMNS)}, but have no {' and no '.join(missing)}.")
    if len(rollouts) == 0:
        raise ValueError("There are no rollouts to train on.")
    settings = [name for name in SETTINGS if name in rollouts.column_names]
    seen: dict[str, set[float]] = {name: set() for name in settings}
    kept: list[np.ndarray] = []
    for start, table in _tables(rollouts, ["prompt_ids", "completion_ids", *settings]):
        lengths = {name: _lengths(table[name]) for name in ("prompt_ids", "completion_ids")}
        if not lengths["prompt_ids"].all():
            raise ValueError(f"Rollout {start + int(lengths['prompt_ids'].argmin())} has an empty prompt: drop it.")
        for name in ("prompt_ids", "completion_ids"):
            ids = _flat(table[name])
            outside = (ids < 0) | (ids >= vocab_size)
            if outside.any():
                row = np.repeat(np.arange(len(table)), lengths[name])[outside.argmax()]
                raise ValueError(
                    f"Rollout {start + row} holds a token id outside the critic's vocabulary of {vocab_size}: critic "
                    "and policy must share a tokenizer."
                )
        for name in settings:
            seen[name].update(value for value in pc.unique(table[name]).to_pylist() if value is not None)
        kept.append(start + np.flatnonzero(lengths["completion_ids"]))
    mixed = [f"{name} {' and '.join(map(str, sorted(values)))}" for name, values in seen.items() if len(values) > 1]
    if mixed:
        raise ValueError(
            f"These rollouts were sampled with different settings ({'; '.join(mixed)}). A length value is that of one "
            "way to sample: train on rollouts of one."
        )
    rows = np.concatenate(kept)
    if len(rows) == 0:
        raise ValueError("All completions are empty: there is nothing to train on.")
    if len(rows) == len(rollouts):
        return rollouts
    warnings.warn(
        f"{len(rollouts) - len(rows):,} of {len(rollouts):,} rollouts have an empty completion and are left out.",
        stacklevel=2,
    )
    return rollouts.select(rows)


def check_backbone_tokenizer(generator: PreTrainedTokenizerBase, backbone: PreTrainedTokenizerBase) -> None:
    """Refuse a backbone that reads other tokens than the generator writes.

    A few tokens that the backbone lacks, such as those of a chat template, are let pass with a warning.

    Raises:
        ValueError: more than 1 % of the generator's tokens have other ids in the backbone's tokenizer.
    """
    written, read = generator.get_vocab(), backbone.get_vocab()
    differ = [token for token, number in written.items() if read.get(token) != number]
    if len(differ) > 0.01 * len(written):
        raise ValueError(
            f"{len(differ):,} of the {len(written):,} tokens of {generator.name_or_path!r} have other ids in the "
            f"tokenizer of {backbone.name_or_path!r}, for example {differ[0]!r}. A length critic reads the generator's "
            "token ids: start it from a model of the generator's family."
        )
    if differ:
        warnings.warn(
            f"{len(differ):,} tokens of {generator.name_or_path!r} have other ids, or none, in the tokenizer of "
            f"{backbone.name_or_path!r}, such as {differ[0]!r}: the critic has to learn them anew.",
            stacklevel=2,
        )


def completion_lengths(rollouts: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each completion, the end token included, and whether it finished: two arrays of (rollouts,)."""
    columns = ["completion_ids", "finished"]
    parts = [(_lengths(t["completion_ids"]), t["finished"].to_numpy()) for _, t in _tables(rollouts, columns)]
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    lengths, finished = zip(*parts, strict=True)
    return np.concatenate(lengths), np.concatenate(finished).astype(bool)


def rollout_lengths(rollouts: Dataset) -> np.ndarray:
    """Tokens of each rollout, prompt and completion together: (rollouts,)."""
    columns = ["prompt_ids", "completion_ids"]
    parts = [_lengths(t["prompt_ids"]) + _lengths(t["completion_ids"]) for _, t in _tables(rollouts, columns)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def prompt_groups(rollouts: Dataset) -> np.ndarray:
    """Which prompt each rollout has, numbered by first appearance: (rollouts,). Equal token ids are one prompt."""
    numbers: dict[bytes, int] = {}
    groups = [
        numbers.setdefault(hashlib.sha256(ids.tobytes()).digest(), len(numbers))
        for _, table in _tables(rollouts, ["prompt_ids"])
        for ids in np.split(_flat(table["prompt_ids"]), np.cumsum(_lengths(table["prompt_ids"]))[:-1])
    ]
    return np.array(groups, dtype=np.int64)


def _tables(rollouts: Dataset, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """A thousand rows at a time, with the position of the first one."""
    start = 0
    for table in rollouts.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        yield start, table
        start += len(table)


def _lengths(lists: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy()


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    flat = pc.list_flatten(lists)
    # an empty Python list leaves no type behind
    return flat.to_numpy() if pa.types.is_integer(flat.type) else np.zeros(0, dtype=np.int64)
