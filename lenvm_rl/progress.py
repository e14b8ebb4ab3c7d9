"""One progress bar for everything that samples; where stderr is a file, a line now and then instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0
"""Where there is no terminal to draw a bar on."""


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
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not visible) as progress:
        task = progress.add_task(name, total=total, completed=done, rate="")
        made, said = 0, 0.0
        in_lines = visible and not console.is_terminal

        def advance(completions: int, tokens: int) -> None:
            nonlocal made, said
            made += tokens
            elapsed = max(progress.tasks[task].elapsed or 0.0, 1e-9)
            rate = f"{made / elapsed:,.0f} tokens/s"
            progress.update(task, advance=completions, rate=rate)
            so_far = int(progress.tasks[task].completed)
            if in_lines and elapsed - said >= SECONDS_BETWEEN_LINES and so_far > done:
                said = elapsed
                left = timedelta(seconds=round(elapsed * (total - so_far) / (so_far - done)))
                console.print(f"{name}: {so_far:,} of {total:,}, {rate}, {left} left", highlight=False)

        yield advance
