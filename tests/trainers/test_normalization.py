import statistics

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lenvm_rl.trainers.grpo import LenVMGRPOTrainer
from lenvm_rl.trainers.normalization import (
    combined_rewards,
    group_centred_batch_std,
    group_centred_token_std,
    trl_advantages,
)

NAN = float("nan")
# baselines.md 1.6: two prompts, four completions each
REWARDS = tensor([1.0, 0, 0, 0, 1, 1, 1, 0])
TOKENS = tensor([1000, 4000, 4000, 3000, 500, 800, 900, 2000])
ONE = tensor([1.0])


def close(actual, expected):
    assert_close(actual, tensor(expected), atol=1e-4, rtol=0)


def test_dler_over_sequences_gives_the_published_vector():
    expected = [1.7321, -0.5774, -0.5774, -0.5774, 0.5774, 0.5774, 0.5774, -1.7321]
    close(group_centred_batch_std(REWARDS, 4), expected)


def test_dler_over_tokens_gives_the_vector_of_the_released_code():
    expected = [2.6692, -0.1944, -0.1944, -0.1944, 1.2374, 1.2374, 1.2374, -1.6263]
    close(group_centred_token_std(REWARDS, 4, TOKENS), expected)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("batch", [1.4029, -0.4676, -0.4676, -0.4676, 0.4676, 0.4676, 0.4676, -1.4029]),
        ("group", [1.4997, -0.4999, -0.4999, -0.4999, 0.4999, 0.4999, 0.4999, -1.4997]),
        ("none", [0.75, -0.25, -0.25, -0.25, 0.25, 0.25, 0.25, -0.75]),
    ],
)
def test_trl_advantages_of_the_same_rewards(scale, expected):
    close(trl_advantages(REWARDS[:, None], ONE, 4, scale_rewards=scale), expected)


def test_token_statistics_are_those_of_the_tokens_written_out():
    torch.manual_seed(0)
    rewards, tokens = torch.rand(12), torch.randint(1, 9, (12,))
    centred = [r.item() - statistics.fmean(rewards.view(3, 4)[i // 4].tolist()) for i, r in enumerate(rewards)]
    written_out = [a for a, n in zip(centred, tokens.tolist(), strict=True) for _ in range(n)]
    mean, variance = statistics.fmean(written_out), statistics.variance(written_out)  # with Bessel's correction
    close(group_centred_token_std(rewards, 4, tokens), [(a - mean) / (variance + 1e-8) ** 0.5 for a in centred])


def test_a_process_that_sees_its_own_tokens_only_gets_its_part_of_the_whole():
    sums = []
    for own in (slice(0, 5), slice(5, 8)):  # a group across both
        group_centred_token_std(REWARDS, 4, TOKENS[own], own=own, reduce=lambda s: sums.append(s) or s)
    total = sums[0] + sums[1]
    parts = [
        group_centred_token_std(REWARDS, 4, TOKENS[own], own=own, reduce=lambda _: total)
        for own in (slice(0, 5), slice(5, 8))
    ]
    assert total.shape == (3,)
    assert torch.equal(torch.cat(parts), group_centred_token_std(REWARDS, 4, TOKENS))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3])
def test_equal_rewards_give_nothing_and_not_their_rounding_errors(reward):
    rewards = torch.full((12,), reward)
    assert not group_centred_batch_std(rewards, 3).any()
    assert not group_centred_token_std(rewards, 3, torch.arange(1, 13)).any()


def test_what_was_not_scored_gets_nothing_and_takes_no_part():
    rewards = torch.cat([REWARDS, tensor([NAN, 0.5, NAN, NAN, NAN, NAN, NAN, NAN])])
    sequences = group_centred_batch_std(rewards, 4)
    close(sequences[8:], [0.0] * 8)
    # one more sequence, whose advantage is 0, in the population
    close(sequences[:8], (group_centred_batch_std(REWARDS, 4) * (9 / 8) ** 0.5).tolist())
    tokens = group_centred_token_std(rewards, 4, torch.cat([TOKENS, tensor([7, 0, 7, 7, 9, 9, 9, 9])]))
    close(tokens[:8], group_centred_token_std(REWARDS, 4, TOKENS).tolist())
    assert not tokens[[8, 10, 11, 12, 13, 14, 15]].any()


def test_rewards_are_combined_as_trl_combines_them():
    rewards = tensor([[1.0, 0.5], [NAN, 0.5], [NAN, NAN]])
    assert_close(combined_rewards(rewards, tensor([1.0, -2.0])), tensor([0.0, -1.0, NAN]), equal_nan=True)


class Keeping(LenVMGRPOTrainer):
    """Keeps what TRL returned, and what the loss gets."""

    def _rolled_out(self, inputs):
        rollouts = super()._rolled_out(inputs)
        self.theirs = rollouts.batch["advantages"].clone(), rollouts.rewards
        return rollouts

    def _generate_and_score_completions(self, inputs):
        self.ours = super()._generate_and_score_completions(inputs)
        return self.ours


def words(completions, **_):
    """A second reward, that cannot be given for every completion."""
    return [None if len(text.split()) % 3 == 0 else float(len(text.split()) ** 0.5) for text in completions]


@pytest.mark.parametrize(
    ("aggregation", "scale"),
    [
        ("sum_then_normalize", "group"),
        ("sum_then_normalize", "batch"),
        ("sum_then_normalize", "none"),
        ("normalize_then_sum", "group"),
    ],
)
def test_our_copy_of_trls_normalisation_is_trls_bit_for_bit(train, short_is_right, aggregation, scale):
    options = {"scale_rewards": scale, "multi_objective_aggregation": aggregation, "reward_weights": [1.0, 0.3]}
    trainer = train(
        Keeping,
        length_coef=0.0,
        max_steps=1,
        gradient_accumulation_steps=2,
        reward_funcs=[short_is_right, words],
        **options,
    )
    advantages, rewards = trainer.theirs
    ours = trl_advantages(rewards, trainer.reward_weights, 4, scale_rewards=scale, aggregation=aggregation)
    assert rewards.isnan().any() and advantages.any()
    assert torch.equal(ours, advantages)


@pytest.mark.parametrize("normalization", ["group_centred_batch_std", "group_centred_token_std"])
def test_the_loss_gets_the_configured_advantages(train, short_is_right, normalization):
    weights = {"reward_funcs": [short_is_right, words], "reward_weights": [1.0, 0.3]}
    trainer = train(Keeping, length_coef=0.0, max_steps=1, advantage_normalization=normalization, **weights)
    rewards = combined_rewards(trainer.theirs[1], tensor([1.0, 0.3]))
    expected = (
        group_centred_batch_std(rewards, 4)
        if normalization == "group_centred_batch_std"
        else group_centred_token_std(rewards, 4, trainer.ours["completion_mask"].sum(1))
    )
    assert expected.any() and torch.equal(trainer.ours["advantages"], expected)


def test_length_credit_joins_the_configured_advantages(train, critic_folder):
    trainer = train(
        Keeping, length_critic=critic_folder, max_steps=1, advantage_normalization="group_centred_batch_std"
    )
    wrong = trainer.theirs[1][:, 0] == 0  # feels no length pressure
    expected = group_centred_batch_std(trainer.theirs[1][:, 0], 4)[wrong, None]
    mask = trainer.ours["completion_mask"][wrong].bool()
    assert wrong.any() and torch.equal(trainer.ours["advantages"][wrong], torch.where(mask, expected, 0))
