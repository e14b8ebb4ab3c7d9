import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationConfig

from lenvm_rl.evaluation.ceiling import explained_variance_ceiling
from lenvm_rl.sampling import SamplingSettings

PAD, EOS = 0, 1
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)


class LengthPolicy(nn.Module):
    """A policy of which only lengths matter: `remaining(prefixes)` says how many tokens follow, the end included."""

    device = torch.device("cpu")
    generation_config = GenerationConfig(eos_token_id=EOS)

    def __init__(self, remaining):
        super().__init__()
        self.remaining = remaining
        self.prefixes = []

    def generate(self, input_ids, attention_mask, generation_config):
        prefixes = [row[keep].tolist() for row, keep in zip(input_ids, attention_mask.bool(), strict=True)]
        self.prefixes += prefixes
        limit = generation_config.max_new_tokens
        tails = [([7] * (n - 1) + [EOS] + [PAD] * limit)[:limit] for n in self.remaining(prefixes)]
        return torch.cat([input_ids, torch.tensor(tails)], dim=1)


# a prompt of one token, 100 or 101, and three tokens after it
ROLLOUTS = Dataset.from_dict({"prompt_ids": [[100], [101]], "completion_ids": [[11, 12, 13], [11, 12, 13]]})


def ceiling(remaining, rollouts=ROLLOUTS, limit=100, **options):
    policy = LengthPolicy(remaining)
    value = explained_variance_ceiling(policy, TOKENIZER, rollouts, SamplingSettings(limit), gamma=0.9, **options)
    return value, policy.prefixes


def test_a_deterministic_policy_leaves_nothing_to_chance():
    # what remains can be read from the last token
    assert ceiling(lambda prefixes: [prefix[-1] % 10 + 1 for prefix in prefixes])[0] == pytest.approx(1.0, abs=1e-12)


def test_a_policy_whose_length_is_pure_chance_has_a_ceiling_near_0():
    value, prefixes = ceiling(lambda prefixes: torch.randint(1, 30, (len(prefixes),)).tolist())
    assert len(prefixes) == 500 * 16
    assert value == pytest.approx(0.0, abs=0.03)  # its standard error is near 0.004


def test_between_the_two_lies_the_share_that_the_state_decides():
    # after 100 one or three tokens remain, after 101 ten or twelve, with equal chances: returns -.1, -.271, -.651322
    # and -.717571. Mean variance within a prompt .004204, between the prompts .062237: 1 - .004204 / .066441
    def remaining(prefixes):
        return [(1 if prefix[0] == 100 else 10) + 2 * int(torch.randint(0, 2, ())) for prefix in prefixes]

    assert ceiling(remaining, continuations=64)[0] == pytest.approx(0.93673, abs=0.005)


def test_two_continuations_suffice_for_an_unbiased_estimate():
    value, _ = ceiling(
        lambda prefixes: torch.randint(1, 30, (len(prefixes),)).tolist(), states=4000, continuations=2, seed=3
    )
    assert value == pytest.approx(0.0, abs=0.06)


def test_states_are_drawn_uniformly_from_those_before_a_completion_token():
    rollouts = Dataset.from_dict({"prompt_ids": [[100], [101]], "completion_ids": [[11], [21, 22, 23]]})
    _, prefixes = ceiling(lambda prefixes: [5] * len(prefixes), rollouts, states=1000, continuations=2)
    counts = {tuple(prefix): prefixes[::2].count(prefix) for prefix in prefixes}
    assert counts.keys() == {(100,), (101,), (101, 21), (101, 21, 22)}  # never the end of a completion
    assert all(count == pytest.approx(250, abs=60) for count in counts.values())


def test_each_state_is_continued_as_often_as_asked():
    _, prefixes = ceiling(lambda prefixes: [5] * len(prefixes), states=6, continuations=3, batch_size=4)
    assert len(prefixes) == 18
    assert all(prefixes[row] == prefixes[row - row % 3] for row in range(18))


def test_a_completion_that_reaches_the_limit_counts_as_ending_there():
    # 8 or 50 tokens, of which 8 are sampled: no spread is left
    value, _ = ceiling(
        lambda prefixes: [2 if prefix[0] == 100 else 8 + 42 * int(torch.randint(0, 2, ())) for prefix in prefixes],
        limit=8,
    )
    assert value == pytest.approx(1.0, abs=1e-12)


def test_the_seed_decides_and_the_random_state_is_left_as_it_was():
    def remaining(prefixes):
        return torch.randint(1, 30, (len(prefixes),)).tolist()

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = ceiling(remaining, states=20)
    assert torch.equal(torch.rand(3), expected)
    assert ceiling(remaining, states=20) == first
    assert ceiling(remaining, states=20, seed=1)[0] != first[0]


@pytest.mark.parametrize("counts", [{"continuations": 1}, {"states": 0}])
def test_too_few_states_or_continuations_are_refused(counts):
    with pytest.raises(ValueError, match="needs at least one state and two continuations"):
        ceiling(lambda prefixes: [5] * len(prefixes), **counts)


def test_without_any_spread_the_ceiling_is_unknown():
    assert math.isnan(ceiling(lambda prefixes: [5] * len(prefixes), states=11)[0])
