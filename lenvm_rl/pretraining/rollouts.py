"""Rollouts of a policy, as a critic is pretrained on: token ids, never text that would be tokenised again.

1. `sample_rollouts` asks a generator for the completions, in blocks of prompts. With a folder each block is a shard
   (`lenvm_rl.pretraining.storage`): a run that was killed, stopped or out of disk continues after its last shard.
2. Each block is drawn from a seed of its own, and processes share the blocks. So neither where a run was interrupted
   nor how many processes it had changes what is drawn.
3. `choose_gamma` turns the lengths into the discount, `describe_gamma` the discount back into lengths.
"""

import hashlib
import json
import math
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lenvm_rl.launch import TERMINATED
from lenvm_rl.length import check_gamma, gamma_from_horizon
from lenvm_rl.pretraining.data import completion_lengths
from lenvm_rl.pretraining.generators import Generator, Skipped
from lenvm_rl.pretraining.storage import RolloutFolder, RolloutSettings, load_rollouts, rollout_table
from lenvm_rl.progress import progress_bar
from lenvm_rl.sampling import Prompt, SamplingSettings, prompt_token_ids
from lenvm_rl.tokenizer_fingerprint import tokenizer_fingerprint

__all__ = ["choose_gamma", "describe_gamma", "sample_rollouts", "shard_seed"]


def sample_rollouts(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    settings: SamplingSettings,
    *,
    completions_per_prompt: int,
    seed: int = 0,
    folder: str | Path | None = None,
    prompts_per_shard: int | None = None,
    accelerator: Accelerator | PartialState | None = None,
) -> Dataset:
    """``completions_per_prompt`` completions of each prompt, side by side.

    Args:
        generator: where completions come from; asked for nothing that is already in the folder.
        tokenizer: the policy's, for the prompts.
        prompts: text or conversations.
        settings: how to sample.
        completions_per_prompt: how often.
        seed: of the draws.
        folder: where to keep them; created, or continued where an earlier run of the same settings left off. Without
            one they stay in memory, as a single block drawn from ``seed``.
        prompts_per_shard: prompts of one shard; by default as many as the generator likes to complete at once. A folder
            that is continued keeps its own.
        accelerator: shares the shards over its processes, on file systems that all of them see.

    Returns:
        Columns of `storage.SCHEMA`, among them ``prompt_id`` (position of the prompt), ``sample``, ``prompt_ids``,
        ``completion_ids`` (end token included) and ``finished``; sorted by prompt; memory-mapped from the folder.
        Every process gets all of them. Completions that the generator could not give are missing; a warning counts
        them. With a folder, torch's random state is set to ``seed`` in the end, whatever there was to sample.

    Raises:
        ValueError: nothing to sample, an empty prompt, or a folder of other settings or with a damaged shard.
        OSError: the generator failed, or the disk is full. What was stored is kept.
    """
    if len(prompts) == 0 or completions_per_prompt < 1:
        raise ValueError(f"{len(prompts)} prompts with {completions_per_prompt} completions each give no rollouts.")
    if prompts_per_shard is not None and prompts_per_shard < 1:
        raise ValueError(f"prompts_per_shard must be at least 1, got {prompts_per_shard}.")
    processes = accelerator.num_processes if accelerator else 1

    def draw(positions: range, seed: int, advance: Callable[[int, int], None]) -> tuple[pa.Table, list[Any]]:
        ids = prompt_token_ids(tokenizer, prompts[positions.start : positions.stop])
        repeated = [row for row in ids for _ in range(completions_per_prompt)]
        completions = generator(repeated, settings, seed, advance)
        if len(ids) > 1 and all(isinstance(completion, Skipped) for completion in completions):
            raise OSError(
                f"{generator.name} gave no completion of prompts {positions.start} to {positions.stop - 1}: "
                f"{_counted(Counter(c.reason for c in completions if isinstance(c, Skipped)))}."
            )
        return rollout_table(positions.start, ids, completions, settings)

    if folder is None:
        if processes > 1:
            raise ValueError("Several processes share their rollouts through a folder: name one.")
        with progress_bar("rollouts", total=len(prompts) * completions_per_prompt) as advance:
            table, skipped = draw(range(len(prompts)), seed, advance)
        _warn(Counter(reason for _, _, reason in skipped), generator)
        return Dataset(table)

    sha256 = _sha256(tokenizer, prompts)
    shard_size = prompts_per_shard or max(1, generator.completions_per_shard // completions_per_prompt)
    store = RolloutFolder.open(
        folder,
        RolloutSettings(
            backend=generator.backend,
            generator=generator.name,
            sampling=settings,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            prompts=len(prompts),
            prompts_sha256=sha256,
            completions_per_prompt=completions_per_prompt,
            seed=seed,
            prompts_per_shard=shard_size,
        ),
    )
    rank = accelerator.process_index if accelerator else 0
    own = range(rank, store.settings.num_shards, processes)
    with _says_how_to_continue(store), store.locked(rank, processes):
        store.skipped(own)  # a damaged shard is better found before hours of sampling
        missing = store.missing(own)
        total, left = (sum(map(store.completions, shards)) for shards in (own, missing))
        with progress_bar("rollouts", total=total, done=total - left, visible=rank == 0) as advance:
            for shard in missing:
                table, skipped = draw(store.prompts(shard), shard_seed(seed, shard), advance)
                store.write(shard, table, skipped)
        while store.missing():  # a collective would time out where one process has minutes more to do
            time.sleep(1)
    torch.manual_seed(seed)  # what the caller draws next must not depend on how much was left to sample
    if rank == 0:
        _warn(store.skipped(), generator)
    # one process makes the copy that all of them map
    with accelerator.main_process_first() if accelerator else nullcontext():
        return load_rollouts(store.folder)


def shard_seed(seed: int, shard: int) -> int:
    """Seed of a block of prompts. The first one has the seed itself, so that a single block is drawn as in memory."""
    if shard == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{shard}".encode()).digest()[:8], "big") >> 1


def choose_gamma(rollouts: Dataset, max_new_tokens: int, override: float | None = None) -> float:
    """The discount that gives these lengths the whole range of values (LenVM section 5.3).

    The horizon is the 99th percentile of the finished lengths; where more than 1 % of the completions were cut, the
    finished ones are a biased sample and the token limit takes its place. Empty completions say nothing.

    Args:
        rollouts: columns ``completion_ids`` and ``finished``.
        max_new_tokens: the limit at which completions were cut.
        override: a discount to take instead.

    Raises:
        ValueError: no completions, or an override outside (0, 1).
    """
    if override is not None:
        return check_gamma(override, "length_gamma")
    lengths, finished = completion_lengths(rollouts)
    lengths, finished = lengths[lengths > 0], finished[lengths > 0]
    if len(lengths) == 0:
        raise ValueError("There are no completions to choose gamma from: sample some, or set length_gamma.")
    if (~finished).mean() > 0.01:
        return gamma_from_horizon(max_new_tokens)
    return gamma_from_horizon(float(np.percentile(lengths[finished], 99)))


def describe_gamma(gamma: float) -> str:
    """What a discount means in tokens, for people to read.

    The value of a state is halfway to its limit at log(0.5) / log(gamma) remaining tokens.

    Raises:
        ValueError: gamma outside (0, 1).
    """
    log_gamma = math.log(check_gamma(gamma))
    half, whole = math.log(0.5) / log_gamma, math.log(0.01) / log_gamma
    return f"gamma {gamma:.7g}: half of the range of values at {half:,.0f} remaining tokens, 99 % at {whole:,.0f}"


def _sha256(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> str:
    """Over the token ids of all prompts, a thousand at a time: a list of all would fill the memory.

    Raises:
        ValueError: an empty prompt.
    """
    digest = hashlib.sha256()
    for start in range(0, len(prompts), 1000):
        ids = prompt_token_ids(tokenizer, prompts[start : start + 1000])
        if not all(ids):
            row = start + [bool(row) for row in ids].index(False)
            raise ValueError(f"prompt {row} has no tokens: there is nothing to complete.")
        digest.update("\n".join(map(json.dumps, ids)).encode() + b"\n")
    return digest.hexdigest()


@contextmanager
def _says_how_to_continue(store: RolloutFolder) -> Iterator[None]:
    """SIGTERM stops as Ctrl-C does, and either one leaves with a sentence."""

    def terminate(signum: int, frame: Any) -> None:
        raise SystemExit(TERMINATED)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        stored = store.settings.num_shards - len(store.missing())
        sys.stderr.write(
            f"Stopped: {stored} of {store.settings.num_shards} shards of rollouts are in {store.folder}. Run the same "
            "command again to continue.\n"
        )
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)


def _warn(skipped: Counter[str], generator: Generator) -> None:
    if skipped:
        warnings.warn(
            f"{skipped.total():,} completions could not be had and are missing: {_counted(skipped)}.", stacklevel=3
        )
    for note in generator.notes():
        warnings.warn(note, stacklevel=3)


def _counted(reasons: Counter[str], most: int = 4) -> str:
    shown = [f"{count:,} x {reason}" for reason, count in reasons.most_common(most)]
    return ", ".join([*shown, "..."] if len(reasons) > most else shown)
