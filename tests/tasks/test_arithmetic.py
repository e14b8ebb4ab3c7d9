import random

import pytest

from lenvm_rl.tasks.arithmetic import (
    MAX_STEPS,
    MIN_STEPS,
    Problem,
    arithmetic_dataset,
    build_tokenizer,
    sample_problem,
    sample_problems,
    sample_solution,
    single_steps,
)
from reward_fns import accuracy_reward
from reward_fns.answers import answer_of


@pytest.fixture(scope="module")
def problems():
    return sample_problems(3000, seed=0, held_out=False)


@pytest.fixture(scope="module")
def solutions(problems):
    rng = random.Random(0)
    return [sample_solution(rng, problem) for problem in problems]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def step_by_step(problem):
    """The shortest solution that writes every step down."""
    lines, result = [], problem.start
    for operator, operand in problem.steps:
        following = result + operand if operator == "+" else result - operand
        lines.append(f"{result} {operator} {operand} = {following} .")
        result = following
    return " ".join([*lines, f"\\boxed{{{result}}}"])


def test_a_problem_is_worked_out_from_left_to_right():
    problem = Problem(12, (("+", 7), ("-", 5)))
    assert problem.prompt == "12 + 7 - 5 ="
    assert problem.partial_results == (12, 19, 14)
    assert problem.solution == "14"


def test_partial_results_stay_within_two_digits():
    rng = random.Random(1)
    for _ in range(5000):
        problem = sample_problem(rng)
        assert MIN_STEPS <= len(problem.steps) <= MAX_STEPS
        assert all(0 <= result <= 99 for result in problem.partial_results)
        assert all(1 <= operand <= 9 for _, operand in problem.steps)
        assert len({operand for _, operand in problem.steps}) == len(problem.steps)


def test_training_and_held_out_problems_never_meet_whatever_the_seeds():
    train = {problem.prompt for seed in range(3) for problem in sample_problems(1000, seed, held_out=False)}
    held_out = {problem.prompt for seed in range(3) for problem in sample_problems(300, seed, held_out=True)}
    assert not train & held_out


def test_problems_are_distinct_and_the_same_for_the_same_seed(problems):
    assert len({problem.prompt for problem in problems}) == 3000
    assert sample_problems(3000, seed=0, held_out=False) == problems
    assert sample_problems(3000, seed=1, held_out=False) != problems
    assert arithmetic_dataset(50, 0, held_out=False)["prompt"][:] == [problem.prompt for problem in problems[:50]]


def test_solutions_are_the_same_for_the_same_random_state(problems, solutions):
    rng = random.Random(0)
    assert [sample_solution(rng, problem) for problem in problems] == solutions


def test_solutions_end_in_a_box_with_a_number_of_the_vocabulary(solutions):
    for solution in solutions:
        assert solution.endswith("}") and solution.count("\\boxed{") == 1
        assert 0 <= int(answer_of(solution)) <= 99


def test_most_solutions_are_right_and_some_are_wrong(problems, solutions):
    # a slip that nobody checks spoils an answer; the share leaves room for learning in both directions
    right = [answer_of(text) == problem.solution for problem, text in zip(problems, solutions, strict=True)]
    assert 0.8 < sum(right) / len(right) < 0.9


def test_problems_and_solutions_survive_the_tokenizer(problems, solutions, tokenizer):
    texts = [problem.prompt for problem in problems] + solutions
    for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True):
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_token_is_a_number_a_word_or_a_sign(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("12 + 7 = 19 . let me see \\boxed{19}").input_ids)
    assert " | ".join(tokens) == "12 | + | 7 | = | 19 | . | let | me | see | \\boxed{ | 19 | }"


def test_a_decoded_right_solution_earns_the_accuracy_reward(problems, tokenizer):
    chosen = problems[:200]
    decoded = tokenizer.batch_decode(tokenizer([step_by_step(problem) for problem in chosen]).input_ids)
    golds = [problem.solution for problem in chosen]
    assert accuracy_reward(completions=decoded, solution=golds) == [1.0] * 200
    assert accuracy_reward(completions=decoded, solution=[str(int(gold) + 1) for gold in golds]) == [0.0] * 200


def test_half_of_the_tokens_are_more_than_writing_each_step_takes(problems, solutions, tokenizer):
    written = sum(len(ids) for ids in tokenizer(solutions).input_ids)
    needed = sum(len(ids) for ids in tokenizer([step_by_step(problem) for problem in problems]).input_ids)
    assert needed <= written / 2


def test_some_solutions_of_every_length_answer_at_once(problems, solutions):
    shares = {steps: [] for steps in range(MIN_STEPS, MAX_STEPS + 1)}
    for problem, solution in zip(problems, solutions, strict=True):
        shares[len(problem.steps)].append(solution.startswith("\\boxed"))
    assert all(0 < sum(share) / len(share) < 0.5 for share in shares.values())


def test_single_steps_are_all_sums_and_differences_within_two_digits():
    steps = dict(single_steps())
    assert steps["check 12 + 7 ="] == "19 ." and steps["check 12 - 7 ="] == "5 ."
    assert "check 95 + 7 =" not in steps and "check 5 - 7 =" not in steps
    assert len(steps) == 1710


def test_a_check_repairs_a_slip(problems, solutions):
    # where every step is followed by a check, the answer is right whatever was written before
    checked = [
        (problem, text)
        for problem, text in zip(problems, solutions, strict=True)
        if text.count("check") >= 1 and not text.startswith("\\boxed") and _every_step_is_checked(text)
    ]
    assert len(checked) > 100
    assert all(answer_of(text) == problem.solution for problem, text in checked)


def _every_step_is_checked(text: str) -> bool:
    lines = [line for line in text.split(".") if "=" in line]
    plain = [i for i, line in enumerate(lines) if "check" not in line]
    return all(i + 1 < len(lines) and "check" in lines[i + 1] for i in plain) and "verify" not in text
