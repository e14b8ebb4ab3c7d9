import builtins
import inspect
import os
import pickle
import re
import subprocess
import sys

import pytest

from lenvm_rl.tasks import BOX_INSTRUCTION, GymReward, load_task
from lenvm_rl.tasks.gym import _ADMISSIBLE, _HASH_DEPENDENT, _REFUSED, gym_problems, parse_settings

factory = pytest.importorskip("reasoning_gym.factory")


def prompts(dataset):
    return list(dataset["prompt"])


def rewards_of(reward, dataset, completions):
    columns = {name: list(dataset[name]) for name in dataset.column_names if name != "prompt"}
    return reward(prompts=prompts(dataset), completions=completions, **columns)


def test_a_dataset_is_loaded_by_name():
    task = load_task("gym:gcd", train_size=30, held_out_size=10)
    assert task.name == "gym:gcd"
    assert (len(task.train), len(task.held_out)) == (30, 10)
    assert task.train.column_names == task.held_out.column_names == ["prompt", "solution", "gym_index"]
    assert all(prompt.endswith(f"\n{BOX_INSTRUCTION}") for prompt in prompts(task.train))
    right = [f"so \\boxed{{{gold}}}" for gold in task.held_out["solution"]]
    assert rewards_of(task.reward_funcs[0], task.held_out, right) == [1.0] * 10
    assert rewards_of(task.reward_funcs[0], task.held_out, ["\\boxed{100003}"] * 10) == [0.0] * 10


def test_partial_credit_is_for_the_asking():
    # reasoning-gym's own measure of containment: one digit of six
    strict, lenient = (GymReward("gcd", seed=0, size=10, partial_credit=partial) for partial in (False, True))
    for reward in (strict, lenient):
        reward._entries[0] = reward.entry(0) | {"answer": "1"}
        assert reward.score("\\boxed{1}", 0) == 1.0
    assert strict.score("\\boxed{100003}", 0) == 0.0
    assert lenient.score("\\boxed{100003}", 0) == pytest.approx(1 / 6)


def test_settings_follow_the_name():
    task = load_task("gym:chain_sum:min_terms=2,max_terms=2,max_digits=1", train_size=30, held_out_size=10)
    assert all(re.search(r": \d [+-] \d =\n", prompt) for prompt in prompts(task.train))
    assert parse_settings("max_terms=3,operators=('+', '-'),allow_negation=True") == {
        "max_terms": 3,
        "operators": ("+", "-"),
        "allow_negation": True,
    }


def test_conversational_completions_are_scored_too():
    task = load_task("gym:gcd", train_size=2, held_out_size=2, conversational=True, instruction="")
    assert [message["role"] for message in prompts(task.train)[0]] == ["user"]
    right = [[{"role": "assistant", "content": f"\\boxed{{{gold}}}"}] for gold in task.train["solution"]]
    assert rewards_of(task.reward_funcs[0], task.train, right) == [1.0, 1.0]


def test_problems_depend_on_the_seed_alone():
    arguments = {"train_size": 30, "held_out_size": 10}
    first, again = load_task("gym:gcd", **arguments), load_task("gym:gcd", **arguments)
    assert first.train.to_list() == again.train.to_list()
    assert first.held_out.to_list() == again.held_out.to_list()
    assert first.train.to_list() != load_task("gym:gcd", seed=1000, **arguments).train.to_list()


def test_held_out_questions_never_occur_in_training_though_the_dataset_repeats_itself():
    # 100 questions in all
    name = "products:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    train, held_out, _ = gym_problems(name, train_size=300, held_out_size=20, seed=0)
    assert len(set(prompts(train))) < len(train) == 300
    assert len(set(prompts(held_out))) == len(held_out) == 20
    assert not set(prompts(train)) & set(prompts(held_out))


def test_a_dataset_with_too_few_questions_is_refused():
    name = "products:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    with pytest.raises(ValueError, match=r"gym:products repeats itself: of 1,880 problems, 100 serve for evaluation"):
        gym_problems(name, train_size=20, held_out_size=200, seed=0)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("\\boxed{12}", 1.0),
        ("<think>\\boxed{5}</think>So it is $\\boxed{12}$.", 1.0),
        ("\\boxed{5}, no, \\boxed{12}", 1.0),
        ("\\boxed{\\text{12}}", 1.0),
        ("\\boxed{$12$}", 1.0),
        ("#### 12", 1.0),
        ("12", 1.0),
        ("<think>maybe 5</think>\n12\n", 1.0),
        ("The answer is 12.", 1.0),
        ("5 + 7 = **12**", 1.0),
        ("12 is the answer.", 0.0),
        ("<think>12", 0.0),
        ("", 0.0),
        ("I have been asked this question for the whole of a long afternoon and the answer is 12", 0.0),
    ],
)
def test_the_answer_is_the_box_or_the_line_after_hashes_or_a_short_final_text(text, score):
    reward = GymReward("chain_sum", seed=0, size=10)
    reward._entries[0] = reward.entry(0) | {"answer": "12"}
    assert reward.score(text, 0) == score


@pytest.mark.parametrize("answer", ["foo", "None", "", "nan", "9" * 5000, "{}", "[1, 2"])
@pytest.mark.parametrize("name", ["prime_factorization", "boxnet", "complex_arithmetic", "game_of_life", "countdown"])
def test_no_answer_raises_or_leaves_the_unit_interval(name, answer):
    score = GymReward(name, seed=0, size=10, partial_credit=True).score(f"\\boxed{{{answer}}}", 0)
    assert type(score) is float
    assert 0.0 <= score < 1.0


@pytest.mark.parametrize(
    ("returned", "score"), [(float("nan"), 0.0), (float("inf"), 0.0), (-3, 0.0), (2, 1.0), ("x", 0.0)]
)
def test_scores_are_clipped_and_finite(monkeypatch, returned, score):
    reward = GymReward("chain_sum", seed=0, size=10, partial_credit=True)
    monkeypatch.setattr(reward._problems, "score_answer", lambda answer, entry: returned)
    assert reward.score("\\boxed{1}", 0) == score


def test_a_bug_of_a_scorer_is_no_credit(monkeypatch):
    reward = GymReward("chain_sum", seed=0, size=10, partial_credit=True)

    def score_answer(answer, entry):
        raise RecursionError

    monkeypatch.setattr(reward._problems, "score_answer", score_answer)
    assert reward.score("\\boxed{1}", 0) == 0.0


@pytest.mark.parametrize("name", sorted(_ADMISSIBLE))
def test_scorers_that_evaluate_answers_still_accept_right_ones(name):
    reward = GymReward(name, seed=0, size=10)
    for index in range(10):
        assert reward.score(f"\\boxed{{{reward.gold(index)}}}", index) == 1.0


@pytest.mark.parametrize("name", sorted(_ADMISSIBLE))
def test_answers_are_not_executed_and_end_soon(name, tmp_path):
    reward = GymReward(name, seed=0, size=10, partial_credit=True)
    canary = tmp_path / "canary"
    for answer in (
        f"open({str(canary)!r}, 'w')",
        f"[open({str(canary)!r}, 'w')]",
        "9**9**9**9",
        "9 ** 9 ** 9",
        "9* *9* *9* *9",
        "9*\n*9*\t*9*\n*9",
        "99999999!",
    ):
        assert reward.score(f"\\boxed{{{answer}}}", 0) == 0.0
    assert not canary.exists()


def test_every_scorer_that_evaluates_answers_is_refused_or_confined():
    harmless = {"number_sorting"}  # it evaluates the gold
    for name, (dataset_class, _) in factory.DATASETS.items():
        if re.search(r"\b(eval|exec|parse_expr|sympify)\(", inspect.getsource(dataset_class.score_answer)):
            assert name in _REFUSED or name in _ADMISSIBLE or name in harmless, name


def test_refused_datasets_exist_and_say_why():
    for name, reason in _REFUSED.items():
        assert name in factory.DATASETS
        with pytest.raises(ValueError, match=f"gym:{name} is unfit as a reward: {re.escape(reason)}"):
            GymReward(name, seed=0, size=10)


def test_the_reward_is_rebuilt_from_its_arguments():
    reward = GymReward("chain_sum", seed=3, size=100, settings={"max_terms": 2}, partial_credit=True)
    reward.__name__ = "sums"
    reward.entry(0)
    pickled = pickle.dumps(reward)
    copy = pickle.loads(pickled)
    assert len(pickled) < 500
    assert repr(copy) == repr(reward)
    assert repr(reward) == "GymReward('chain_sum', seed=3, size=100, settings={'max_terms': 2}, partial_credit=True)"
    assert copy.__name__ == "sums"
    assert [copy.entry(index) for index in range(10)] == [reward.entry(index) for index in range(10)]


def test_a_gold_of_another_seed_is_noticed():
    train, _, _ = gym_problems("gcd", train_size=20, held_out_size=0, seed=0)
    with pytest.raises(
        ValueError, match=r"Problem \d+ of reasoning-gym's gcd has the answer '\d+', but '\d+' came with"
    ):
        rewards_of(GymReward("gcd", seed=500, size=100), train, ["1"] * 20)


def test_datasets_without_one_gold_are_scored_by_their_rules():
    train, _, reward = gym_problems(
        "graph_color:min_num_vertices=3,max_num_vertices=3", train_size=2, held_out_size=0, seed=0
    )
    assert list(train["solution"]) == ["", ""]
    puzzle = reward.entry(0)["metadata"]["puzzle"]
    coloring = dict(zip(map(str, puzzle["vertices"]), puzzle["color_options"], strict=False))
    answer = str(coloring).replace("'", '"')
    assert rewards_of(reward, train, [f"\\boxed{{{answer}}}", "\\boxed{red}"]) == [1.0, 0.0]


def test_an_unknown_dataset_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"no dataset 'chainsum': did you mean chain_sum"):
        load_task("gym:chainsum")
    with pytest.raises(ValueError, match=r"no dataset 'arithmetic': did you mean .*basic_arithmetic"):
        load_task("gym:arithmetic")
    with pytest.raises(ValueError, match=r"no dataset '': it has ab, acre"):
        load_task("gym:")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gym:chain_sum:max_digit=1", r"gym:chain_sum has no setting max_digit: it has min_terms, max_terms, "),
        ("gym:chain_sum:seed=1", r"gym:chain_sum has no setting seed"),
        ("gym:chain_sum:max_terms=0", r"gym:chain_sum cannot be made with {'max_terms': 0}: max_terms must be"),
        ("gym:chain_sum:max_terms", r"'max_terms' are no settings of a reasoning-gym dataset"),
        ("gym:chain_sum:max_terms=open('x')", r"are no settings of a reasoning-gym dataset"),
        ("gym:chain_sum:)", r"are no settings of a reasoning-gym dataset"),
    ],
)
def test_settings_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        load_task(name)


def test_generated_held_out_problems_need_a_number():
    with pytest.raises(ValueError, match="say how many to hold out"):
        load_task("gym:gcd", held_out_size=None)


def test_datasets_that_depend_on_the_hash_seed_need_a_fixed_one(monkeypatch):
    assert all(name in factory.DATASETS for name in _HASH_DEPENDENT)
    for value in ("", "random"):
        monkeypatch.setenv("PYTHONHASHSEED", value)
        with pytest.raises(ValueError, match=r"gym:ransom_note .* PYTHONHASHSEED=0"):
            load_task("gym:ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load_task("gym:ransom_note", train_size=5, held_out_size=5).train) == 5


def test_another_process_has_the_same_problems():
    script = "from lenvm_rl.tasks.gym import GymReward; print(GymReward('word_sorting', 0, 10).entry(5)['question'])"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == GymReward("word_sorting", 0, 10).entry(5)["question"].strip()


def test_a_missing_reasoning_gym_names_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def import_without(name, *args, **kwargs):
        if name.startswith("reasoning_gym"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_without)
    with pytest.raises(ImportError, match=re.escape("pip install 'lenvm-rl[gym]'")):
        load_task("gym:gcd")
