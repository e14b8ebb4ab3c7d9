import asyncio
import pickle
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward_fns import AccuracyReward, accuracy_reward


def boxed(answer: str) -> str:
    return f"Let us see. The answer is $\\boxed{{{answer}}}$."


def score(reward: AccuracyReward, gold: str, answer: str) -> float:
    (value,) = reward(completions=[boxed(answer)], solution=[gold])
    return value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        pytest.param("7", "4 + 3", id="the question copied"),
        pytest.param("30", r"-5 \cdot -6", id="a product copied"),
        pytest.param("2", r"\gcd(26,760)", id="a function copied"),
        pytest.param(r"\frac{23}{131}", r"\frac{92}{524}", id="a fraction not reduced"),
        pytest.param("55", r"\sum_{k=1}^{10}k", id="a sum copied"),
        pytest.param("95", r"u=\frac{3044-4}{32}", id="an equation half solved"),
        pytest.param("#### 70", r"(2\cdot 12)+12+17+17", id="a word problem set up"),
        pytest.param("7", "14/2", id="a quotient"),
        pytest.param("7", r"\frac{14}{2}", id="a quotient in LaTeX"),
        pytest.param("7", "7/1", id="a denominator of 1"),
        pytest.param("7", r"\sqrt{49}", id="a root"),
        pytest.param("8", "2^3", id="a power"),
        pytest.param("24", "4!", id="a factorial"),
        pytest.param("10", r"\binom{5}{2}", id="a binomial"),
        pytest.param("0.75", "6/8", id="a fraction for a decimal"),
        pytest.param("50", r"5 \times 10^{1}", id="scientific notation"),
        pytest.param("7", "--7", id="two signs"),
        pytest.param("7", "(7)", id="brackets"),
        pytest.param("7", "4+3=7", id="the equation"),
        pytest.param("7", "7=7", id="a tautology"),
        pytest.param("7", "7, 8", id="a hedged list"),
        pytest.param("7", r"7 \text{ or } 8", id="a hedge in words"),
        pytest.param("7", r"7 \pm 1", id="a hedge in signs"),
        pytest.param("7", r"\{1,2,3,4,5,6,7\}", id="a set"),
        pytest.param("7", r"x \in \mathbb{R}", id="everything"),
        pytest.param("7", "", id="nothing"),
        pytest.param("7", "7 million", id="a multiple in words"),
        pytest.param("7", r"\text{the answer}", id="words"),
        pytest.param("7", r"7} \boxed{8", id="the last box counts"),
        pytest.param(r"3\sqrt{13}", r"\sqrt{36+81}", id="a distance set up"),
        pytest.param(r"3\sqrt{13}", r"3\sqrt{13}, 5", id="a hedged list with a root"),
        pytest.param(r"\frac{\pi}{2}", r"\frac{\pi}{2} + 0", id="padding"),
        pytest.param("2x+3", "x + x + 1 + 1 + 1", id="a longer expression"),
        pytest.param("y = 2x + 3", "y", id="the unknown"),
        pytest.param("y = 2x + 3", "y = y", id="the unknown itself"),
        pytest.param("2x+3", "0", id="zero"),
        pytest.param("2x+3", r"\infty", id="infinity"),
        pytest.param("2x+3", r"\frac{0}{0}", id="not a number"),
        pytest.param(r"\text{Evelyn}", "Evelyn, Carla", id="two names"),
        pytest.param("(A)", "A, B", id="two choices"),
        pytest.param("(1, 2)", "(2, 1)", id="a pair turned round"),
    ],
)
def test_hack_earns_nothing(reward, gold, answer):
    assert score(reward, gold, answer) == 0.0


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "7"),
        ("#### 1,080", "1080"),
        ("The robe takes 3 bolts.\n#### 3", r"3 \text{ bolts}"),
        (r"so the sum is $\boxed{\frac{14}{3}}$.", r"\frac{14}{3}"),
        (r"\frac{3}{4}", "0.75"),
        ("p - q", "-q + p"),
        ("x^2+5x+6", "6+5x+x^2"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"x \in [-2,7]", "[-2,7]"),
        (r"11\sqrt2", r"11\sqrt{2}"),
        (r"\frac{1}{2}, 3", r"3, \frac{1}{2}"),
        ("(A)", "A"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac{1}{3} \\ 2 \end{pmatrix}"),
    ],
)
def test_right_answer_in_simplest_form_earns_one(reward, gold, answer):
    assert score(reward, gold, answer) == 1.0


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("7", "4 + 3", 1.0),
        ("7", "14/2", 1.0),
        ("7", "8", 0.0),
        (r"\frac{1}{3}", "0.333333", 1.0),
        ("p - q", "-q + p", 1.0),
        ("7", "7, 8", 0.0),
    ],
)
def test_without_simplest_form_math_verify_judges(lenient, gold, answer, expected):
    assert score(lenient, gold, answer) == expected


def test_without_simplest_form_math_verify_extracts_from_text_without_a_box(lenient):
    texts = ["So the final answer is 7.", "So the final answer is 8.", "", "<think> so it is 7", "7 </think> eight"]
    assert lenient(completions=texts, solution=["7"] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_text_without_a_box_has_no_answer(reward):
    texts = ["So the final answer is 7.", "7", "", "#### 7", r"<think> \boxed{7}", r"<think> \boxed{7}</think> 7"]
    assert reward(completions=texts, solution=["7"] * 6) == [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_every_shape_of_completion_is_scored(reward):
    completions = [
        boxed("7"),
        [{"role": "assistant", "content": boxed("7")}],
        [{"role": "assistant", "content": [{"type": "text", "text": boxed("7")}]}],
        [{"role": "assistant", "content": None}],
        [],
        "",
        None,
    ]
    rewards = reward(completions=completions, solution=["7"] * 7)
    assert rewards == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert all(type(value) is float for value in rewards)
    assert reward(completions=[], solution=[]) == []


def test_answer_column_is_used_where_there_is_no_solution(reward):
    assert reward(completions=[boxed("7")], answer=["#### 7"]) == [1.0]
    assert reward(completions=[boxed("7")], solution=["8"], answer=["7"]) == [0.0]


def test_missing_golds_are_named_with_the_columns_there_are(reward):
    message = r"'solution' or 'answer', but the columns here are \['level', 'target'\]"
    with pytest.raises(ValueError, match=message):
        reward(prompts=["p"], completions=["c"], completion_ids=[[1]], target=["7"], level=[1], trainer_state=None)


def test_gold_that_is_no_string_is_refused_with_its_row(reward):
    with pytest.raises(ValueError, match=r"row 1 of column 'answer' holds 7 \(int\)"):
        reward(completions=["a", "b"], answer=["7", 7])


@pytest.mark.parametrize(("golds", "seen"), [("7", "one string"), (["7"], "1 golds"), (["7"] * 3, "3 golds")])
def test_number_of_golds_must_be_that_of_completions(reward, golds, seen):
    with pytest.raises(ValueError, match=f"{seen} for 2 completions"):
        reward(completions=["a", "b"], solution=golds)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"simplest_form": "yes"}, "simplest_form is 'yes'"),
        ({"seconds_per_answer": 0}, "seconds_per_answer is 0, but must be a positive"),
        ({"seconds_per_answer": float("nan")}, "seconds_per_answer is nan"),
        ({"seconds_per_batch": float("inf")}, "seconds_per_batch is inf"),
        ({"seconds_per_batch": True}, "seconds_per_batch is True"),
        ({"seconds_per_answer": 5.0, "seconds_per_batch": 1.0}, r"seconds_per_batch \(1.0\) is shorter than"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 1.5}, "workers is 1.5"),
        ({"workers": True}, "workers is True"),
    ],
)
def test_parameters_are_checked(parameters, message):
    with pytest.raises(ValueError, match=message):
        AccuracyReward(**parameters)


HOSTILE = [
    "{" * 100_000 + "7" + "}" * 100_000,
    r"\boxed{" * 100_000,
    r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}",  # Math-Verify#65
    "{@Neillier 1276915 4951077 ник增高人权 국 {1,1-3-10鼓励不停);5个_GENERAL2全校。 _HEADERS1 Orchestra}",
    "9^{9^9}-1",
    "2^{10^{10}}-1",
    "10^{10^{10}}",
    "5^{5^{5^5}-4}",
    r"\left(10^6\right)!",
    "(10^6)!",
    r"\binom{10^9}{5 \cdot 10^8}",
    r"\sum_{k=1}^{10^9} \frac{1}{k}",
    r"\prod_{k=1}^{10^8} k",
    "((((10!)!)!)!)!",
    r"\int_0^1 x^{x^{x}} dx",
    "(x+y+z)^{500}",
    "9" * 500,
    "1/" * 200 + "1",
    "\x00\ud800\uffff",
    r"\frac" * 80,
]


@pytest.mark.parametrize("gold", ["7", r"\frac{23}{131}", "p - q"])
def test_batch_of_hostile_answers_is_scored_at_once(gold, reward, metrics):
    reward(completions=[boxed("-q + p")], solution=["p - q"])
    completions = [boxed(answer) for answer in HOSTILE] * 3 + [boxed("-q + p")] * 4
    start = time.monotonic()
    rewards = reward(completions=completions, solution=[gold] * 64, log_metric=metrics.__setitem__)
    assert time.monotonic() - start < 10.0
    assert rewards == [0.0] * 60 + [float(gold == "p - q")] * 4
    assert metrics["accuracy_reward/timeouts"] == 0.0


def test_hostile_answers_that_reach_math_verify_time_out_and_are_counted(metrics):
    # the gold is a tower itself, so none is refused unseen
    reward = AccuracyReward(workers=2, seconds_per_answer=0.5, seconds_per_batch=4.0)
    gold = r"x^2 + y^2 + z^2 + 2^{2^{2}} + 2^2 + 2^2 + 3! + 4! + \binom{4}{2} + \sum_{k=1}^{3} k"
    answers = ["9^{9^9}-1", "5^{5^{5^5}-4}", "(10^6)!", r"\binom{10^9}{10^8}", "9^{9^9}-1", "10^{10^{10}}"]
    start = time.monotonic()
    rewards = reward([boxed(answer) for answer in answers], [gold] * 6, log_metric=metrics.__setitem__)
    assert time.monotonic() - start < 20.0
    assert rewards == [0.0] * 6
    assert metrics == {
        "accuracy_reward/timeouts": 6.0,
        "accuracy_reward/crashes": 0.0,
        "accuracy_reward/no_answer": 0.0,
    }
    reward.close()


def test_same_metrics_and_columns_are_logged_on_every_call(reward, metrics):
    columns: dict[str, list[str]] = {}
    hooks = {"log_metric": metrics.__setitem__, "log_extra": columns.__setitem__}
    reward(completions=[boxed("7"), "no box"], solution=["#### 7", "8"], **hooks)
    assert metrics == {
        "accuracy_reward/timeouts": 0.0,
        "accuracy_reward/crashes": 0.0,
        "accuracy_reward/no_answer": 0.5,
    }
    assert columns == {"accuracy_reward/gold": ["7", "8"], "accuracy_reward/answer": ["7", ""]}
    metrics.clear()
    reward(completions=[], solution=[], **hooks)
    assert sorted(metrics) == ["accuracy_reward/crashes", "accuracy_reward/no_answer", "accuracy_reward/timeouts"]


def test_renamed_reward_logs_under_its_name(metrics):
    reward = AccuracyReward(simplest_form=False)
    reward.__name__ = "lenient"
    reward(completions=[boxed("7")], solution=["7"], log_metric=metrics.__setitem__)
    assert "lenient/timeouts" in metrics
    assert pickle.loads(pickle.dumps(reward)).__name__ == "lenient"


def test_equal_answers_of_a_group_are_compared_once(reward, monkeypatch):
    asked = []
    verify = reward._pool.verify
    monkeypatch.setattr(reward._pool, "verify", lambda questions: asked.extend(questions) or verify(questions))
    assert reward([boxed("-q + p")] * 8 + [boxed("q - p")] * 8, ["p - q"] * 16) == [1.0] * 8 + [0.0] * 8
    assert len(asked) == 2


def test_works_in_a_thread_and_in_an_event_loop(reward):
    results = []
    thread = threading.Thread(target=lambda: results.append(score(reward, "p - q", "-q + p")))
    thread.start()
    thread.join()

    async def scored() -> float:
        return await asyncio.to_thread(score, reward, "p - q", "-q+p")

    assert [*results, asyncio.run(scored())] == [1.0, 1.0]


def test_copy_by_pickle_has_the_parameters_and_its_own_processes(reward):
    assert score(reward, "p - q", "-q + p") == 1.0
    copy = pickle.loads(pickle.dumps(reward))
    assert repr(copy) == repr(reward)
    assert copy._pool.process_ids() == []
    assert score(copy, "p - q", "-q + p") == 1.0
    assert copy._pool.process_ids() != reward._pool.process_ids()
    copy.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.none(), st.text(max_size=60), st.text(max_size=30).map(boxed)), max_size=4))
def test_any_text_earns_zero_or_one_without_a_process(completions):
    # for a numeric gold everything is decided here
    rewards = accuracy_reward(completions=completions, solution=["-12.5"] * len(completions))
    assert len(rewards) == len(completions) and set(rewards) <= {0.0, 1.0}
    assert accuracy_reward._pool.process_ids() == []


def test_import_is_cheap():
    heavy = ["torch", "trl", "transformers", "numpy", "sympy", "math_verify", "multiprocessing"]
    program = f"import reward_fns, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


def test_stock_trl_calls_it_logs_it_and_names_it(reward):
    import torch
    from trl import GRPOTrainer
    from trl.trainer.utils import get_callable_name, is_async_callable

    from reward_fns import format_reward

    functions = [reward, format_reward]
    assert [get_callable_name(function) for function in functions] == ["accuracy_reward", "format_reward"]
    assert not any(is_async_callable(function) for function in functions)

    logged: dict[str, object] = {}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), is_main_process=True, num_processes=1, gather=lambda tensor: tensor
        ),
        args=SimpleNamespace(report_to=[]),
        environments=None,
        reward_funcs=functions,
        reward_func_names=["accuracy_reward", "format_reward"],
        reward_processing_classes=[None, None],
        state=SimpleNamespace(global_step=0),
        _log_completion_extra=logged.__setitem__,
        _log_metric=logged.__setitem__,
    )
    prompts = [[{"role": "user", "content": "p"}]] * 2
    completions = [[{"role": "assistant", "content": boxed(answer)}] for answer in ("-q + p", "p")]
    inputs = [{"prompt": prompt, "answer": "p - q", "level": 1} for prompt in prompts]
    rewards = GRPOTrainer._calculate_rewards(trainer, inputs, prompts, completions, [[1, 2], [3]])
    assert rewards.tolist() == [[1.0, 1.0], [0.0, 1.0]]
    assert logged["accuracy_reward/timeouts"] == 0.0
