import math
import statistics
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, tensor
from torch.testing import assert_close

from lenvm_rl.critic import LengthCritic, micro_batches
from lenvm_rl.model import LengthValueModel

NAN = float("nan")
ALONE = SimpleNamespace(num_processes=1, reduce=lambda sums: sums)


def value_of(prefix):
    """The value that the fake critic gives the state after these tokens: a hash of all of them, in order."""
    code = 7
    for token in prefix:
        code = (code * 31 + token + 1) % 10_007
    return -(0.05 + 0.9 * code / 10_007)


class PrefixCritic(nn.Module):
    """Says at every position the `value_of` of the tokens so far, and remembers how it was called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shapes, self.modes = [], []

    def forward(self, input_ids):
        self.shapes.append(tuple(input_ids.shape))
        self.modes.append((self.training, torch.is_grad_enabled()))
        values = tensor([[value_of(row[: t + 1]) for t in range(len(row))] for row in input_ids.tolist()])
        return SimpleNamespace(logits=torch.log(-values / (1 + values)) * self.weight)


def fake_critic(token_budget=10_000, accelerator=ALONE):
    return LengthCritic(PrefixCritic(), accelerator, gamma=0.9, token_budget=token_budget)


def padded(rollouts, prompt_padding=0, completion_padding=0, seed=0):
    """The five arguments of `score`. Padding holds real token ids, so that only the masks can tell."""
    prompt_width = max(len(prompt) for prompt, _, _ in rollouts) + prompt_padding
    width = max(len(completion) for _, completion, _ in rollouts) + completion_padding
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(0, 50, (len(rollouts), prompt_width), generator=generator)
    completion_ids = torch.randint(0, 50, (len(rollouts), width), generator=generator)
    prompt_mask, completion_mask = torch.zeros_like(prompt_ids), torch.zeros_like(completion_ids)
    for row, (prompt, completion, _) in enumerate(rollouts):
        prompt_ids[row, prompt_width - len(prompt) :] = tensor(prompt)
        prompt_mask[row, prompt_width - len(prompt) :] = 1
        completion_ids[row, : len(completion)] = tensor(completion, dtype=torch.long)
        completion_mask[row, : len(completion)] = 1
    return prompt_ids, prompt_mask, completion_ids, completion_mask, tensor([finished for _, _, finished in rollouts])


def assert_aligned(output, rollouts):
    for row, (prompt, completion, finished) in enumerate(rollouts):
        for t in range(output.values.size(1)):
            expected = value_of(prompt + completion[:t]) if t < len(completion) else 0.0
            assert output.values[row, t].item() == pytest.approx(expected, abs=1e-6), (row, t)
        expected = 0.0 if finished else value_of(prompt + completion)
        assert output.bootstrap[row].item() == pytest.approx(expected, abs=1e-6), row


ROLLOUTS = [
    ([5], [6, 7, 8], True),
    ([5, 9, 4], [6, 7, 8, 1, 2, 3], False),  # the full length
    ([3, 3], [], False),  # generation was cut before its first token
    ([8, 0, 0, 2], [1], True),
    ([8, 0, 0, 2], [0], False),
]

rollouts_strategy = st.lists(
    st.tuples(
        st.lists(st.integers(0, 49), min_size=1, max_size=6),
        st.lists(st.integers(0, 49), min_size=0, max_size=8),
        st.booleans(),
    ),
    min_size=1,
    max_size=7,
)


def test_values_are_those_of_the_state_before_each_token_and_bootstrap_that_after_the_last():
    output = fake_critic().score(*padded(ROLLOUTS))
    assert output.values.shape == (5, 6) and output.bootstrap.shape == (5,)
    assert output.values.dtype == output.bootstrap.dtype == torch.float32
    assert_aligned(output, ROLLOUTS)
    # the same, for one row, without the helpers: s_0 is the state after the prompt [5]
    assert_close(output.values[0], tensor([value_of([5]), value_of([5, 6]), value_of([5, 6, 7]), 0.0, 0.0, 0.0]))
    assert output.bootstrap[0] == 0.0
    assert_close(output.bootstrap[1], tensor(value_of([5, 9, 4, 6, 7, 8, 1, 2, 3])))
    assert_close(output.bootstrap[2], tensor(value_of([3, 3])))


@given(rollouts_strategy, st.integers(0, 5), st.integers(0, 5), st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_values_are_aligned_for_all_lengths_paddings_and_token_budgets(rollouts, left, right, token_budget):
    output = fake_critic(token_budget).score(*padded(rollouts, left, right))
    assert_aligned(output, rollouts)


@pytest.mark.parametrize("token_budget", [1, 9, 20, 10**9])
def test_the_token_budget_changes_nothing(token_budget):
    assert_aligned(fake_critic(token_budget).score(*padded(ROLLOUTS)), ROLLOUTS)


def test_the_order_of_the_batch_changes_nothing():
    order = [3, 0, 4, 2, 1]
    output = fake_critic().score(*padded(ROLLOUTS))
    shuffled = fake_critic().score(*padded([ROLLOUTS[row] for row in order]))
    assert torch.equal(shuffled.values, output.values[order])
    assert torch.equal(shuffled.bootstrap, output.bootstrap[order])


def test_a_batch_of_empty_completions_has_only_bootstraps():
    output = fake_critic().score(*padded([([5, 6], [], False), ([7], [], True)]))
    assert output.values.shape == (2, 0)
    assert_close(output.bootstrap, tensor([value_of([5, 6]), 0.0]))


def test_masks_may_be_bool():
    prompt_ids, prompt_mask, completion_ids, completion_mask, finished = padded(ROLLOUTS)
    output = fake_critic().score(prompt_ids, prompt_mask.bool(), completion_ids, completion_mask.bool(), finished)
    assert_aligned(output, ROLLOUTS)


def test_an_empty_prompt_is_refused():
    prompt_ids, prompt_mask, *rest = padded(ROLLOUTS)
    prompt_mask[2] = 0
    with pytest.raises(ValueError, match="prompt 2 of the batch is empty: a length critic needs at least one prompt"):
        fake_critic().score(prompt_ids, prompt_mask, *rest)


def test_no_forward_exceeds_the_token_budget_or_computes_padding_of_the_batch():
    critic = fake_critic(token_budget=12)
    critic.score(*padded(ROLLOUTS, prompt_padding=30, completion_padding=30))
    # rows of 9, 5, 5, 4 and 2 tokens
    assert critic.model.shapes == [(1, 9), (2, 5), (2, 4)]


def test_the_critic_is_frozen_and_leaves_no_graph():
    critic = fake_critic()
    assert not critic.model.weight.requires_grad
    with torch.enable_grad():
        output = critic.score(*padded(ROLLOUTS))
    assert critic.model.modes == [(False, False)]
    assert not output.values.requires_grad and not output.bootstrap.requires_grad


@pytest.mark.parametrize("others", [2, 3, 7])
def test_every_process_runs_as_many_forwards_as_the_busiest(others):
    accelerator = SimpleNamespace(num_processes=2, gather=lambda own: torch.cat([own, tensor([others])]))
    critic = fake_critic(token_budget=12, accelerator=accelerator)
    assert_aligned(critic.score(*padded(ROLLOUTS)), ROLLOUTS)
    assert len(critic.model.shapes) == max(3, others)


def test_a_token_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="token_budget must be at least 1, got 0"):
        fake_critic(token_budget=0)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
@settings(deadline=None)
def test_micro_batches_hold_every_row_once_and_respect_the_budget(lengths, token_budget):
    batches = micro_batches(lengths, token_budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        widest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * widest <= token_budget
    in_order = [lengths[row] for batch in batches for row in batch]
    assert in_order == sorted(lengths, reverse=True)  # longest first
    for one, other in pairwise(batches):  # none is closed before it is full
        assert (len(one) + 1) * max(lengths[row] for row in [*one, other[0]]) > token_budget


def test_a_row_longer_than_the_budget_runs_alone():
    assert micro_batches([3, 20, 4, 3], token_budget=8) == [[1], [2, 0], [3]]


@pytest.fixture(scope="module")
def real_critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


@pytest.mark.parametrize("token_budget", [1, 17, 10_000])
def test_a_real_critic_scores_each_rollout_as_if_it_were_alone(real_critic, token_budget):
    critic = LengthCritic(real_critic, ALONE, gamma=real_critic.config.gamma, token_budget=token_budget)
    output = critic.score(*padded(ROLLOUTS, prompt_padding=2, completion_padding=3))
    for row, (prompt, completion, finished) in enumerate(ROLLOUTS):
        states = real_critic.values(tensor([prompt + completion]))[0, len(prompt) - 1 :]
        assert_close(output.values[row, : len(completion)], states[:-1])
        assert_close(output.bootstrap[row], states[-1] * (not finished))
        assert (output.values[row, len(completion) :] == 0).all()
    assert len(set(output.values[output.values != 0].tolist())) == 10  # no constant critic


def plain_calibration(values, mask, finished, gamma):
    """The same numbers from one loop over completions: EV, predicted, true, relative error, completions."""
    returns, errors, predictions, lengths = [], [], [], []
    for row in range(len(values)):
        own = [t for t in range(values.size(1)) if mask[row, t]]
        if not finished[row] or not own:
            continue
        for position, t in enumerate(own):
            returns.append(-(1 - gamma ** (len(own) - position)))
            errors.append(returns[-1] - values[row, t].item())
        predictions.append(math.log(1 + values[row, own[0]].item()) / math.log(gamma))
        lengths.append(len(own))
    spread = statistics.pvariance(returns)
    return (
        1 - statistics.pvariance(errors) / spread if spread > 1e-12 else NAN,
        statistics.mean(predictions),
        statistics.mean(lengths),
        statistics.mean(abs(p - n) / n for p, n in zip(predictions, lengths, strict=True)),
        len(lengths),
    )


def numbers(calibration):
    return (
        calibration.explained_variance,
        calibration.predicted_tokens,
        calibration.true_tokens,
        calibration.relative_error,
        calibration.completions,
    )


def scored(rows, width, seed, holes):
    """Random values, right-padded masks (with tool tokens in them if `holes`), and who finished."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows, 1), generator=generator)
    mask = torch.arange(width) < lengths
    if holes:
        mask &= torch.rand(rows, width, generator=generator) < 0.7
    values = -torch.rand(rows, width, generator=generator) * 0.9 - 0.05
    return values, mask, torch.rand(rows, generator=generator) < 0.7


def test_calibration_of_the_worked_example():
    # spec.md section 2, finished: G = -.3439, -.271, -.19, -.1; the second completion was cut and says nothing
    values = tensor([[-0.40, -0.35, -0.20, -0.15], [-0.9, -0.9, -0.9, -0.9]])
    calibration = fake_critic().calibration(values, torch.ones(2, 4, dtype=torch.bool), tensor([True, False]))
    assert calibration.explained_variance == pytest.approx(0.925305, abs=1e-6)
    assert calibration.predicted_tokens == pytest.approx(4.84836, abs=1e-5)  # log(0.6) / log(0.9)
    assert calibration.true_tokens == 4.0
    assert calibration.bias_tokens == pytest.approx(0.84836, abs=1e-5)
    assert calibration.relative_error == pytest.approx(0.21209, abs=1e-5)
    assert calibration.completions == 1


@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 10_000), st.booleans())
@settings(max_examples=60, deadline=None)
def test_calibration_is_what_a_plain_loop_finds(rows, width, seed, holes):
    values, mask, finished = scored(rows, width, seed, holes)
    calibration = fake_critic().calibration(values, mask, finished)
    if not (mask.any(1) & finished).any():
        assert calibration.completions == 0 and math.isnan(calibration.explained_variance)
        assert math.isnan(calibration.bias_tokens) and math.isnan(calibration.relative_error)
        return
    expected = plain_calibration(values, mask, finished, gamma=0.9)
    assert numbers(calibration) == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


def test_calibration_ignores_what_lies_outside_the_mask():
    values, mask, finished = scored(rows=6, width=9, seed=3, holes=True)
    expected = fake_critic().calibration(values, mask, finished)
    assert fake_critic().calibration(values.masked_fill(~mask, 0.0), mask, finished) == expected


def test_a_perfect_critic_explains_everything():
    # tool tokens between the policy's own: they cost nothing, and the remainder counts none of them
    mask = tensor([[1, 1, 1, 0, 0], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1]]).bool()
    remaining = tensor([[3, 2, 1, 9, 9], [9, 2, 9, 9, 1], [5, 4, 3, 2, 1]])
    values = (0.9**remaining - 1).float()
    calibration = fake_critic().calibration(values, mask, tensor([True, True, True]))
    assert calibration.explained_variance == pytest.approx(1.0, abs=1e-9)
    assert calibration.predicted_tokens == pytest.approx(10 / 3, abs=1e-5)
    assert calibration.true_tokens == pytest.approx(10 / 3)
    assert calibration.relative_error == pytest.approx(0.0, abs=1e-6)
    assert calibration.bias_tokens == pytest.approx(0.0, abs=1e-5)


def test_a_constant_critic_explains_nothing():
    _, mask, finished = scored(rows=6, width=9, seed=1, holes=False)
    calibration = fake_critic().calibration(torch.full((6, 9), -0.4), mask, finished)
    assert calibration.explained_variance == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("rows", [1, 11, 14, 44])
def test_where_all_returns_are_equal_the_explained_variance_is_unknown(rows):
    # every completion is one token long; the variance of equal numbers is not exactly 0 in floating point
    values = scored(rows, width=2, seed=0, holes=False)[0]
    mask = tensor([[True, False]]).expand(rows, 2)
    calibration = fake_critic().calibration(values, mask, torch.ones(rows, dtype=torch.bool))
    assert math.isnan(calibration.explained_variance)
    assert calibration.true_tokens == 1.0


def test_calibration_of_two_processes_is_that_of_their_whole_batch():
    values, mask, finished = scored(rows=9, width=8, seed=5, holes=True)
    parts = [(values[:3, :5], mask[:3, :5], finished[:3]), (values[3:], mask[3:], finished[3:])]
    mask = mask.clone()
    mask[:3, 5:] = False  # the first process holds a narrower batch
    sums = []
    for part in parts:
        recorder = SimpleNamespace(num_processes=1, reduce=lambda own: sums.append(own) or own)
        fake_critic(accelerator=recorder).calibration(*part)
    accelerator = SimpleNamespace(num_processes=2, reduce=lambda own: sums[0] + sums[1])
    for part in parts:
        shared = fake_critic(accelerator=accelerator).calibration(*part)
        assert numbers(shared) == pytest.approx(plain_calibration(values, mask, finished, gamma=0.9), rel=1e-6)
