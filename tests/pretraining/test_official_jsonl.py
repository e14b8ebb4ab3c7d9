import json
import warnings

import pytest
from datasets import Dataset

from lenvm_rl.pretraining.generators import Skipped
from lenvm_rl.pretraining.official_jsonl import read_official_jsonl, write_official_jsonl
from lenvm_rl.pretraining.storage import SCHEMA, rollout_table
from lenvm_rl.sampling import Completion, SamplingSettings
from lenvm_rl.tasks.arithmetic import build_tokenizer

EOS = 1
SAMPLING = SamplingSettings(4, temperature=0.7, top_p=0.9)


def record(answer="3", length=2, **meta):
    return {
        "conversations": [{"from": "human", "value": "1 + 2 ="}, {"from": "gpt", "value": answer}],
        "meta_info": {"answer_token_length": length, "lenvm_idx": 7, "max_tokens": 4, **meta},
    }


@pytest.fixture
def file(tmp_path):
    def written(*records):
        path = tmp_path / "official.jsonl"
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records))
        return path

    return written


@pytest.fixture
def rollouts(tokenizer):
    ids = tokenizer("3 + 4 =").input_ids
    completions = [Completion([*ids[:2], EOS], True), Completion(ids, False), Skipped("x"), Completion([EOS], True)]
    table, _ = rollout_table(0, [tokenizer("1 + 2 =").input_ids, tokenizer("8 + 9 =").input_ids], completions, SAMPLING)
    return Dataset(table)


@pytest.fixture
def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} . {% endfor %}"
        "{% if add_generation_prompt %}99 ={% endif %}"
    )
    return tokenizer


def test_what_is_written_is_read_back(rollouts, tokenizer, tmp_path):
    write_official_jsonl(rollouts, tmp_path / "official.jsonl", tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = read_official_jsonl(tmp_path / "official.jsonl", tokenizer)
    assert again.features == rollouts.features
    # numbering starts anew: the format does not hold the sample
    assert again.remove_columns("sample").to_list() == rollouts.remove_columns("sample").to_list()
    assert again["sample"][:] == [0, 1, 0]


def test_a_written_line_has_the_official_fields(rollouts, tokenizer, tmp_path):
    path = tmp_path / "official.jsonl"
    write_official_jsonl(
        rollouts, path, tokenizer, meta_info={"model_name": "m", "split": "test"}, source_fields={"answer": "3"}
    )
    first, second, third = map(json.loads, path.read_text().splitlines())
    assert first == {
        "conversations": [{"from": "human", "value": "1 + 2 ="}, {"from": "gpt", "value": "3 +"}],
        "meta_info": {
            "answer_token_length": 3,
            "lenvm_idx": 0,
            "split": "test",
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "max_tokens": 4,
            "model_name": "m",
        },
        "source_fields": {"answer": "3"},
    }
    assert second["meta_info"]["answer_token_length"] == 4 and second["conversations"][1]["value"] == "3 + 4 ="
    assert third["conversations"] == [{"from": "human", "value": "8 + 9 ="}, {"from": "gpt", "value": ""}]


def test_an_official_line_becomes_a_rollout(file, tokenizer):
    path = file(record(temperature=1.0, top_p=1.0, model_name="m", top_k=None), record("4 5 6 7", 4), record("5"))
    rollouts = read_official_jsonl(path, tokenizer)
    assert rollouts.column_names == SCHEMA.names
    three, *cut = tokenizer("3 4 5 6 7").input_ids
    assert rollouts[0] == {
        "prompt_id": 7,
        "sample": 0,
        "prompt_ids": tokenizer("1 + 2 =").input_ids,
        "completion_ids": [three, EOS],
        "finish_reason": "stop",
        "finished": True,
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    # four tokens of at most four: cut, and no end token is added
    assert rollouts[1]["completion_ids"] == cut and not rollouts[1]["finished"]
    assert rollouts[1]["sample"] == 1 and rollouts[1]["temperature"] is None
    assert rollouts["sample"][:] == [0, 1, 2]


def test_text_that_becomes_another_number_of_tokens_is_counted(file, tokenizer):
    with pytest.warns(UserWarning, match=r"1 of 2 completions of .* have another length in tokens than the file says"):
        read_official_jsonl(file(record(), record("3 4", 2)), tokenizer)


def test_a_file_that_does_not_say_its_limit_gives_finished_completions_and_a_warning(file, tokenizer):
    with pytest.warns(UserWarning, match=r"2 of 2 .* do not say whether they were cut, and are taken as finished"):
        rollouts = read_official_jsonl(file(record(max_tokens=None), record(length=None)), tokenizer)
    assert rollouts["finished"][:] == [True, True]


def test_the_turns_before_the_answer_go_through_the_chat_template(file, chat_tokenizer):
    turns = [("system", "77"), ("human", "1 + 1 ="), ("gpt", "2"), ("human", "2 + 2 ="), ("gpt", "4")]
    long = {**record(), "conversations": [{"from": who, "value": said} for who, said in turns]}
    rollouts = read_official_jsonl(file(long), chat_tokenizer)
    assert chat_tokenizer.decode(rollouts[0]["prompt_ids"]) == "77 . 1 + 1 = . 2 . 2 + 2 = . 99 ="
    plain = read_official_jsonl(file(record()), chat_tokenizer, conversational=False)
    assert chat_tokenizer.decode(plain[0]["prompt_ids"]) == "1 + 2 ="
    with pytest.raises(ValueError, match=r"line 1, .* several turns before the answer, which need a chat template"):
        read_official_jsonl(file(long), chat_tokenizer, conversational=False)


def test_conversations_are_written_from_the_prompts_and_not_guessed_from_ids(chat_tokenizer, tmp_path):
    prompts = [[{"role": "system", "content": "77"}, {"role": "user", "content": "1 + 2 ="}]]
    ids = chat_tokenizer.apply_chat_template(prompts[0], add_generation_prompt=True, return_dict=True)["input_ids"]
    table, _ = rollout_table(0, [ids], [Completion([*chat_tokenizer("3").input_ids, EOS], True)], SAMPLING)
    path = tmp_path / "official.jsonl"
    with pytest.raises(ValueError, match="cannot be told from its token ids: pass the prompts"):
        write_official_jsonl(Dataset(table), path, chat_tokenizer)
    write_official_jsonl(Dataset(table), path, chat_tokenizer, prompts=prompts)
    assert json.loads(path.read_text())["conversations"] == [
        {"from": "system", "value": "77"},
        {"from": "human", "value": "1 + 2 ="},
        {"from": "gpt", "value": "3"},
    ]
    assert read_official_jsonl(path, chat_tokenizer).to_list() == table.to_pylist()
    with pytest.raises(ValueError, match="has no turns of 'tool', only of user, assistant, system"):
        tool = [[{"role": "tool", "content": "1"}]]
        write_official_jsonl(Dataset(table), path, chat_tokenizer, prompts=tool)


def test_rollouts_can_be_mapped_from_a_file(file, tokenizer, tmp_path):
    path = file(*[record(lenvm_idx=row) for row in range(2500)])  # more than one batch
    mapped = read_official_jsonl(path, tokenizer, arrow_path=tmp_path / "official.arrow")
    assert mapped.cache_files[0]["filename"] == str(tmp_path / "official.arrow")
    assert mapped["prompt_id"][:] == list(range(2500))
    assert mapped.to_list() == read_official_jsonl(path, tokenizer).to_list()


@pytest.mark.parametrize(
    "line, reason",
    [
        ("{", "Expecting property name"),
        ("[1]", "'list' object has no attribute"),
        ({"meta_info": {}}, "no 'conversations'"),
        ({"conversations": []}, "does not end with an answer"),
        ({"conversations": [{"from": "human", "value": "1"}] * 2}, "does not end with an answer"),
        ({"conversations": [{"from": "alien", "value": "1"}] * 2}, "nobody called 'alien' is known"),
        ({**record(), "images": ["a.png"]}, "it has images"),
        (record("", 4), "its answer is empty"),
    ],
)
def test_a_line_that_is_no_record_is_named(file, tokenizer, line, reason):
    message = rf"official.jsonl, line 3, is no record of the official format: .*{reason}"
    with pytest.raises(ValueError, match=message):
        read_official_jsonl(file(record(), "", line), tokenizer)


def test_an_empty_file_holds_no_records(file, tokenizer):
    with pytest.raises(ValueError, match="holds no records"):
        read_official_jsonl(file(""), tokenizer)
