"""Parts of documents that a benchmark writes."""

from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between two markers of a document."""
    document = path.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    head, _, rest = document.partition(begin)
    _, _, tail = rest.partition(end)
    path.write_text(f"{head}{begin}{text}\n{end}{tail}")
