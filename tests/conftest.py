"""Shared fixtures: the smallest policy, critic and problems that are real ones, made anew for each session.

The weights are random but always the same. Nothing here may be changed by a test: load the folders, copy the rest.
"""

import pytest
import torch
from hypothesis import settings
from transformers import LlamaConfig, LlamaForCausalLM

from lenvm_rl.model import LengthValueModel
from lenvm_rl.tasks.arithmetic import arithmetic_dataset, build_tokenizer

# the same examples in every run: a failure is one for everybody
settings.register_profile("deterministic", derandomize=True, deadline=None)
settings.load_profile("deterministic")


@pytest.fixture(scope="session")
def tokenizer():
    """One token per word and number, 0..99 among them; <pad> is 0, <eos> is 1; pads on the left; no chat template."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def problems():
    """16 training problems of the embedded task: columns prompt ("12 + 7 - 5 =") and solution ("14")."""
    return arithmetic_dataset(16, seed=0, held_out=False)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory, tokenizer):
    """Folder of a Llama of two layers, with tokenizer. It ends a completion with probability near 0.1 at each token."""
    torch.manual_seed(0)
    policy = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        # a direction that all states share, and that only the end token looks at
        policy.model.embed_tokens.weight[:, 0] = 1.0
        policy.lm_head.weight[:, 0] = 0.0
        policy.lm_head.weight[tokenizer.eos_token_id] = 0.0
        policy.lm_head.weight[tokenizer.eos_token_id, 0] = 3.0
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def critic_folder(tmp_path_factory, policy_folder, tokenizer):
    """Folder of a LenVM on the policy's backbone, with tokenizer; gamma 0.9, values between -0.95 and -0.3."""
    torch.manual_seed(1)
    critic = LengthValueModel.from_backbone(
        policy_folder, gamma=0.9, tokenizer=tokenizer, generator="tiny", temperature=1.0, top_p=1.0, max_tokens=64
    )
    torch.nn.init.normal_(critic.v_head.summary.weight, std=0.3)  # a fresh head says -1/2 everywhere
    folder = tmp_path_factory.mktemp("critic")
    critic.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
