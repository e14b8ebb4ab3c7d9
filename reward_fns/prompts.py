"""Which completions answer the same prompt.

A prompt is known by the column `prompt_id` where the dataset has one, else by its text. Position tells nothing: groups
are spread over processes, shuffled, and met again an epoch later. Texts stand as digests, since a history of prompts
goes into checkpoints.
"""

import hashlib
import json
from collections.abc import Sequence


def prompt_keys(prompts: Sequence[object] | None, prompt_ids: Sequence[object] | None, count: int) -> list[str]:
    """One key per completion; equal keys are equal prompts, in any process and any session.

    Args:
        prompts: strings, or lists of messages.
        prompt_ids: strings or integers; a row with None falls back on its prompt.
        count: number of completions.

    Raises:
        ValueError: neither is there, one has another number of rows, or a row cannot be told from others.
    """
    for name, rows in (("prompts", prompts), ("prompt_id", prompt_ids)):
        if rows is not None and (isinstance(rows, str) or len(rows) != count):
            seen = "one string" if isinstance(rows, str) else f"{len(rows)} rows"
            raise ValueError(f"{name} has {seen} for {count} completions: pass a list with one row for each.")
    if prompts is None and prompt_ids is None:
        if count == 0:
            return []
        raise ValueError(
            "there are neither prompts nor a column prompt_id, so completions of the same prompt cannot be found: pass "
            "prompts=[...], one per completion, as TRL's trainers do."
        )
    keys = []
    for row in range(count):
        prompt_id = prompt_ids[row] if prompt_ids is not None else None
        if prompt_id is None and prompts is None:
            raise ValueError(f"row {row} of column 'prompt_id' is None and there are no prompts: fill it in.")
        keys.append(_id_key(prompt_id, row) if prompt_id is not None else _text_key(prompts[row], row))  # type: ignore[index]
    return keys


def _id_key(prompt_id: object, row: int) -> str:
    if isinstance(prompt_id, bool) or not isinstance(prompt_id, int | str):
        raise ValueError(
            f"row {row} of column 'prompt_id' holds {prompt_id!r:.200} ({type(prompt_id).__name__}), but an id must be "
            "a string or an integer."
        )
    return f"id:{json.dumps(prompt_id)}"


def _text_key(prompt: object, row: int) -> str:
    try:
        text = json.dumps(prompt, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the prompt of row {row} holds more than text ({error}), so its text does not tell it from others: add a "
            "column 'prompt_id' to the dataset, e.g. dataset.add_column('prompt_id', list(range(len(dataset))))."
        ) from error
    return f"text:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
