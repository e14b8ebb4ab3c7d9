import json

import pytest

from lenvm_rl.evaluation.lifebench import LifeTask, length_requests, read_lifebench, subset

ENGLISH = {
    "id": 1,
    "category": "qa",
    "type": "Knowledge",
    "lang": "en",
    "task": "[Instruction] Why {and how}?\n\n[Requirement] It must be {word_count_type} {word_count} words long.",
    "raw_data": "Why {and how}?",
}
CHINESE = {
    "id": 2,
    "category": "create",
    "type": "News",
    "lang": "cn",
    "task": "写一篇新闻。字数必须{word_count_type} {word_count}字。",
}


def written(tmp_path, *rows):
    path = tmp_path / "lite.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) + "\n", encoding="utf-8")
    return path


def test_requests_ask_for_tokens_in_both_languages(tmp_path):
    tasks = read_lifebench(written(tmp_path, ENGLISH, CHINESE))
    requests = length_requests(tasks, [32, 64], ["equal", "at_most"])
    assert len(requests) == 8 and len(length_requests(tasks)) == 2 * 3 * 3
    texts = {(r.task.id, r.target, r.constraint): r.prompt[0]["content"] for r in requests}
    assert texts[1, 64, "at_most"] == (
        "Please follow the instructions below.\n"
        "[Instruction] Why {and how}?\n\n[Requirement] It must be at most 64 tokens long."
    )
    assert texts[2, 32, "equal"] == "Please follow the instructions below.\n写一篇新闻。token数必须等于 32。"


def test_requests_in_words_are_the_tasks_as_they_are(tmp_path):
    tasks = read_lifebench(written(tmp_path, ENGLISH, CHINESE))
    english, chinese = length_requests(tasks, [150], ["at_least"], unit="words")
    assert english.prompt[0]["content"].endswith("It must be at least 150 words long.")
    assert chinese.prompt[0]["content"].endswith("字数必须至少 150字。")


def test_a_subset_is_fixed_and_even_over_languages_and_categories():
    tasks = [LifeTask(i, "qa" if i % 3 else "create", "", "en" if i % 2 else "cn", "") for i in range(40)]
    chosen = subset(tasks, 8)
    assert chosen == subset(tasks, 8) and chosen != subset(tasks, 8, seed=1)
    cells = [(task.category, task.lang) for task in chosen]
    assert sorted({cell: cells.count(cell) for cell in cells}.values()) == [2, 2, 2, 2]
    assert [task.id for task in chosen] == sorted(task.id for task in chosen)
    assert {task.lang for task in subset(tasks, 5, languages=["cn"])} == {"cn"}
    assert subset(tasks, None) == tasks
    with pytest.raises(ValueError, match="20 tasks in cn are there, so 21"):
        subset(tasks, 21, languages=["cn"])


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*lite\.jsonl.* not part of this package"):
        read_lifebench(tmp_path / "lite.jsonl")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1}, "line 2: no task of LIFEBench .KeyError: 'category'"),
        ({**ENGLISH, "lang": "fr"}, "line 2: the language 'fr' is none of en, cn"),
        ({**ENGLISH, "task": "Write {word_count} words."}, "line 2: the task has no place {word_count_type}"),
        ([1], "line 2: no task of LIFEBench .TypeError"),
    ],
)
def test_a_line_that_is_no_task_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_lifebench(written(tmp_path, ENGLISH, row))


def test_impossible_requests_are_refused(tmp_path):
    tasks = read_lifebench(written(tmp_path, ENGLISH))
    for options, message in [
        ({"targets": [0]}, "at least 1"),
        ({"constraints": ["exactly"]}, "got 'exactly'"),
        ({"unit": "pages"}, "tokens or words, got 'pages'"),
    ]:
        with pytest.raises(ValueError, match=message):
            length_requests(tasks, **options)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ValueError, match="holds no tasks"):
        read_lifebench(empty)
