"""What an analysis leaves behind: tables for the terminal and for markdown, figures, and ``summary.json``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lenvm_rl.evaluation.report import console, write_json

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8a8a8a"
"""Okabe and Ito's, told apart by most colour-blind people, and a grey."""

Draw = Callable[[Any], None]
"""Draws on a matplotlib figure."""


@dataclass(frozen=True)
class Sheet:
    """A table, and what its columns mean."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """With the first column to the left and the numbers to the right."""
        # a bar would begin another cell
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.headings, *self.rows)]
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|---" + "|---:" * (len(self.headings) - 1) + "|")
        return "\n".join([f"### {self.title}", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    def rich(self) -> Table:
        table = Table(title=escape(self.title), title_justify="left", caption=escape(self.note), caption_justify="left")
        for number, heading in enumerate(self.headings):
            table.add_column(escape(heading), justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*(escape(cell.replace("**", "").replace("`", "")) for cell in row))
        return table


@dataclass(frozen=True)
class Findings:
    """What one analysis found."""

    name: str
    title: str
    summary: Mapping[str, Any]
    """Numbers only, for JSON."""
    sheets: Sequence[Sheet]
    figures: Mapping[str, tuple[str, Draw]] = field(default_factory=dict)
    """By file name: a caption, and what draws it."""

    def show(self) -> None:
        """Print the tables."""
        out = console()
        for sheet in self.sheets:
            out.print(sheet.rich())

    def write(self, folder: str | Path) -> Path:
        """Leave ``report.md``, the figures and ``summary.json``.

        Args:
            folder: created where it is missing.

        Returns:
            The page.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"## {self.title}", "", *(sheet.markdown() for sheet in self.sheets)]
        for name, (caption, draw) in self.figures.items():
            save_figure(folder / name, draw)
            lines += [f"![{self.title}]({name})", "", caption, ""]
        page = folder / "report.md"
        page.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
        write_json(folder / "summary.json", dict(self.summary))
        return page


def save_figure(path: Path, draw: Draw) -> None:
    """Draw a figure into a file, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(layout="constrained")
    try:
        draw(figure)
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage; a dash where there is none."""
    return "-" if value is None or value != value else f"{100 * value:.{digits}f} %"


def number(value: float | None, digits: int = 1) -> str:
    """A number; a dash where there is none."""
    return "-" if value is None or value != value else f"{value:,.{digits}f}"
