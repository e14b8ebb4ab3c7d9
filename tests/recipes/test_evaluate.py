"""The recipe of the analyses, as a user starts it, on models of a few thousand parameters."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from lenvm_rl.length_distribution import FILE

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate.py"
SMALL = ["--problems", "8", "--completions_per_prompt", "4", "--max_new_tokens", "24", "--sampling_batch_size", "64"]
SHEETS = {
    "predict": ["noise floor", "entropy of the first token", "length that V stands for"],
    "schedule": ["arrival order", "predicted length", "oracle"],
    "lifebench": ["equal to n, guided", "at most n, unguided", "end token, nats"],
    "tradeoff": ["tilt by the critic, beta -4", "hard budget", "bias of the end token, b 2", "trained: "],
    "tokens": ["more is to come", "What RL removed"],
}
FIGURES = {
    "predict": {"prediction.png"},
    "schedule": {"schedule.png"},
    "lifebench": {"lengths.png"},
    "tradeoff": {"tradeoff.png"},
    "tokens": {"tokens.png", "completion.png", "tokens_after_rl.png"},
}
TASKS = [
    {
        "id": 1,
        "category": "qa",
        "type": "Health",
        "lang": "en",
        "task": "Why? {word_count_type} {word_count} words long.",
    },
    {
        "id": 2,
        "category": "qa",
        "type": "Health",
        "lang": "cn",
        "task": "为什么？必须{word_count_type} {word_count}字。",
    },
]


def start(*arguments):
    """What the recipe printed and its exit code, run in this process: the imports take longer than the work."""
    printed, complaints = io.StringIO(), io.StringIO()
    argv, threads = sys.argv, torch.get_num_threads()
    sys.argv = ["evaluate.py", *arguments]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
            runpy.run_path(str(RECIPE), run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return code, printed.getvalue() + complaints.getvalue()


@pytest.fixture(scope="module")
def models(policy_folder, critic_folder):
    return ["--policy", policy_folder, "--lenvm", critic_folder]


@pytest.fixture(scope="module")
def everything(tmp_path_factory, models, policy_folder):
    folder = tmp_path_factory.mktemp("evaluation")
    flags = [
        *models,
        *SMALL,
        "--control_prompts",
        "4",
        "--betas",
        "-4",
        "--end_biases",
        "2",
        "--schedule_batch_size",
        "4",
    ]
    flags += [
        "--schedule_window",
        "8",
        "--arrivals",
        "5",
        "--least_count",
        "1",
        "--fit_states",
        "300",
        "--fit_steps",
        "20",
    ]
    flags += ["--after", policy_folder, "--policies", policy_folder, "--output_dir", str(folder)]
    return folder, *start("all", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SHEETS))
def test_every_analysis_leaves_its_page_figures_and_numbers(everything, name):
    folder, code, said = everything
    assert code == 0, said[-3000:]
    page = (folder / name / "report.md").read_text()
    assert all(text in page for text in SHEETS[name])
    assert {path.name for path in (folder / name).glob("*.png")} == FIGURES[name]
    assert all(f"]({figure})" in page for figure in FIGURES[name])
    assert json.loads((folder / name / "summary.json").read_text())


@pytest.mark.slow
def test_the_same_policy_trades_and_writes_what_it_did_before(everything):
    folder, *_ = everything
    curves = {c["name"]: c for c in json.loads((folder / "tradeoff" / "summary.json").read_text())["curves"]}
    start_point = curves["tilt by the critic"]["points"][0]
    # "trained" is the very policy here, and draws from the same seed
    (trained,) = [curve for name, curve in curves.items() if name.startswith("trained")]
    assert trained["points"][0]["tokens"] == start_point["tokens"]
    comparison = json.loads((folder / "tokens" / "summary.json").read_text())["comparison"]
    before, after = comparison["tokens"]
    assert before == pytest.approx(after, rel=0.5)


@pytest.mark.slow
def test_guidance_keeps_its_constraints_on_the_task(everything):
    folder, *_ = everything
    scores = json.loads((folder / "lifebench" / "summary.json").read_text())["scores"]
    # among its five most probable tokens the tiny policy ends nearly at once
    assert scores["guided"]["at_least"]["score"] == 100 > scores["unguided"]["at_least"]["score"]
    assert scores["guided"]["at_most"]["score"] == 100
    # a random critic cannot tell when the end comes, but it never passes n
    assert scores["guided"]["equal"]["deviation"] < 1
    assert 0 <= scores["guided"]["equal"]["accuracy"] <= 1


@pytest.fixture(scope="module")
def chat_models(tmp_path_factory, policy_folder, critic_folder):
    """The tiny models with a chat template, which changes no token."""
    flags = []
    for option, source in (("--policy", policy_folder), ("--lenvm", critic_folder)):
        folder = tmp_path_factory.mktemp("chat") / "model"
        shutil.copytree(source, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(folder)
        flags += [option, str(folder)]
    return flags


def written(tmp_path):
    path = tmp_path / "lite.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    return str(path)


@pytest.mark.slow
def test_lifebench_runs_on_a_file_of_tasks(chat_models, tmp_path):
    out = tmp_path / "out"
    flags = ["--data", written(tmp_path), "--targets", "6", "12", "--output_dir", str(out)]
    code, said = start("lifebench", *chat_models, *flags)
    assert code == 0, said[-3000:]
    summary = json.loads((out / "lifebench" / "summary.json").read_text())
    assert (summary["requests"], summary["targets"], summary["max_new_tokens"]) == (12, [6, 12], 24)
    assert summary["scores"]["guided"]["at_least"]["score"] == 100
    assert summary["scores"]["guided"]["equal"]["accuracy"] is None


@pytest.mark.slow
def test_lifebench_in_words_reports_rulers_matches(chat_models, tmp_path):
    out = tmp_path / "out"
    flags = ["--data", written(tmp_path), "--targets", "10", "--unit", "words", "--languages", "en"]
    code, said = start("lifebench", *chat_models, *flags, "--output_dir", str(out))
    assert code == 0, said[-3000:]
    assert "| PM | FM |" in (out / "lifebench" / "report.md").read_text()


@pytest.mark.slow
def test_a_distribution_is_kept_beside_its_critic(models, critic_folder, tmp_path):
    kept = tmp_path / "critic"
    shutil.copytree(critic_folder, kept)
    flags = [*models, *SMALL, "--fit_states", "200", "--fit_steps", "20", "--distribution", str(kept)]
    for out in (tmp_path / "made", tmp_path / "read"):
        code, said = start("predict", *flags, "--output_dir", str(out))
        assert code == 0 and (kept / FILE).is_file(), said[-3000:]
    made, read = (json.loads((tmp_path / o / "predict" / "summary.json").read_text()) for o in ("made", "read"))
    assert made["forecast"] == read["forecast"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["lifebench", "--data", "nowhere.jsonl"], "has no chat template"),
        (["lifebench", "--unit", "words"], "only be asked for in words"),
        (["lifebench", "--constraints", "exactly"], "constraints must be some of equal, at_most, at_least"),
        (["tradeoff", "--policy", "no/such/folder"], "there is no folder 'no/such/folder'"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(models, flags, message):
    command, *rest = flags
    code, said = start(command, *models, *SMALL, *rest)
    assert code == 2 and message in said and "Traceback" not in said


def test_a_missing_file_of_tasks_is_said_to_be_missing(chat_models):
    code, said = start("lifebench", *chat_models, "--data", "nowhere.jsonl")
    assert code == 2 and "There is no file nowhere.jsonl" in said


def test_an_unknown_command_lists_the_known_ones():
    code, said = start("predikt")
    assert code == 2 and "predict" in said and "tradeoff" in said
