"""Two processes give the rewards, and keep the state, of one."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = r"""
import json, os, sys

from reward_fns import length_reward

METHODS = {
    "dler": {"limit": 5, "eos_token_ids": 1},
    "da-dler": {"limit": 9, "easy_limit": 3, "eos_token_ids": 1},
    "hapo": {},
    "hapo ": {"mode": "mean", "shape": "linear"},
    "kimi": {},
    "arora-zanette": {"eos_token_ids": 1},
    "grpo-lambda": {"top_share": 0.4},
    "shorterbetter": {},
    "alp": {"beta": 0.01},
    "l1-max": {"target": 4},
    "laser": {"target": 4},
    "laser-d": {"shortest": 2, "longest": 16, "spacing": 2, "update_every": 2, "group_size": 4},
    "format-length": {"longest": 10},
}
# (prompt, tokens, verdict); where the second process begins splits the group of q, then that of p, then takes nothing
BATCHES = [
    ([("p", 3, 1), ("p", 6, 1), ("p", 9, 0), ("q", 2, 0), ("q", 4, 1), ("q", 8, 1), ("q", 5, None), ("r", 4, 0)], 4),
    ([("q", 7, 0), ("q", 3, 1), ("p", 5, 1), ("p", 2, 0), ("p", 2, 1), ("r", 9, 1), ("r", 3, 1), ("s", 3, None)], 3),
    ([("p", 4, 1), ("p", 8, 0), ("q", 1, 1), ("r", 6, 0)], 4),
    ([("s", 4, 1), ("s", 8, 0), ("q", 1, 1), ("p", 6, 0)], 0),
]

def judge(completions, verdict, **_):
    return verdict

def call(reward, rows):
    return reward(
        prompts=[row[0] for row in rows],
        completions=[r"\boxed{7}" for _ in rows],
        completion_ids=[[7] * (row[1] - 1) + [1 if row[1] != 8 else 7] for row in rows],
        verdict=[row[2] for row in rows],
    )

def build(name, settings):
    asked = {} if name == "format-length" else {"correctness": judge}
    return length_reward(name.strip(), **settings, **asked)

def run(share):
    results = {}
    for name, settings in METHODS.items():
        reward = build(name, settings)
        rewards = [call(reward, share(rows, split)) for rows, split in BATCHES]
        results[name] = rewards, reward.state_dict() if hasattr(reward, "state_dict") else None
    return results

if __name__ == "__main__":
    import torch.distributed as dist

    store, rank = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = run(lambda rows, split: rows[split:] if rank else rows[:split])
    loaded_in_one = build("hapo", {})
    if rank == 0:
        loaded_in_one.load_state_dict({"mode": "min", "calls": 3, "history": {"id:1": [4, 2]}})
    try:
        call(loaded_in_one, [("p", 3, 1)])
        error = None
    except ValueError as raised:
        error = str(raised)
    print(json.dumps({"results": results, "error": error}))
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "two_processes.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


@pytest.fixture(scope="module")
def ranks(script: Path) -> list[dict]:
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(script.parent / "store")]
    processes = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=environment) for rank in (0, 1)
    ]
    try:
        printed = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(lines) for lines in printed]


@pytest.fixture(scope="module")
def one(script: Path) -> dict[str, tuple]:
    names: dict = {"__name__": "one_process"}
    exec(script.read_text(), names)
    run: Callable = names["run"]
    return json.loads(json.dumps(run(lambda rows, split: rows)))


@pytest.mark.distributed
def test_rewards_are_those_of_one_process(ranks, one):
    for name, (expected, _) in one.items():
        parts = [rank["results"][name][0] for rank in ranks]
        assert [first + second for first, second in zip(*parts, strict=True)] == expected, name


@pytest.mark.distributed
def test_state_is_that_of_one_process_in_both(ranks, one):
    states = {name: state for name, (_, state) in one.items() if state}
    assert sorted(states) == ["hapo", "hapo ", "laser-d"]
    for name, state in states.items():
        assert [rank["results"][name][1] for rank in ranks] == [state, state]


@pytest.mark.distributed
def test_state_loaded_in_one_process_only_is_refused_in_both(ranks):
    for rank in ranks:
        assert "differs between processes" in rank["error"] and "load_state_dict" in rank["error"]
