import inspect
import re
from pathlib import Path

import pytest

import reward_fns
from reward_fns import METHODS, TruncationReward, length_reward

NEEDED = {
    "dler": {"eos_token_ids": 1},
    "da-dler": {"eos_token_ids": 1},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_with_published_values(name):
    reward = length_reward(name, **NEEDED.get(name, {}))
    method = METHODS[name]
    assert callable(reward) and method.acts_on and re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert method.knob in inspect.signature(method.build).parameters
    for setting, value in method.published.items():
        assert getattr(reward, setting) == value


def test_settings_go_before_published_values():
    reward = length_reward("DA_DLER", eos_token_ids=1, limit=60, easy_limit=30)
    assert isinstance(reward, TruncationReward) and (reward.limit, reward.easy_limit) == (60, 30)
    assert length_reward("l1-max", target=40).mode == "max" and length_reward("L1_exact").mode == "exact"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dlr", {}, "there is no length reward 'dlr': choose one of dler, da-dler, thinkprune, hapo, kimi"),
        ("canon", {}, "it acts on advantages: reward_fns.canon_length_advantages"),
        ("O1_Pruner", {}, "it weighs fixed samples: reward_fns.o1_pruner_weight"),
        ("pear", {}, "it needs the entropies of the policy"),
        ("hapo", {"wieght": 1, "w": 2}, "'hapo' has no setting w, wieght: it has correctness, mode, shape, weight"),
        ("l1-max", {"mode": "exact"}, "'l1-max' has no setting mode"),
        ("dler", {}, r"'dler' needs eos_token_ids, .* pass length_reward\('dler', eos_token_ids=...\)"),
        ("hapo", {"weight": 2}, "weight is 2, but must be a finite number from 0 to 1"),
    ],
)
def test_what_cannot_be_built_is_explained(name, settings, message):
    with pytest.raises(ValueError, match=message):
        length_reward(name, **settings)


def test_every_public_name_and_method_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    for name in [*METHODS, *reward_fns.__all__, *(method.arxiv for method in METHODS.values())]:
        assert name in page, name
    for method in METHODS.values():
        assert f"`{method.knob}`" in page, method.knob
