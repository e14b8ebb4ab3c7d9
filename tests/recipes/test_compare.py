"""The comparison of methods, as a user starts, kills and continues it."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from processes import processes_of, wait_for

from lenvm_rl.comparison import Comparison, remove_checkpoints
from lenvm_rl.evaluation.contest import read_entries
from lenvm_rl.evaluation.report import write_json
from lenvm_rl.experiment import read_contender_flags
from lenvm_rl.trainers.checkpoint import INCOMPLETE_FOLDER, last_checkpoint, publish
from lenvm_rl.trainers.ppo import LenVMPPOConfig

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "compare.py"
CONFIG = ROOT / "recipes" / "configs" / "embedded_compare.yaml"
BASELINE = ROOT / "recipes" / "grpo_baseline.py"
SMALL = ["--per_device_train_batch_size", "16", "--train_problems", "16", "--eval_problems", "60"]
SMALL += ["--max_completion_length", "32", "--save_steps", "1", "--max_steps", "4"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(RECIPE), *map(str, arguments)]


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=280, env={**os.environ, **ENVIRONMENT}
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers outlive a comparison that is killed")
def test_a_killed_comparison_goes_on_where_it_was_and_reports(tmp_path):
    """Two methods; the comparison is killed in the middle of the second one's training, and started again."""
    output = tmp_path / "compare"
    arguments = ["hapo", "dler=24", "--seeds", 1, "--workers", 1, "--output_dir", output, *SMALL]
    first = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT}
    )
    finished, cut = output / "runs" / "hapo-1.0-seed0", output / "runs" / "dler-24-seed0"
    try:
        wait_for(lambda: last_checkpoint(cut) is not None, first, seconds=240)
    finally:
        first.kill()
        first.wait()
    wait_until = time.monotonic() + 10
    while processes_of(cut) and time.monotonic() < wait_until:
        time.sleep(0.05)
    assert processes_of(cut) == []  # no worker outlives the comparison
    assert not (cut / "summary.json").exists()
    saved = json.loads((last_checkpoint(cut) / "trainer_state.json").read_text())
    assert 1 <= saved["global_step"] <= 4
    before = (finished / "summary.json").stat().st_mtime_ns

    second = compare(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "3 runs, 2 of them done before" in second.stdout
    assert (finished / "summary.json").stat().st_mtime_ns == before
    resumed = json.loads((cut / "summary.json").read_text())
    assert resumed["steps"] == 4 and [entry["step"] for entry in resumed["curve"]] == [1, 2, 3, 4]
    # what was logged before it was killed is part of the run: nothing before the checkpoint was done again
    assert (
        saved["log_history"] == []
        or resumed["curve"][0]["tokens"] == (saved["log_history"][0]["completions/mean_length"])
    )
    assert not list((output / "runs").glob("*/checkpoint-*"))

    summary = json.loads((output / "summary.json").read_text())
    assert [(row["method"], row["knob"], row["seeds"]) for row in summary["rows"]] == [
        ("dler", 24, 1),
        ("hapo", 1.0, 1),
    ]
    for row in summary["rows"]:
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"] <= 1
        assert row["tokens"]["mean"] > 1 and row["sampled_tokens"] > 0 and row["training_seconds"] > 0
    with np.load(cut / "outcomes.npz") as outcomes:
        assert outcomes["after_correct"].shape == outcomes["after_tokens"].shape == (60,)
        assert outcomes["after_correct"].mean() == resumed["after"]["accuracy"]
        assert outcomes["after_tokens"].mean() == pytest.approx(resumed["after"]["completion_tokens"])
    assert (output / "table.md").read_text() in second.stdout
    assert (output / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dlre"], "There is no method 'dlre' (did you mean 'dler'?)"),
        (["dler=200"], "limit of 200 tokens"),
        (["grpo", "--no_such_flag", "3"], "--no_such_flag"),
        ([], "Nothing to compare"),
        (["grpo", "--config", "no.yaml"], "no.yaml"),
        (["--report_only"], "There is no finished run"),
    ],
    ids=["unknown method", "a limit that nothing reaches", "unknown flag", "no method", "no config", "nothing there"],
)
def test_bad_input_is_one_line_that_names_the_fix(tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments, "--output_dir", str(tmp_path / "compare")])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(RECIPE), run_name="__main__")
    error = capsys.readouterr().err.strip()
    assert exit_.value.code == 2 and "Traceback" not in error
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "compare" / "runs").exists()


def test_every_run_gets_the_same_flags_and_its_own_method_and_seed(tmp_path):
    comparison = Comparison(tmp_path, BASELINE, CONFIG, ["--max_steps", "3"])
    entries = read_entries(["lenvm=2", "thinkprune", "grpo"])
    comparison.check(entries)
    jobs = comparison.jobs(entries, seeds=2)
    assert [job.name for job in jobs] == [
        "start",
        *("lenvm-2.0-seed0", "thinkprune-64-48-32-seed0", "grpo-seed0"),
        *("lenvm-2.0-seed1", "thinkprune-64-48-32-seed1", "grpo-seed1"),
    ]
    for job in jobs:
        script, args, _, method = read_contender_flags(job.command[2:], CONFIG)
        assert (script.train_problems, script.eval_problems, args.max_steps) == (320, 4000, 3)
        assert script.evaluate_only is (job.name == "start")
        assert args.output_dir == str(tmp_path / "runs" / job.name) and str(args.seed) == job.name[-1:].replace(
            "t", "0"
        )
        if job.name.startswith("lenvm"):
            assert (args.length_coef, args.length_critic, method) == (2.0, "embedded/length_critic", None)
        else:  # no critic that would only measure
            assert (args.length_coef, args.length_critic) == (0.0, None)
        if job.name.startswith("thinkprune"):
            assert method.settings == {"limit": {0: 64, 40: 48, 80: 32}}


def test_a_contender_names_its_trainer(tmp_path):
    for name, config, coef in (("ppo", LenVMPPOConfig, 0.0), ("ppo-lenvm", LenVMPPOConfig, 2.0), ("grpo", None, 0.0)):
        knob = ["--knob", "2.0"] if name == "ppo-lenvm" else []
        _, args, _, _ = read_contender_flags(["--method", name, *knob, "--output_dir", str(tmp_path)], CONFIG)
        assert isinstance(args, LenVMPPOConfig) is (config is LenVMPPOConfig)
        assert args.length_coef == coef and args.num_generations == 8
        assert (args.length_critic is None) is (coef == 0.0)
    _, args, _, _ = read_contender_flags(["--method", "ppo", "--lam", "0.5", "--output_dir", str(tmp_path)], CONFIG)
    assert args.lam == 0.5


def test_a_run_that_was_killed_resumes_from_its_last_whole_checkpoint(tmp_path):
    comparison = Comparison(tmp_path, BASELINE, CONFIG)
    entries = read_entries(["hapo"])
    folder = tmp_path / "runs" / "hapo-1.0-seed0"
    for step in (9, 10, 11):
        written = folder / INCOMPLETE_FOLDER / f"checkpoint-{step}"
        written.mkdir(parents=True)
        (written / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
        publish(written, folder / written.name, {})
    (folder / "checkpoint-11" / "trainer_state.json").write_text('{"glob')
    (folder / "checkpoint-12").mkdir()
    job = comparison.jobs(entries, seeds=1)[1]
    assert job.command[-2:] == ["--resume_from_checkpoint", str(folder / "checkpoint-10")]
    (folder / "progress").write_text("50/100\n")
    assert job.done() == pytest.approx(0.475)
    remove_checkpoints(folder)
    assert last_checkpoint(folder) is None and job.done() == 0.0


def test_a_method_whose_settings_changed_cannot_join_its_older_runs(tmp_path):
    comparison = Comparison(tmp_path, BASELINE, CONFIG)
    comparison.check(read_entries(["hapo", "dler"]))
    comparison.check(read_entries(["hapo", "kimi"]))
    conditions = json.loads((tmp_path / "conditions.json").read_text())
    assert set(conditions["methods"]) == {"hapo=1.0", "dler=48", "kimi=0.4"}
    conditions["methods"]["kimi=0.4"][0]["warmup_steps"] = 0
    write_json(tmp_path / "conditions.json", conditions)
    with pytest.raises(ValueError, match=r"other conditions \(kimi=0.4\)"):
        comparison.check(read_entries(["kimi"]))


def test_flags_win_over_the_method_and_elsewhere_the_published_settings_hold(tmp_path):
    flags = ["--method", "laser", "--output_dir", str(tmp_path)]
    _, args, _, method = read_contender_flags([*flags, "--reward_weights", "1", "2"], CONFIG)
    assert args.reward_weights == [1.0, 2.0] and method.settings == {"target": 32}
    _, _, _, method = read_contender_flags([*flags, "--reward_settings", "{bonus: 0.2}"], CONFIG)
    assert method.settings == {"target": 32, "bonus": 0.2}
    _, _, _, method = read_contender_flags([*flags, "--task", "gym:chain_sum"], CONFIG)
    assert method.settings == {}
    _, _, _, method = read_contender_flags([*flags, "--task", "gym:chain_sum", "--knob", "900"], CONFIG)
    assert method.settings == {"target": 900}
    for bad, message in ((["--reward_settings", "48"], "no mapping"), (["--knob", "1", "--method", "grpo"], "no knob")):
        with pytest.raises(ValueError, match=message):
            read_contender_flags([*flags, *bad], CONFIG)
