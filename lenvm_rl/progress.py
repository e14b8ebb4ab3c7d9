"""One progress bar for everything that samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress_bar(name: str, total: int, *, done: int = 0, visible: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar over completions, with tokens per second and time left, on stderr.

    Args:
        name: what is being made.
        total: completions in all.
        done: completions that an earlier run made; they count neither for the rate nor for the time left.
        visible: False on all processes but one.

    Yields:
        A function to call with the completions and the tokens that were made since its last call.
    """
    columns = (
        TextColumn(f"{name:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as progress:
        task = progress.add_task(name, total=total, completed=done, rate="")
        made = 0

        def advance(completions: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            elapsed = progress.tasks[task].elapsed or 0.0
            progress.update(task, advance=completions, rate=f"{made / max(elapsed, 1e-9):,.0f} tokens/s")

        yield advance
