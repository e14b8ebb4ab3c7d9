"""From folders of runs to the table of the ablation."""

import json
from contextlib import nullcontext

import credit_ablation
import credit_report
import numpy as np
import pytest

from lenvm_rl.comparison import Comparison
from lenvm_rl.experiment import read_contender_flags
from lenvm_rl.tasks import load_task
from lenvm_rl.tasks.arithmetic import sample_problems

CONFIG = credit_ablation.REPOSITORY / "recipes" / "configs" / "embedded_compare.yaml"


def finish(folder, variant, seed, correct, tokens, coef=None, method="lenvm", curve_of_variance=(), config=None):
    folder.mkdir(parents=True)
    about = {"method": method, "knob": variant, "knob_text": variant or "", "seed": seed}
    (folder / "run.json").write_text(json.dumps(about))
    curve = [{"step": 1, "accuracy": 0.5, "tokens": 9.0} | ({"coef": coef} if coef else {})]
    curve += [{"step": 2, "explained_variance": value} for value in curve_of_variance]
    score = {"accuracy": 0.5}
    (folder / "summary.json").write_text(
        json.dumps({"interrupted": False, "before": score, "after": score, "curve": curve, "config": config or {}})
    )
    name = "before" if method == "start" else "after"
    np.savez(folder / "outcomes.npz", **{f"{name}_correct": np.array(correct), f"{name}_tokens": np.array(tokens)})


def test_a_variant_is_the_mean_of_its_seeds(tmp_path):
    finish(tmp_path / "runs" / "start", None, 0, [True, False], [50, 70], method="start")
    finish(tmp_path / "runs" / "a", "default", 0, [True, False], [20, 30], coef=1.0)
    finish(tmp_path / "runs" / "b", "default", 1, [True, True], [30, 40], coef=3.0)
    finish(tmp_path / "runs" / "c", "online", 0, [True, True], [10, 10])
    (tmp_path / "runs" / "unfinished").mkdir()
    table = credit_report.report(tmp_path, credit_ablation.VARIANTS)
    found = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert [row["variant"] for row in found] == ["start", "default", "online"]
    default = found[1]
    assert default["seeds"] == 2 and default["accuracy"]["mean"] == 0.75 and default["tokens"]["mean"] == 30.0
    assert default["coef"] == 2.0
    lines = table.splitlines()
    assert lines[2].startswith("| start | 1 | 50.0 % | 60.0 |")
    assert lines[4].startswith("| online | 1 | 100.0 % | 10.0 |") and lines[4].endswith("|  |  |  |")
    assert (tmp_path / "table.md").read_text() == table
    for figure in ("ablation.png", "over_steps.png"):
        assert (tmp_path / figure).stat().st_size > 5_000


def test_the_training_mix_gives_a_number_of_steps_its_share_of_the_training_problems():
    weights = credit_report.weights(1_000)
    steps = np.array([len(problem.steps) for problem in sample_problems(1_000, 0, held_out=True)])
    training = np.array([len(p.steps) for p in sample_problems(credit_report.TRAIN_PROBLEMS, 0, held_out=False)])
    np.testing.assert_allclose(
        [weights[steps == n].sum() / 1_000 for n in range(1, 6)], [np.mean(training == n) for n in range(1, 6)]
    )


def test_a_curve_is_the_smoothed_mean_of_the_seeds_that_logged_it(tmp_path):
    finish(tmp_path / "runs" / "a", "online", 0, [True], [9], curve_of_variance=[2.0] * 12)
    finish(tmp_path / "runs" / "b", "online", 1, [True], [9], curve_of_variance=[4.0] * 11)
    finish(tmp_path / "runs" / "c", "online", 2, [True], [9])
    variants = credit_report.read_variants(tmp_path, ["online"])
    np.testing.assert_allclose(variants[0].over_steps("explained_variance"), [3.0, 3.0])
    assert variants[0].over_steps("trust").size == 0


def test_the_short_problems_are_what_the_recipes_read(tmp_path):
    folder = credit_ablation.write_short_problems(tmp_path)
    task = load_task(str(folder), train_size=320, held_out_size=2_000, held_out="test", instruction="")
    assert len(task.train) == 320 and len(task.held_out) == 2_000
    assert max(prompt.count("+") + prompt.count("-") for prompt in task.held_out["prompt"]) == 2


@pytest.mark.parametrize(
    ("variant", "then", "word"),
    [
        ("coef 3", {"length_coef": 3.0, "length_controller_rate": 99.0}, None),
        ("coef 3", {"length_coef": 2.0}, "'coef 3', seed 1.*length_coef 2.0 then, 3.0 now"),
        ("tokens 30 from 10", {"length_controller_rate": 99.0}, "length_controller_rate 99.0 then"),
    ],
    ids=["without a controller its rate is nothing", "another coefficient", "another rate"],
)
def test_a_finished_run_of_other_settings_stands_in_for_no_variant(tmp_path, variant, then, word):
    finish(tmp_path / "runs" / "a", variant, 1, [True], [9], config=then)
    comparison = Comparison(tmp_path, credit_ablation.REPOSITORY / "recipes" / "grpo_baseline.py", CONFIG)
    with nullcontext() if word is None else pytest.raises(ValueError, match=f"{word}.*delete its folder"):
        credit_ablation.refuse_other_settings(comparison, [variant])


@pytest.mark.parametrize("flags", credit_ablation.VARIANTS.values(), ids=credit_ablation.VARIANTS.keys())
def test_every_variant_is_one_that_the_recipe_takes(flags):
    _, args, _, _ = read_contender_flags(["--method", "lenvm", *flags], CONFIG)
    assert args.length_credit() is not None
