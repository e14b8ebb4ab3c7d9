import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_fns import canon_length_advantages


def test_advantages_by_hand():
    # short half: 10 (R 1) and 20 (R 0), mean 0.5; long half: 30 (R 1) and 40 (R 1), mean 1; alpha 0.9
    advantages = canon_length_advantages([1, 1, 0, 1], [30, 10, 20, 40], mu=0.5, alpha=0.9)
    assert advantages == pytest.approx([0.2, 0.3, -0.7, 0.2])


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 50)), min_size=2, max_size=16).filter(lambda g: len(g) % 2 == 0)
)
def test_without_preference_it_is_the_reward_minus_the_mean(group):
    rewards = np.array([reward for reward, _ in group])
    advantages = canon_length_advantages(rewards.tolist(), [length for _, length in group], mu=0.5, alpha=1.0)
    np.testing.assert_allclose(advantages, rewards - rewards.mean(), atol=1e-12)


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(1, 50)), min_size=2, max_size=9), st.floats(0, 1), st.floats(0, 1)
)
def test_advantages_agree_with_a_loop(group, mu, alpha):
    advantages = canon_length_advantages([r for r, _ in group], [n for _, n in group], mu=mu, alpha=alpha)
    rank = np.argsort(np.argsort([n for _, n in group], kind="stable"), kind="stable")
    rewards, long = np.array([r for r, _ in group]), rank >= len(group) // 2
    for i, r in enumerate(rewards):
        own, other = rewards[long == long[i]].mean(), rewards[long != long[i]].mean()
        against = alpha * r - other if long[i] else r - alpha * other
        assert advantages[i] == pytest.approx(mu * against + (1 - mu) * (r - own))


@pytest.mark.parametrize(
    ("rewards", "lengths", "settings", "message"),
    [
        ([1.0], [5], {}, "1 rewards and 1 lengths"),
        ([1.0, 0.0], [5], {}, "2 rewards and 1 lengths"),
        ([1.0, None], [5, 6], {}, "the reward of completion 1 is None"),
        ([float("nan"), 1.0], [5, 6], {}, "the reward of completion 0 is nan"),
        ([1.0, 0.0], [5, 6], {"mu": 2}, "mu is 2"),
        ([1.0, 0.0], [5, 6], {"alpha": -1}, "alpha is -1"),
    ],
)
def test_arguments_are_checked(rewards, lengths, settings, message):
    with pytest.raises(ValueError, match=message):
        canon_length_advantages(rewards, lengths, **settings)
