"""How long completions will be, from their prompts alone.

A length that a value stands for is a lower bound on the expected one, since the value is concave in it (LenVM appendix
F); `lenvm_rl.length_distribution` forecasts the mean and quantiles. What is left while a completion is being written,
`lenvm_rl.decoding.RemainingLengthStream` says.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lenvm_rl.critic import TOKEN_BUDGET
from lenvm_rl.evaluation.state_logits import prompt_logits
from lenvm_rl.length import check_gamma, logit_to_remaining
from lenvm_rl.model import LengthValueModel
from lenvm_rl.sampling import Prompt, prompt_token_ids
from lenvm_rl.tokenizer_fingerprint import check_same_tokenizer

__all__ = ["predict_length"]


def predict_length(
    critic: LengthValueModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    token_budget: int = TOKEN_BUDGET,
) -> np.ndarray:
    """Tokens of the completion of each prompt, the end token included, before anything is generated: (prompts,).

    Args:
        critic: on its device.
        tokenizer: the policy's, which must be the critic's too.
        prompts: text or conversations.
        token_budget: tokens of one forward, padding included.

    Raises:
        ValueError: a critic with another tokenizer, or an empty prompt.
    """
    check_same_tokenizer(tokenizer, critic.config)
    logits = prompt_logits(critic, prompt_token_ids(tokenizer, prompts), token_budget=token_budget)
    return logit_to_remaining(torch.from_numpy(logits), check_gamma(critic.config.gamma)).numpy()
