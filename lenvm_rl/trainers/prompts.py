"""Rows that would end a run long after it began, found before it begins."""

from typing import Any


def check_prompts(dataset: Any) -> None:
    """Look at every prompt of a dataset; a stream is taken as it comes.

    Raises:
        ValueError: no column `prompt`, or a row without one; names the row, counted from 0.
    """
    if not hasattr(dataset, "__len__"):
        return
    columns = getattr(dataset, "column_names", None)
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"train_dataset has no column 'prompt', only {', '.join(map(repr, columns))}: rename one.")
    prompts = (row.get("prompt") for row in dataset) if columns is None else dataset["prompt"]
    for row, prompt in enumerate(prompts):
        empty = not prompt.strip() if isinstance(prompt, str) else not isinstance(prompt, list) or not prompt
        if empty:
            raise ValueError(
                f"Row {row} of train_dataset has the prompt {prompt!r:.200}, but a prompt is a text or a non-empty "
                "list of messages: fill it in or drop the row."
            )
