"""The policy's hidden states over a batch of rollouts, from forwards that are made anyway.

1. Generation goes through every state before a token, one step at a time; a hook on the decoder keeps them.
2. Where TRL computes old log-probabilities, that forward has all states, and is taken.
3. What is still missing is read again: the state after a completion that the token limit cut, which generation does not
   reach, and all rows where neither was seen (vLLM, `rollout_func`, tool calls, refilled groups).

The states are those of the model as TRL calls it, without gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call

from lenvm_rl.model import LengthValueHead


class HiddenStates:
    """Reads the last hidden states of a policy's decoder.

    Args:
        decoder: gives the decoder.
        accelerator: the trainer's.
        token_budget: tokens of one forward of its own, padding included.
        adapted: the policy has adapters. With them switched off it also is TRL's reference model, whose forward cannot
            be told from its own.
    """

    def __init__(
        self, decoder: Callable[[], nn.Module], accelerator: Accelerator, token_budget: int, *, adapted: bool = False
    ) -> None:
        self.decoder, self.accelerator, self.token_budget, self.adapted = decoder, accelerator, token_budget, adapted
        self.read_again = 0
        """Rows for which the decoder ran once more, so far."""
        self._seen: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, one batch of rollouts is generated and scored."""
        self._seen = []
        hook = self.decoder().register_forward_hook(
            lambda module, inputs, output: self._seen.append(output[0].detach())
        )
        try:
            yield
        finally:
            hook.remove()

    def forget(self) -> None:
        """The rollouts that come next are not those that were watched."""
        self._seen = []

    @contextmanager
    def of_loss(self) -> Iterator[list[Tensor]]:
        """Inside, the policy's loss is computed; gives a list, of which the last entry becomes the (B, S, H) states of
        that forward, with their graph."""
        seen: list[Tensor] = []
        hook = self.decoder().register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
        try:
            yield seen
        finally:
            hook.remove()

    @torch.no_grad()
    def of(self, batch: dict[str, Any], cut: Tensor | None = None) -> Tensor:
        """States before each token of a batch, and the one after the last. Collective.

        Args:
            batch: `prompt_ids`, `prompt_mask` (B, P) padded on the left; `completion_ids`, `completion_mask` (B, T).
            cut: (B,) bool, completions whose state after the last token is needed; None needs none.

        Returns:
            (B, T + 1, H). What lies after the last token of other completions may be anything finite.
        """
        rows, tokens = batch["completion_ids"].shape
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        present = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        states = self._of_whole_forward(rows, ids.size(1), tokens)
        missing: list[int] = []
        if states is None:
            states = self._of_generation(rows, tokens)
            if states is None:
                missing = list(range(rows))
            elif cut is not None:
                missing = cut.nonzero().flatten().tolist()
        return self._filled(states, missing, ids, present, tokens)

    def _of_whole_forward(self, rows: int, width: int, tokens: int) -> Tensor | None:
        whole = [hidden for hidden in self._seen if hidden.size(1) == width]
        if self.adapted or sum(map(len, whole)) != rows:
            return None
        return torch.cat([hidden[:, -tokens - 1 :] for hidden in whole])

    def _of_generation(self, rows: int, tokens: int) -> Tensor | None:
        """The states that one call of `generate` went through: more steps than tokens where other processes went on."""
        steps = [hidden[:, -1] for hidden in self._seen[:1]]
        for hidden in self._seen[1:]:
            if hidden.size(1) != 1:
                break
            steps.append(hidden[:, 0])
        if len(steps) < tokens or any(len(step) != rows for step in steps[:tokens]):
            return None
        states = torch.stack(steps[:tokens], 1)
        return torch.cat([states, torch.zeros_like(states[:, :1])], 1)

    def _filled(self, states: Tensor | None, missing: list[int], ids: Tensor, present: Tensor, tokens: int) -> Tensor:
        """The states with the missing rows, in as many forwards on every process."""
        room = max(1, self.token_budget // ids.size(1))
        plan = torch.tensor([[room, len(missing)]], device=ids.device)
        plan = self.accelerator.gather(plan)
        room = int(plan[:, 0].min())
        turns = -(-int(plan[:, 1].max()) // room)
        decoder = self.decoder()
        for turn in range(turns):
            chosen = missing[turn * room : (turn + 1) * room]
            part = chosen or [0]  # keeps in step with a process that has more
            with self.accelerator.autocast():
                output = decoder(input_ids=ids[part], attention_mask=present[part], use_cache=False)
            hidden = output.last_hidden_state[:, -tokens - 1 :]
            if states is None:
                states = hidden.new_zeros(len(ids), *hidden.shape[1:])
            if chosen:
                states[chosen] = hidden.to(states.dtype)
        self.read_again += len(missing)
        assert states is not None  # rows that were not seen are missing, and there is at least one
        return states


def states_before_tokens(hidden: Tensor, completion_ids: Tensor) -> Tensor:
    """(B, T, H) of the (B, S, H) states of a forward over prompts and completions."""
    return hidden[:, -completion_ids.size(1) - 1 : -1]


def with_fixed_head(head: nn.Module, hidden: Tensor) -> Tensor:
    """A head's outputs, with gradient to the hidden states alone."""
    weights = {name: weight.detach().clone() for name, weight in head.named_parameters()}
    outputs: Tensor = functional_call(head, weights, (hidden,))
    return outputs


def fresh_head(hidden_size: int) -> LengthValueHead:
    """A head on hidden states that says 0 everywhere; torch's generator stays where it was, and so do the rollouts."""
    with torch.random.fork_rng(devices=[]):
        head = LengthValueHead(hidden_size)
    nn.init.zeros_(head.summary.weight)
    nn.init.zeros_(head.summary.bias)
    return head


def decoder_of(accelerator: Accelerator, policy: Callable[[], Any]) -> Callable[[], nn.Module]:
    """Gives the decoder of a policy that accelerate wrapped, under its adapters."""

    def decoder() -> nn.Module:
        model: Any = accelerator.unwrap_model(policy())
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        found: nn.Module = model.get_decoder()
        return found

    return decoder
