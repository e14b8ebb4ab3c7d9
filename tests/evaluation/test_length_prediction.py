import pytest
import torch

from lenvm_rl.evaluation.length_prediction import predict_length
from lenvm_rl.length import value_to_remaining
from lenvm_rl.model import LengthValueModel
from lenvm_rl.tasks.arithmetic import build_tokenizer


def test_the_length_at_the_prompt_is_the_one_that_the_value_stands_for(critic_folder, tokenizer):
    critic = LengthValueModel.from_pretrained(critic_folder)
    prompts = ["12 + 7 - 5 =", "3 + 4 ="]
    found = predict_length(critic, tokenizer, prompts)
    for prompt, length in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        assert length == pytest.approx(value_to_remaining(critic.values(ids)[0, -1].item(), 0.9), rel=1e-4)


def test_a_critic_of_another_tokenizer_is_refused(critic_folder):
    other = build_tokenizer()
    other.add_tokens(["seven"])
    with pytest.raises(ValueError, match="tokenizer"):
        predict_length(LengthValueModel.from_pretrained(critic_folder), other, ["3 + 4 ="])
