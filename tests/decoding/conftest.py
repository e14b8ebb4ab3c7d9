import pytest
from transformers import AutoModelForCausalLM

from lenvm_rl.model import LengthValueModel


@pytest.fixture(scope="session")
def policy(policy_folder):
    return AutoModelForCausalLM.from_pretrained(policy_folder).eval()


@pytest.fixture(scope="session")
def critic(critic_folder):
    return LengthValueModel.from_pretrained(critic_folder).eval()


@pytest.fixture
def prompts(tokenizer, problems):
    """Four prompts of different lengths, padded on the left."""
    texts = sorted(problems["prompt"], key=len)
    tokenizer.padding_side = "left"
    return tokenizer([texts[0], texts[-1], texts[5], texts[-3]], return_tensors="pt", padding=True)
