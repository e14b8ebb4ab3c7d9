import json

import pytest

from lenvm_rl.tasks import BOX_INSTRUCTION, load_task
from reward_fns import AccuracyReward


@pytest.fixture
def problem_file(tmp_path):
    def write(count, name="train.jsonl", first=0):
        path = tmp_path / name
        rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(first, first + count)]
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return write


def prompts(dataset):
    return list(dataset["prompt"])


def test_arithmetic_is_embedded():
    task = load_task("arithmetic", train_size=50, held_out_size=20)
    assert (task.name, len(task.train), len(task.held_out)) == ("arithmetic", 50, 20)
    assert not set(prompts(task.train)) & set(prompts(task.held_out))
    assert task.train.column_names == task.held_out.column_names == ["prompt", "solution"]
    assert all(prompt.endswith("=") for prompt in prompts(task.train))
    golds = list(task.train["solution"])
    assert task.reward_funcs[0](completions=[f"\\boxed{{{gold}}}" for gold in golds], solution=golds) == [1.0] * 50


def test_arithmetic_has_two_thousand_training_problems_by_default():
    assert len(load_task("arithmetic", held_out_size=0).train) == 2000


@pytest.mark.parametrize("arguments", [{"conversational": True}, {"instruction": "Think."}])
def test_arithmetic_is_plain_text(arguments):
    with pytest.raises(ValueError, match="plain text for a policy with a vocabulary of its own"):
        load_task("arithmetic", **arguments)


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"held_out": "test"}, {"solution_column": "answer"}])
@pytest.mark.parametrize("name", ["arithmetic", "gym:chain_sum"])
def test_generated_tasks_have_no_splits_or_columns(name, arguments):
    with pytest.raises(ValueError, match="generates its problems: leave out split, held_out and solution_column"):
        load_task(name, **arguments)


def test_a_file_is_split_into_training_and_held_out_problems(problem_file):
    task = load_task(problem_file(50), held_out_size=10, instruction="")
    assert (len(task.train), len(task.held_out)) == (40, 10)
    assert sorted(prompts(task.train) + prompts(task.held_out)) == sorted(f"{i} + 1?" for i in range(50))
    assert isinstance(task.reward_funcs[0], AccuracyReward)


def test_the_split_depends_on_the_seed_alone(problem_file):
    path = problem_file(50)
    first, again = load_task(path, held_out_size=10), load_task(path, held_out_size=10)
    fewer, other = load_task(path, held_out_size=10, train_size=5), load_task(path, held_out_size=10, seed=1)
    assert first.train.to_list() == again.train.to_list()
    assert first.held_out.to_list() == again.held_out.to_list() == fewer.held_out.to_list()
    assert len(fewer.train) == 5 and set(prompts(fewer.train)) <= set(prompts(first.train))
    assert first.held_out.to_list() != other.held_out.to_list()


def test_repeated_questions_are_never_on_both_sides(tmp_path):
    path = tmp_path / "train.jsonl"
    # the same ten questions, five times, with different white space
    rows = [{"question": f"{i} +{' ' * (1 + copy)}1?", "answer": i + 1} for copy in range(5) for i in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = load_task(str(path), held_out_size=4, instruction="")
    train, held_out = ([" ".join(prompt.split()) for prompt in prompts(part)] for part in (task.train, task.held_out))
    assert len(set(held_out)) == len(held_out) == 4
    assert len(train) == 30 and not set(train) & set(held_out)


def test_held_out_problems_may_have_a_file_of_their_own(problem_file):
    train, test = problem_file(30), problem_file(20, name="other.jsonl", first=25)
    task = load_task(train, held_out=test, held_out_size=None, instruction="")
    assert prompts(task.held_out) == [f"{i} + 1?" for i in range(25, 45)]
    assert prompts(task.train) == [f"{i} + 1?" for i in range(25)]
    # the five that are in both stay out of training, whichever are chosen for evaluation
    smaller = load_task(train, held_out=test, held_out_size=3, instruction="")
    assert len(smaller.held_out) == 3 and smaller.train.to_list() == task.train.to_list()


def test_held_out_problems_may_be_another_split_of_a_folder(problem_file, tmp_path):
    problem_file(30), problem_file(20, name="test.jsonl", first=100)
    task = load_task(str(tmp_path), held_out="test", instruction="")
    assert (len(task.train), len(task.held_out)) == (30, 20)
    assert prompts(load_task(str(tmp_path), split="test", held_out_size=0, instruction="").train)[0] == "100 + 1?"


def test_questions_get_the_instruction(problem_file):
    path = problem_file(3)
    assert prompts(load_task(path, held_out_size=0).train)[0] == f"0 + 1?\n{BOX_INSTRUCTION}"
    assert prompts(load_task(path, held_out_size=0, instruction="Think.").train)[0] == "0 + 1?\nThink."
    assert prompts(load_task(path, held_out_size=0, instruction="").train)[0] == "0 + 1?"


def test_questions_become_messages_on_request(problem_file):
    task = load_task(problem_file(3), held_out_size=1, conversational=True, instruction="Think.")
    for prompt in prompts(task.train) + prompts(task.held_out):
        assert [message["role"] for message in prompt] == ["user"]
        assert prompt[0]["content"].endswith("?\nThink.")
    assert task.train.column_names == task.held_out.column_names == ["prompt", "solution"]


def test_conversations_get_no_instruction(tmp_path):
    conversation = [{"role": "user", "content": "1 + 1?"}]
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": conversation, "answer": "2"}))
    task = load_task(str(tmp_path / "train.jsonl"), held_out_size=0, conversational=True)
    assert prompts(task.train) == [conversation]


def test_other_columns_stay(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"problem": "1 + 1?", "answer": "2", "level": 3}))
    row = load_task(str(tmp_path / "train.jsonl"), held_out_size=0, instruction="").train[0]
    assert row == {"prompt": "1 + 1?", "solution": "2", "level": 3}


def test_evaluation_alone_needs_no_training_problems(problem_file):
    task = load_task(problem_file(5), held_out_size=5, train_size=0)
    assert (len(task.train), len(task.held_out)) == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held_out_size": 200}, "5 different problems, too few to hold out 200"),
        ({"held_out_size": 5}, "none is left to train on"),
        ({"held_out_size": None}, "no held-out problems of its own"),
        ({"held_out_size": -1}, "held_out_size is -1"),
        ({"train_size": -1}, "train_size is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(problem_file, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(problem_file(5), **arguments)


def test_a_missing_file_of_held_out_problems_is_named(problem_file, tmp_path):
    for missing in ("test", str(tmp_path / "missing.jsonl")):
        with pytest.raises(FileNotFoundError, match=rf"There is no file '?{missing}"):
            load_task(problem_file(5), held_out=missing)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aritmetic", r"no task 'aritmetic' \(did you mean 'arithmetic'\?\)"),
        ("gsm8k", r"no task 'gsm8k': a task is 'arithmetic', 'gym:<dataset>', a file or folder"),
        ("./data/gsm8k", r"no task '\./data/gsm8k'"),
        ("/nowhere/gsm8k", r"no task '/nowhere/gsm8k'"),
        ("", r"no task ''"),
    ],
)
def test_an_unknown_name_is_refused_without_asking_the_hub(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)
