"""What a user can get wrong, each once: the message says what was seen."""

import pytest
import torch

from lenvm_rl.advantages import TaskSignal, compute_advantages, gae, length_advantages

nan, inf = float("nan"), float("inf")


def arguments(**changes):
    given = {
        "values": torch.full((2, 3), -0.5),
        "bootstrap": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "task": torch.zeros(2),
        "gamma": 0.9,
        "lam": 1.0,
        "coef": 1.0,
    }
    return given | changes


def signal(**changes):
    given = {
        "rewards": torch.zeros(2, 3),
        "values": torch.zeros(2, 3),
        "bootstrap": torch.zeros(2),
        "gamma": 1.0,
        "lam": 0.95,
    }
    return TaskSignal(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": torch.zeros(3)}, r"values has shape \(3,\): it must be \(B, T\)"),
        ({"values": torch.zeros(2, 3, dtype=torch.int64)}, "values has dtype torch.int64, but must be floating-point"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has shape \(2, 4\), but values has shape \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, r"mask has dtype torch.float32.*mask.bool\(\)"),
        ({"bootstrap": torch.zeros(3)}, r"bootstrap has shape \(3,\), but values has shape \(2, 3\)"),
        ({"bootstrap": torch.zeros(2, dtype=torch.int32)}, "bootstrap has dtype torch.int32"),
        ({"bootstrap": torch.zeros(2, device="meta")}, "bootstrap is on meta, but values is on cpu"),
        ({"task": torch.zeros(2, 3)}, r"task has shape \(2, 3\), but values has shape \(2, 3\): task needs \(2,\)"),
        ({"task": torch.zeros(2, dtype=torch.int64)}, "task has dtype torch.int64"),
        ({"task": signal(rewards=torch.zeros(2, 2))}, r"rewards has shape \(2, 2\), but values has shape \(2, 3\)"),
        ({"task": signal(values=torch.zeros(3, 2))}, r"task values has shape \(3, 2\), but values has shape \(2, 3\)"),
        ({"task": signal(bootstrap=torch.zeros(1))}, r"task bootstrap has shape \(1,\), but values has shape \(2, 3\)"),
        ({"task": signal(rewards=torch.zeros(2, 3, dtype=torch.int64))}, "rewards has dtype torch.int64"),
        ({"task": signal(values=torch.zeros(2, 3, dtype=torch.bool))}, "task values has dtype torch.bool"),
        ({"task": signal(bootstrap=torch.zeros(2, dtype=torch.uint8))}, "task bootstrap has dtype torch.uint8"),
        ({"task": signal(gamma=1.01)}, r"task gamma is 1.01: it must lie in \[0, 1\]"),
        ({"task": signal(lam=-0.1)}, r"task lam is -0.1: it must lie in \[0, 1\]"),
        ({"task": signal(lam=torch.ones(3))}, r"task lam has shape \(3,\), but values has shape \(2, 3\)"),
        ({"task": signal(lam=torch.ones(2, dtype=torch.int64))}, "task lam has dtype torch.int64"),
        ({"task": signal(potential_coef=inf)}, "potential_coef is inf"),
        ({"gamma": 1.0}, r"length gamma is 1.0.*inside \(0, 1\)"),
        ({"gamma": 0.0}, "length gamma is 0.0"),
        ({"gamma": nan}, "length gamma is nan"),
        ({"lam": 1.5}, r"length lam is 1.5: it must lie in \[0, 1\]"),
        ({"lam": nan}, "length lam is nan"),
        ({"coef": nan}, "coef is nan"),
        ({"coef": inf}, "coef is inf"),
        ({"gate": torch.ones(2, 3)}, r"gate has shape \(2, 3\), but values has shape \(2, 3\): gate needs \(2,\)"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": nan}, "scale is nan"),
        ({"scale": torch.ones(1)}, r"scale has shape \(1,\): it must be a number or a 0-dim tensor"),
        ({"scale": torch.ones((), device="meta")}, "scale is on meta, but values is on cpu"),
        ({"backend": "cuda"}, "backend 'cuda' does not exist: choose one of 'auto', 'torch', 'triton', 'reference'"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_seen(changes, message):
    with pytest.raises(ValueError, match=message):
        compute_advantages(**arguments(**changes))


def test_length_advantages_check_their_arguments():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"length gamma is 1\.0"):
        length_advantages(values, torch.zeros(2), mask, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="backend 'c'"):
        length_advantages(values, torch.zeros(2), mask, gamma=0.9, lam=1.0, backend="c")


def test_gae_checks_its_arguments():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gamma is 2: it must lie in \[0, 1\]"):
        gae(values, values, torch.zeros(2), mask, gamma=2, lam=1.0)
    with pytest.raises(ValueError, match=r"rewards has shape \(2, 2\)"):
        gae(values[:, :2], values, torch.zeros(2), mask, gamma=1.0, lam=1.0)
