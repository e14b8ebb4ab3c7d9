import json
import math

from lenvm_rl.evaluation.analyses.findings import Findings, Sheet, number, percent


def test_a_sheet_is_markdown_with_its_bars_escaped():
    sheet = Sheet("Lengths", ("token", "|count|"), [["`a|b`", "3"], ["**c**", "1,000"]], "What it means.")
    assert sheet.markdown() == (
        "### Lengths\n\n| token | \\|count\\| |\n|---|---:|\n| `a\\|b` | 3 |\n| **c** | 1,000 |\n\nWhat it means.\n"
    )
    assert [str(cell) for cell in sheet.rich().columns[0].cells] == ["a|b", "c"]


def test_findings_leave_a_page_with_figures_and_numbers(tmp_path):
    drawn = []

    def draw(figure):
        figure.subplots().plot([0, 1])
        drawn.append(figure)

    findings = Findings(
        "x", "An analysis", {"n": math.nan}, [Sheet("T", ("a",), [["1"]])], {"x.png": ("A line.", draw)}
    )
    page = findings.write(tmp_path / "new" / "x")
    assert page.read_text() == "## An analysis\n\n### T\n\n| a |\n|---|\n| 1 |\n\n![An analysis](x.png)\n\nA line.\n"
    assert (page.parent / "x.png").read_bytes().startswith(b"\x89PNG") and len(drawn) == 1
    assert json.loads((page.parent / "summary.json").read_text()) == {"n": None}


def test_what_is_not_there_is_a_dash():
    assert (percent(None), percent(math.nan), percent(0.1234)) == ("-", "-", "12.3 %")
    assert (number(None), number(math.nan), number(1234.56)) == ("-", "-", "1,234.6")
