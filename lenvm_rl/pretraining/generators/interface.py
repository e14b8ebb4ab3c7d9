"""What every source of rollouts looks like."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from lenvm_rl.sampling import Completion, SamplingSettings


@dataclass(frozen=True)
class Skipped:
    """In place of a completion that could not be had."""

    reason: str
    """Short, and the same for equal causes: they are counted."""


class Generator(Protocol):
    """Samples completions of prompts given as token ids."""

    backend: str
    """Kind of the generator: ``transformers``, ``vllm``, ``server``."""
    name: str
    """The policy: folder, hub name, or the name that the server knows it by."""
    completions_per_shard: int
    """Completions that are asked for, and stored, at once."""

    def __call__(
        self,
        prompt_ids: Sequence[list[int]],
        settings: SamplingSettings,
        seed: int,
        on_batch: Callable[[int, int], None] = lambda completions, tokens: None,
    ) -> Sequence[Completion | Skipped]:
        """One completion for each prompt, in the order of the prompts.

        Args:
            prompt_ids: token ids of each prompt, unpadded. A prompt is repeated to sample it several times.
            settings: how to sample.
            seed: with the same prompts and settings, decides the result as far as the backend can repeat itself.
            on_batch: called now and then with the completions and tokens made since its last call, for progress.

        Raises:
            OSError: nothing more can be had from this generator.
        """

    def notes(self) -> list[str]:
        """Sentences on what should be known about the completions made so far; none if all went as it should."""


def row_seed(seed: int, row: int) -> int:
    """A seed of 31 bits, which every server accepts, for one row of a call."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row}".encode()).digest()[:4], "big") >> 1
