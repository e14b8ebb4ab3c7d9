"""PPO on a problem whose optimal policy is known.

Two prompts, two words. After "x" the completion "a b" earns 1 and "b" earns .1; after "y" it is the other way round;
anything else, a completion that is cut among it, earns 0. Words are actions and prefixes are states: in "x" a, then b,
then the end is optimal, although under a policy that knows nothing "b" earns more often. Every state on the way is then
worth 1.
"""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lenvm_rl.trainers.ppo import LenVMPPOConfig, LenVMPPOTrainer

WORDS = ["<pad>", "<eos>", "x", "y", "a", "b"]
REWARDS = {("x", "a b"): 1.0, ("x", "b"): 0.1, ("y", "b"): 1.0, ("y", "a b"): 0.1}
OPTIMAL = {"x": ["a", "b", "<eos>"], "y": ["b", "<eos>"]}


def reward(prompts, completions, completion_ids, **_):
    ended = [ids[-1] == WORDS.index("<eos>") for ids in completion_ids]
    return [
        REWARDS.get((prompt, completion.strip()), 0.0) if end else 0.0
        for prompt, completion, end in zip(prompts, completions, ended, strict=True)
    ]


@pytest.fixture
def words_tokenizer():
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            initializer_range=0.3,
        )
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"lam": 0.95}, id="fixed lambda"),
        pytest.param({"length_adaptive_lambda": 1.0}, id="adaptive lambda", marks=pytest.mark.slow),
        pytest.param(
            {
                "num_iterations": 2,
                "steps_per_generation": 2,
                "gradient_accumulation_steps": 1,
                "learning_rate": 5e-3,
                "max_steps": 240,
            },
            id="epochs of minibatches",
            marks=pytest.mark.slow,
        ),
        pytest.param({"value_model": "shared"}, id="head on the policy", marks=pytest.mark.slow),
    ],
)
def test_it_finds_the_optimal_policy_and_the_value_of_its_states(words_tokenizer, policy, tmp_path, options):
    settings = {
        "per_device_train_batch_size": 64 if "num_iterations" not in options else 32,
        "max_completion_length": 4,
        "learning_rate": 1e-2,
        "entropy_coef": 0.05,
        "lr_scheduler_type": "constant",
        "value_learning_rate": 2e-2,
        "value_warmup_steps": 5,
        "length_coef": 0.0,
        "max_steps": 120,
        "logging_steps": 20,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = LenVMPPOTrainer(
        policy,
        reward,
        LenVMPPOConfig(str(tmp_path), **settings | options),
        Dataset.from_dict({"prompt": ["x", "y"] * 64}),
        processing_class=words_tokenizer,
    )
    trainer.train()
    for prompt, words in OPTIMAL.items():
        ids = torch.tensor([[WORDS.index(word) for word in [prompt, *words]]])
        with torch.no_grad():
            probabilities = policy(input_ids=ids).logits.softmax(-1)[0, :-1]
        assert (probabilities.gather(1, ids[0, 1:, None]) > 0.9).all(), (prompt, probabilities)
        assert probabilities.argmax(1).tolist() == ids[0, 1:].tolist()
        batch = {"prompt_ids": ids[:, :1], "completion_ids": ids[:, 1:]}
        batch |= {"prompt_mask": torch.ones(1, 1, dtype=torch.long), "completion_mask": torch.ones_like(ids[:, 1:])}
        assert (trainer.task_critic.score(batch) - 1.0).abs().max() < 0.15
