import json

import datasets
import pytest
from datasets import Dataset

from lenvm_rl.tasks.files import read_problems
from reward_fns import accuracy_reward


@pytest.fixture
def write(tmp_path):
    def write_lines(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return str(path)

    return write_lines


@pytest.mark.parametrize("prompt_column", ["prompt", "question", "problem"])
@pytest.mark.parametrize("gold_column", ["solution", "answer"])
def test_columns_go_by_their_usual_names(write, prompt_column, gold_column):
    problems = read_problems(write([{prompt_column: "1 + 1?", gold_column: "2", "level": 3}]))
    assert problems.to_list() == [{"prompt": "1 + 1?", "solution": "2", "level": 3}]


def test_solution_wins_over_answer_unless_told_otherwise(write):
    path = write([{"problem": "1 + 1?", "answer": "2", "solution": "Two, \\boxed{2}."}])
    assert read_problems(path).to_list() == [{"prompt": "1 + 1?", "solution": "Two, \\boxed{2}.", "answer": "2"}]
    assert read_problems(path, solution_column="answer").to_list() == [{"prompt": "1 + 1?", "solution": "2"}]


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("Half of 1448 is 724.\n#### 724", "724", "1448"),
        ("#### 1,448", "1448", "1"),
        (r"Since $x^2 = \frac{9}{16}$, $x = \boxed{\frac{3}{4}}$.", r"\frac{3}{4}", r"\frac{9}{16}"),
        (4, "4", "5"),
        (-2.5, "-2.5", "2.5"),
        (0.00000012, "0.00000012", "0.12"),
        (10**20, "1" + 20 * "0", "1"),
    ],
)
def test_golds_of_gsm8k_and_math_and_numbers_are_what_the_reward_compares_with(write, gold, right, wrong):
    solution = read_problems(write([{"question": "?", "answer": gold}]))["solution"][:]
    rewards = accuracy_reward(completions=[f"\\boxed{{{right}}}", f"\\boxed{{{wrong}}}"], solution=solution * 2)
    assert rewards == [1.0, 0.0]


def test_numbers_and_texts_may_be_mixed_in_a_column_of_golds(write):
    path = write([{"question": "a", "answer": 4}, {"question": "b", "answer": "x"}, {"question": "c", "answer": 0.5}])
    assert read_problems(path)["solution"][:] == ["4", "x", "0.5"]


def test_conversations_stay_as_they_are(write):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    assert read_problems(write([{"prompt": conversation, "answer": "2"}]))["prompt"][0] == conversation


def test_json_and_parquet_give_what_jsonl_gives(write, tmp_path):
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(5)]
    expected = read_problems(write(rows)).to_list()
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2))
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    assert read_problems(str(tmp_path / "list.json")).to_list() == expected
    assert read_problems(write(rows, name="lines.json")).to_list() == expected
    assert read_problems(str(tmp_path / "table.parquet")).to_list() == expected


def test_parquet_keeps_its_other_columns(tmp_path):
    rows = [{"question": "1 + 1?", "answer": "2", "level": 3, "tags": ["sum"]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "table.parquet")
    expected = [{"prompt": "1 + 1?", "solution": "2", "level": 3, "tags": ["sum"]}]
    assert read_problems(str(tmp_path / "table.parquet")).to_list() == expected


def test_a_folder_holds_a_file_for_each_split(write, tmp_path):
    write([{"question": "1 + 1?", "answer": "2"}], name="train.jsonl")
    write([{"question": "2 + 2?", "answer": "4"}], name="test.jsonl")
    assert read_problems(str(tmp_path), "test")["prompt"][:] == ["2 + 2?"]
    with pytest.raises(FileNotFoundError, match=r"no validation\.jsonl or .* only test\.jsonl, train\.jsonl"):
        read_problems(str(tmp_path), "validation")


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('\ufeff{"question": "1 + 1?", "answer": "2"}\n\n  \n{"question": "a\u2028b", "answer": "3"}')
    assert read_problems(str(path))["prompt"][:] == ["1 + 1?", "a\u2028b"]


GOOD = {"question": "1 + 1?", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"train\.jsonl is empty"),
        ([GOOD, '{"question": "2 + 2?"'], r"train\.jsonl, line 2: invalid JSON \(Expecting ',' delimiter, column 22\)"),
        ([GOOD, "", "[1, 2]"], r"train\.jsonl, line 3: expected one JSON object per problem, got 1\."),
        ([GOOD, '{"answer": ' + "1" * 5000 + "}"], r"train\.jsonl, line 2: unreadable JSON"),
        (['{"a":' * 100_000], r"train\.jsonl, line 1: unreadable JSON"),
        (
            [{"query": "?", "answer": "2"}],
            r"no column 'prompt' or 'question' or 'problem' for the question, only 'query'",
        ),
        (
            [{"question": "?", "target": "2"}],
            r"no column 'solution' or 'answer' for the gold, only 'question', 'target'",
        ),
        ([GOOD, {"question": "  ", "answer": "2"}], r"row 1 of column 'question' is an empty prompt"),
        ([GOOD, {"answer": "2"}], r"row 1 of column 'question' holds None, but a prompt is a text"),
        ([GOOD, {"question": 5, "answer": "2"}], r"row 1 of column 'question' holds 5, but a prompt is a text"),
        ([{"prompt": [], "answer": "2"}], r"row 0 of column 'prompt' holds \[\], but a prompt is a text"),
        (
            [{"prompt": [{"role": "user"}], "answer": "2"}],
            r"row 0 of column 'prompt' holds the message {'role': 'user'}",
        ),
        ([GOOD, {"question": "?", "answer": None}], r"row 1 of column 'answer' holds None \(NoneType\)"),
        ([GOOD, {"question": "?", "answer": True}], r"row 1 of column 'answer' holds True \(bool\)"),
        ([GOOD, {"question": "?", "answer": ["2"]}], r"row 1 of column 'answer' holds \['2'\] \(list\)"),
        ([GOOD, '{"question": "?", "answer": NaN}'], r"row 1 of column 'answer' holds nan \(float\)"),
        ([GOOD, {"question": "?", "answer": " "}], r"row 1 of column 'answer' holds ' ', a gold without an answer"),
        (
            [GOOD, {"question": "?", "answer": "so " * 300}],
            r"row 1 of column 'answer' holds a gold of 8\d\d characters",
        ),
        ([GOOD, {"question": [{"role": "user", "content": "?"}], "answer": "2"}], "must have one type"),
        ([GOOD | {"level": 3}, GOOD | {"level": "three"}], "must have one type"),
        ([GOOD, '{"question": "\\ud800", "answer": "2"}'], "its rows fit no table"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_place(write, rows, message):
    with pytest.raises(ValueError, match=message):
        read_problems(write(rows))


def test_invalid_json_in_a_list_is_named_with_its_line(tmp_path):
    (tmp_path / "list.json").write_text('[\n  {"question": "?", "answer": "2"},\n  {"question": "?" "answer": "2"}\n]')
    with pytest.raises(ValueError, match=r"list\.json, line 3: invalid JSON"):
        read_problems(str(tmp_path / "list.json"))


def test_files_that_are_missing_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing\.jsonl"):
        read_problems(str(tmp_path / "missing.jsonl"))
    (tmp_path / "table.csv").write_text("question,answer\n?,2\n")
    with pytest.raises(ValueError, match=r"table\.csv is not one of \.jsonl, \.json, \.parquet"):
        read_problems(str(tmp_path / "table.csv"))
    (tmp_path / "table.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"table\.parquet is no readable parquet file"):
        read_problems(str(tmp_path / "table.parquet"))
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": "2"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl is not UTF-8 text"):
        read_problems(str(tmp_path / "latin.jsonl"))


def test_a_hub_dataset_is_asked_for_by_name_configuration_and_split(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_problems("openai/gsm8k:main", "test").to_list() == [{"prompt": "1 + 1?", "solution": "#### 2"}]
    read_problems("owner/name")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"}), (("owner/name", None), {"split": "train"})]


def test_a_hub_out_of_reach_is_one_clear_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = (
        r"^'owner/name' is no local file or folder .*, and the hub gave: Couldn't reach .* \(LocalEntryNotFoundError\)$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_problems("owner/name")


def test_an_unknown_split_of_a_hub_dataset_is_named(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError("Unknown split \"dev\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'owner/name', split 'dev', cannot be read: Unknown split"):
        read_problems("owner/name", "dev")
