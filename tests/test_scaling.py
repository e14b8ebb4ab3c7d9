import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm_rl.scaling import (
    Held,
    Step,
    arithmetic,
    frozen,
    gathering_traffic,
    gpus_per_server,
    hiding_tokens,
    largest_replica,
    trained,
    update_traffic,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("stage", "held"),
    [
        # 7.5B on 64 GPUs in bf16: 120, 31.4, 16.6 and 1.9 GB (ZeRO, arXiv 1910.02054, figure 1)
        (0, Held(30e9, 30e9, 60e9)),
        (1, Held(15e9, 15e9, 90e9 / 64)),
        (2, Held(15e9, 15e9 / 64, 90e9 / 64)),
        (3, Held(15e9 / 64, 15e9 / 64, 90e9 / 64)),
    ],
)
def test_a_trained_model_takes_what_the_paper_says(stage, held):
    assert trained(7.5e9, stage=stage, gpus=64) == held
    assert held.total == pytest.approx({0: 120e9, 1: 31.4e9, 2: 16.6e9, 3: 1.9e9}[stage], rel=0.02)


def test_a_frozen_model_is_its_weights():
    assert frozen(1.5e9) == Held(3e9) and frozen(1.5e9, shards=8, weight_bytes=4) == Held(0.75e9)


def test_traffic_by_hand():
    # 8 GPUs, 1e9 parameters in bf16: an all-reduce moves 2 x 2 GB x 7/8
    assert update_traffic(1e9, stage=1, gpus=8, micro_steps=4) == 3.5e9
    assert update_traffic(1e9, stage=2, gpus=8, micro_steps=4) == 5 * 1.75e9
    assert update_traffic(1e9, stage=3, gpus=8, micro_steps=4) == 12 * 1.75e9
    assert update_traffic(1e9, stage=0, gpus=8, iterations=2) == 14e9
    assert update_traffic(1e9, stage=3, gpus=1) == 0
    assert gathering_traffic(1e9, gpus=8, times=2) == 3.5e9


def test_arithmetic_by_hand():
    cost = arithmetic(Step(2, 10, 40), 1000, 200)  # 100 tokens
    assert (cost.rollout, cost.update, cost.length_critic) == (200_000, 800_000, 40_000)
    assert cost.length_critic_share == 40 / 1040 and gpus_per_server(cost) == 25
    more = arithmetic(Step(2, 10, 40, iterations=2, recompute=False), 1000, 200, reference=True, task_critic=10)
    assert (more.update, more.reference, more.task_critic) == (1_200_000, 200_000, 14_000)


def test_the_largest_replica_is_what_the_rest_leaves():
    assert largest_replica(80e9, 50e9, reserve=20e9) == 5e9
    assert largest_replica(80e9, 70e9, reserve=20e9) == 0
    assert hiding_tokens(400e12, 50e9) == 8000


@pytest.mark.parametrize("options", [{"stage": 4, "gpus": 8}, {"stage": 2, "gpus": 0}])
def test_what_does_not_exist_is_refused(options):
    with pytest.raises(ValueError, match=r"stage is 4|gpus is 0"):
        trained(1e9, **options)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_hold_what_the_formulas_say(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "zero_memory.py"), "--json", str(tmp_path / "held.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = json.loads((tmp_path / "held.json").read_text())
    assert [len(cases) for cases in ranks] == [6, 6]
    for cases in ranks:
        for case in cases:
            expected = trained(case["parameters"], stage=case["stage"], gpus=2, weight_bytes=case["weight_bytes"])
            for part in ("weights", "gradients", "optimizer"):
                # stage 2 accumulates a parameter that lies across the border of the shards on both sides
                across = case["largest"] * case["weight_bytes"] if (part, case["stage"]) == ("gradients", 2) else 0
                # and what does not divide evenly is padded
                assert 0 <= case[part] - getattr(expected, part) <= across + 0.01 * getattr(expected, part), case
