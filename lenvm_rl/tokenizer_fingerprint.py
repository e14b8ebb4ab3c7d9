"""Does the critic read the same tokens as the policy?

1. A token-level critic is fed the policy's token ids. Under another vocabulary it still returns numbers, and every one
   of them is wrong: this must be an error, before the first rollout.
2. A fingerprint is the SHA-256 of the vocabulary (every token with its id, added tokens included), a colon, and the id
   of the EOS token: a critic values the states before the EOS it was trained with.
3. Left out on purpose: which token pads (padding is masked), bos, chat template, merges. They change which ids a text
   becomes, not what an id means.
4. The official checkpoints come with the tokenizer of the LenVM's own backbone, whose EOS may differ from the
   generator's (Qwen3 base and instruct): they get the vocabulary half only.
"""

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lenvm_rl.model import LengthValueConfig

__all__ = ["check_same_tokenizer", "tokenizer_fingerprint", "vocabulary_fingerprint"]


def vocabulary_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256, in hex, over the vocabulary sorted by id; the same in every process and after save and reload."""
    by_id = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(by_id, ensure_ascii=True, separators=(",", ":")).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """`<sha256 of the vocabulary>:<EOS id>`, what a critic remembers of its generator's tokenizer."""
    return f"{vocabulary_fingerprint(tokenizer)}:{tokenizer.eos_token_id}"


def check_same_tokenizer(
    policy_tokenizer: "PreTrainedTokenizerBase",
    critic_config: "LengthValueConfig",
    policy_name: str | None = None,
) -> None:
    """Refuse a critic that was not trained on the policy's tokens.

    Args:
        policy_tokenizer: tokenizer of the policy that is being trained.
        critic_config: configuration of the critic. Without a fingerprint only the sizes can be compared.
        policy_name: how the policy is called in the message; by default where its tokenizer came from.

    Raises:
        ValueError: another vocabulary, another EOS token, or ids that the critic has no embedding for.
    """
    policy_name = policy_name or policy_tokenizer.name_or_path or "the policy"
    critic_name = critic_config.generator or critic_config.name_or_path or "an unknown generator"
    remedy = (
        "A token-level critic must share the policy's tokenizer: pretrain one with "
        f"recipes/pretrain_lenvm.py --generator {policy_name}."
    )
    vocabulary = policy_tokenizer.get_vocab()
    largest_id = max(vocabulary.values())
    recorded_vocabulary, _, recorded_eos = (critic_config.tokenizer_fingerprint or "").partition(":")

    if recorded_vocabulary and recorded_vocabulary != vocabulary_fingerprint(policy_tokenizer):
        size = f"{critic_config.tokenizer_size:,} tokens" if critic_config.tokenizer_size else "size not recorded"
        raise ValueError(
            f"length_critic was trained with the tokenizer of {critic_name!r} ({size}), but the policy "
            f"{policy_name!r} has {len(vocabulary):,} other tokens. {remedy}"
        )
    if largest_id >= critic_config.vocab_size:
        raise ValueError(
            f"length_critic, trained with the tokenizer of {critic_name!r}, has {critic_config.vocab_size:,} token "
            f"embeddings, but the policy {policy_name!r} uses token ids up to {largest_id:,}. {remedy}"
        )
    if recorded_eos and recorded_eos != str(policy_tokenizer.eos_token_id):
        raise ValueError(
            f"length_critic was trained on completions of {critic_name!r} that end with token id {recorded_eos}, but "
            f"the policy {policy_name!r} ends with token id {policy_tokenizer.eos_token_id}: it would count the tokens "
            f"up to the wrong end. Set the policy tokenizer's eos_token to the one of {critic_name!r}, or pretrain a "
            f"critic with recipes/pretrain_lenvm.py --generator {policy_name}."
        )
