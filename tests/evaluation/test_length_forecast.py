import numpy as np
import pytest
import torch
from datasets import Dataset

from lenvm_rl.evaluation.length_forecast import fit_distribution, forecast_prompts, pinball_loss, score_forecast
from lenvm_rl.evaluation.state_logits import prompt_logits
from lenvm_rl.model import LengthValueModel

KINDS = {5: 0.25, 90: 0.05}
"""A prompt of this one token: completions that end with this probability at each token."""


@pytest.fixture(scope="module")
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


def rollouts(seed, count=400, limit=None):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        prompt = list(KINDS)[i % 2]
        length = int(rng.geometric(KINDS[prompt]))
        cut = limit is not None and length > limit
        ids = rng.integers(2, 100, min(length, limit) if cut else length).tolist()
        rows.append({"prompt_ids": [prompt], "completion_ids": ids, "finished": not cut})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def fitted(critic):
    return fit_distribution(critic, rollouts(0), states=400, steps=200, batch_size=200)


def test_the_fitted_distribution_is_that_of_the_lengths_that_were_seen(critic, fitted):
    _, mean, quantiles = forecast_prompts(critic, fitted, rollouts(1), [0.1, 0.5, 0.9])
    lengths = np.array([len(ids) for ids in rollouts(0)["completion_ids"]])
    for place in range(len(KINDS)):
        # two prompts, so the best head repeats the lengths that each of them was seen with
        seen = lengths[place::2]
        assert mean[place] == pytest.approx(seen.mean(), rel=0.1)
        assert quantiles[place] == pytest.approx(np.quantile(seen, [0.1, 0.5, 0.9]), rel=0.15, abs=1)


def test_scores_compare_both_forecasts_with_what_came(critic, fitted):
    held_out = rollouts(2)
    scores = score_forecast(critic, fitted, held_out, rollouts(0))
    lengths = np.array([len(ids) for ids in held_out["completion_ids"]])
    value, mean, quantiles = forecast_prompts(critic, fitted, held_out)
    assert scores.mean_length == lengths.mean() and scores.forecast_length == pytest.approx(mean.mean())
    assert scores.value_bias == pytest.approx(value.mean() / lengths.mean() - 1)
    assert abs(scores.forecast_bias) < 0.15
    assert scores.coverage == np.mean((quantiles[:, 0] <= lengths) & (lengths <= quantiles[:, 4]))
    assert 0.7 < scores.coverage < 0.95
    assert scores.pinball < 0.9 * scores.pinball_constant
    assert scores.to_dict()["forecast_bias"] == scores.forecast_bias


def test_the_value_beside_the_forecast_is_the_critics_own(critic, fitted):
    value, *_ = forecast_prompts(critic, fitted, rollouts(3, 6))
    z = prompt_logits(critic, [[5], [90]] * 3)
    assert value == pytest.approx(np.logaddexp(0, z) / -np.log(0.9), rel=1e-4)


def test_cut_completions_do_not_pull_the_forecast_down(critic):
    # a limit of 12 tokens cuts half of the long kind; 11 are the most that is seen to end
    cut = fit_distribution(critic, rollouts(0, limit=12), states=400, steps=200, batch_size=200)
    _, _, quantiles = forecast_prompts(critic, cut, rollouts(1, 2), [0.25, 0.5, 0.9])
    assert quantiles[1, 0] == pytest.approx(np.log(0.75) / np.log(0.95), abs=2)
    assert quantiles[1, 2] == 13  # the open bin: more than 12


def test_the_choice_of_states_and_the_head_follow_the_seed(critic):
    one, same, other = (fit_distribution(critic, rollouts(0, 20), steps=3, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.summary.weight, same.summary.weight)
    assert not torch.equal(one.summary.weight, other.summary.weight)


def test_pinball_loss_by_hand():
    # median 5 of lengths 3 and 9: 0.5 * 2 and 0.5 * 4; 90 % quantile 5: 0.1 * 2 and 0.9 * 4
    assert pinball_loss(np.array([[5.0, 5.0]] * 2), np.array([3, 9]), [0.5, 0.9]) == pytest.approx(
        (1 + 2 + 0.2 + 3.6) / 4
    )
