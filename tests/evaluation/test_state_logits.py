import numpy as np
import pytest
import torch
from datasets import Dataset
from rollouts import rollout

from lenvm_rl.evaluation.state_logits import prompt_logits, state_logits
from lenvm_rl.model import LengthValueModel


@pytest.fixture(scope="module")
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder)


def alone(critic, ids):
    return critic(input_ids=torch.tensor([ids])).logits[0].double().detach().numpy()


def test_states_are_those_of_each_rollout_alone(critic):
    rows = [rollout([5, 6, 7], 4), rollout([9], 11, finished=False), rollout([8, 8], 1), rollout([4] * 9, 2)]
    found = state_logits(critic, Dataset.from_list(rows), token_budget=24)
    for row, z in zip(rows, found, strict=True):
        expected = alone(critic, row["prompt_ids"] + row["completion_ids"])[len(row["prompt_ids"]) - 1 :]
        assert len(z) == len(row["completion_ids"]) + 1
        np.testing.assert_allclose(z, expected, atol=1e-5)


def test_prompts_are_read_at_their_last_token_in_any_company(critic):
    prompts = [[5, 6, 7], [9], [20, 30, 40, 50, 60], [8, 8]]
    found = prompt_logits(critic, prompts, token_budget=8)
    assert found == pytest.approx([alone(critic, ids)[-1] for ids in prompts], abs=1e-5)
    assert not critic.training
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        prompt_logits(critic, [[5], []])
