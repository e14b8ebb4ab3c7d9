"""From folders of runs to the table of the ablation."""

import json

import credit_ablation
import numpy as np
import pytest


def finish(folder, variant, seed, correct, tokens, coef=None, method="lenvm"):
    folder.mkdir(parents=True)
    about = {"method": method, "knob": variant, "knob_text": variant or "", "seed": seed}
    (folder / "run.json").write_text(json.dumps(about))
    curve = [{"step": 1, "accuracy": 0.5, "tokens": 9.0} | ({"coef": coef} if coef else {})]
    score = {"accuracy": 0.5}
    (folder / "summary.json").write_text(
        json.dumps({"interrupted": False, "before": score, "after": score, "curve": curve})
    )
    name = "before" if method == "start" else "after"
    np.savez(folder / "outcomes.npz", **{f"{name}_correct": np.array(correct), f"{name}_tokens": np.array(tokens)})


def test_a_variant_is_the_mean_of_its_seeds(tmp_path):
    finish(tmp_path / "runs" / "start", None, 0, [True, False], [50, 70], method="start")
    finish(tmp_path / "runs" / "a", "default", 0, [True, False], [20, 30], coef=1.0)
    finish(tmp_path / "runs" / "b", "default", 1, [True, True], [30, 40], coef=3.0)
    finish(tmp_path / "runs" / "c", "online", 0, [True, True], [10, 10])
    (tmp_path / "runs" / "unfinished").mkdir()
    found = credit_ablation.rows(tmp_path)
    assert [row["variant"] for row in found] == ["start", "default", "online"]
    default = found[1]
    assert default["seeds"] == 2 and default["accuracy"]["mean"] == 0.75 and default["tokens"]["mean"] == 30.0
    assert default["coef"] == 2.0
    lines = credit_ablation.table_of(found).splitlines()
    assert lines[2].startswith("| start | 1 | 50.0 % | 60.0 |")
    assert lines[4] == "| online | 1 | 100.0 % | 10.0 |  |  |  |"
    credit_ablation.plot(found, tmp_path / "ablation.png")
    assert (tmp_path / "ablation.png").stat().st_size > 5_000


@pytest.mark.parametrize("flags", credit_ablation.VARIANTS.values(), ids=credit_ablation.VARIANTS.keys())
def test_every_variant_is_one_that_the_recipe_takes(flags):
    from lenvm_rl.experiment import read_contender_flags

    config = credit_ablation.REPOSITORY / "recipes" / "configs" / "embedded_compare.yaml"
    _, args, _, _ = read_contender_flags(["--method", "lenvm", *flags, "--config", str(config)], config)
    assert args.length_credit() is not None
