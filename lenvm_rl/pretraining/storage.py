"""A folder of rollouts: sampled in any number of sittings, never half written, read without filling the memory.

1. ``settings.json`` says how the rollouts are drawn. A folder never mixes two ways: to continue with another policy,
   tokenizer, sampling setting, seed or set of prompts is refused.
2. ``rollouts-00012.parquet`` holds all completions of one block of prompts. It is written under another name, synced
   and renamed: a shard exists whole or not at all, and which shards exist is the only record of progress.
3. Shards remember which completions could not be had, so that a later run neither counts nor samples them again.
4. To read, the shards are copied once, in order, into ``rollouts.arrow``, which is memory-mapped. It may be deleted.
5. Left out: whether the weights behind a generator's name have changed, and merging of folders.
"""

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from lenvm_rl.atomic_file import atomic_file, writer_may_live
from lenvm_rl.pretraining.generators import Skipped
from lenvm_rl.sampling import Completion, SamplingSettings

__all__ = ["SCHEMA", "RolloutFolder", "RolloutSettings", "load_rollouts", "rollout_table"]

SCHEMA = pa.schema(
    {
        "prompt_id": pa.int64(),
        "sample": pa.int32(),
        "prompt_ids": pa.list_(pa.int32()),
        "completion_ids": pa.list_(pa.int32()),
        "finish_reason": pa.string(),
        "finished": pa.bool_(),
        "max_new_tokens": pa.int32(),
        "temperature": pa.float64(),
        "top_p": pa.float64(),
    }
)
"""Columns of rollouts, in memory and on disk. The sampling settings stand in every row, so that rows drawn otherwise
cannot be mixed in unseen."""

_SETTINGS, _ARROW = "settings.json", "rollouts.arrow"
_FORMAT = 1
_METADATA = b"lenvm_rl"


@dataclass(frozen=True)
class RolloutSettings:
    """How the rollouts of a folder are drawn."""

    backend: str
    """Kind of the generator."""
    generator: str
    """Name of the policy."""
    sampling: SamplingSettings
    tokenizer_fingerprint: str
    """See `lenvm_rl.tokenizer_fingerprint`."""
    prompts: int
    """Number of prompts."""
    prompts_sha256: str
    """Over the token ids of all prompts."""
    completions_per_prompt: int
    seed: int
    prompts_per_shard: int
    """Prompts whose completions are stored together, and drawn from one seed."""

    @property
    def num_shards(self) -> int:
        return -(-self.prompts // self.prompts_per_shard)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RolloutSettings":
        """The settings in `to_json`'s form.

        Raises:
            ValueError: anything else.
        """
        try:
            fields = json.loads(text)
            if fields.pop("format") != _FORMAT:
                raise ValueError("another format version")
            settings = cls(**{**fields, "sampling": SamplingSettings(**fields["sampling"])})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return settings

    def differences(self, other: "RolloutSettings") -> list[str]:
        """What makes rollouts of the one unlike those of the other, in words; the size of the shards does not."""
        mine, its = ({**asdict(s), **asdict(s.sampling)} for s in (self, other))
        names = [name for name in mine if name not in ("sampling", "prompts_per_shard") and mine[name] != its[name]]
        if "prompts" in names:
            names.remove("prompts_sha256")
        return [f"{name} {_shown(mine[name])} instead of {_shown(its[name])}" for name in names]


def rollout_table(
    first_prompt: int,
    prompt_ids: Sequence[list[int]],
    completions: Sequence[Completion | Skipped],
    sampling: SamplingSettings,
) -> tuple[pa.Table, list[tuple[int, int, str]]]:
    """Completions of consecutive prompts as a table, and the skipped ones as (prompt, sample, reason).

    Args:
        first_prompt: position of the first prompt among all.
        prompt_ids: (prompts,) token ids.
        completions: of the first prompt, then of the second one, ...; equally many of each.
        sampling: how they were drawn.
    """
    per_prompt = len(completions) // len(prompt_ids)
    rows, skipped = [], []
    for position, completion in enumerate(completions):
        prompt, sample = divmod(position, per_prompt)
        if isinstance(completion, Completion):
            rows.append((first_prompt + prompt, sample, prompt_ids[prompt], completion))
        else:
            skipped.append((first_prompt + prompt, sample, completion.reason))
    columns = {
        "prompt_id": [row[0] for row in rows],
        "sample": [row[1] for row in rows],
        "prompt_ids": [row[2] for row in rows],
        "completion_ids": [row[3].ids for row in rows],
        "finish_reason": [row[3].finish_reason for row in rows],
        "finished": [row[3].finished for row in rows],
        **{name: [value] * len(rows) for name, value in asdict(sampling).items()},
    }
    return pa.Table.from_pydict(columns, schema=SCHEMA), skipped


class RolloutFolder:
    """The shards of a folder and what is missing among them. `open` one to add to it, `read` one that exists."""

    def __init__(self, folder: str | Path, settings: RolloutSettings) -> None:
        self.folder, self.settings = Path(folder), settings

    @classmethod
    def open(cls, folder: str | Path, settings: RolloutSettings) -> "RolloutFolder":
        """Create the folder, or continue it; the size of the shards is then the folder's own.

        Raises:
            ValueError: the folder was sampled otherwise (names the difference), or is damaged.
            OSError: it cannot be created.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _SETTINGS).exists():
            if any(folder.glob("rollouts-*.parquet")):
                raise ValueError(f"{folder} holds rollouts but no {_SETTINGS}, so nobody knows how they were sampled.")
            with _explained(f"{folder / _SETTINGS} could not be written"), atomic_file(folder / _SETTINGS) as file:
                file.write(settings.to_json().encode())
        own = cls.read(folder)
        differences = settings.differences(own.settings)
        if differences:
            raise ValueError(
                f"{folder} holds rollouts of other settings: asked for {', '.join(differences)}. Rollouts drawn in two "
                "ways must not be mixed: name another folder, or go back to the settings of this one."
            )
        return own

    @classmethod
    def read(cls, folder: str | Path) -> "RolloutFolder":
        """The folder as it is.

        Raises:
            ValueError: no rollouts there, or settings that cannot be read.
        """
        folder = Path(folder).expanduser()
        try:
            return cls(folder, RolloutSettings.from_json((folder / _SETTINGS).read_text()))
        except FileNotFoundError:
            raise ValueError(f"{folder} is no folder of rollouts: it has no {_SETTINGS}.") from None
        except ValueError as error:
            raise ValueError(
                f"{folder / _SETTINGS} cannot be read ({error}). Restore it from a copy, or sample into a new folder."
            ) from error

    @contextmanager
    def locked(self, process_index: int, num_processes: int) -> Iterator[None]:
        """Keep a second run out, and clear away what a killed one left half written.

        Raises:
            ValueError: another run is sampling into the folder.
        """
        with open(self.folder / f".lock-{process_index}", "w") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"Another run is sampling into {self.folder}: wait for it, or stop it.") from None
            except (ImportError, OSError):
                pass  # Windows, or a file system without locks: shards are still written whole
            for rest in self.folder.glob(".rollouts-*.tmp"):
                shard = int(rest.name.removeprefix(".rollouts-").split(".")[0])
                if shard % num_processes == process_index:
                    rest.unlink(missing_ok=True)
            for name in (_SETTINGS, _ARROW):  # somebody may be writing these: a reader takes no lock
                for rest in self.folder.glob(f".{name}.*.tmp"):
                    if not writer_may_live(rest):
                        rest.unlink(missing_ok=True)
            yield

    def path(self, shard: int) -> Path:
        return self.folder / f"rollouts-{shard:05d}.parquet"

    def prompts(self, shard: int) -> range:
        """Positions of the prompts of a shard."""
        size = self.settings.prompts_per_shard
        return range(shard * size, min((shard + 1) * size, self.settings.prompts))

    def completions(self, shard: int) -> int:
        """Completions of a shard, the skipped ones included."""
        return len(self.prompts(shard)) * self.settings.completions_per_prompt

    def missing(self, shards: Iterable[int] | None = None) -> list[int]:
        """Which of these shards (by default, of all) are still to be sampled."""
        return [s for s in (range(self.settings.num_shards) if shards is None else shards) if not self.path(s).exists()]

    def write(self, shard: int, table: pa.Table, skipped: Sequence[tuple[int, int, str]]) -> None:
        """Add a shard.

        Raises:
            OSError: no space, no permission; nothing of this shard is left behind.
        """
        metadata = {_METADATA: json.dumps({"shard": shard, "skipped": skipped}).encode()}
        shard_bytes = pa.BufferOutputStream()
        pq.write_table(
            table.replace_schema_metadata(metadata), shard_bytes, compression="zstd", write_page_checksum=True
        )
        path = self.path(shard)
        with (
            _explained(
                f"{path} could not be written and was removed. The shards before it are kept: make room, and run the "
                "same command again to continue after them"
            ),
            atomic_file(path) as file,
        ):
            file.write(memoryview(shard_bytes.getvalue()))

    def skipped(self, shards: Iterable[int] | None = None) -> Counter[str]:
        """Reasons why completions are missing from the shards that exist, counted. Checks that each shard is whole.

        Raises:
            ValueError: a damaged shard, by name.
        """
        reasons: Counter[str] = Counter()
        for shard in range(self.settings.num_shards) if shards is None else shards:
            if self.path(shard).exists():
                rows, skipped = self._footer(shard)
                if rows + len(skipped) != self.completions(shard):
                    raise self._damaged(shard, f"{rows} rows instead of {self.completions(shard) - len(skipped)}")
                reasons.update(reason for _, _, reason in skipped)
        return reasons

    def batches(self, shards: Iterable[int]) -> Iterator[pa.RecordBatch]:
        """The rows of shards, a thousand at a time, with every page's checksum verified.

        Raises:
            ValueError: a damaged shard, by name.
        """
        for shard in shards:
            try:
                with pq.ParquetFile(self.path(shard), page_checksum_verification=True) as file:
                    for batch in file.iter_batches(batch_size=1000):
                        yield batch.cast(SCHEMA)
            except (OSError, pa.ArrowException, ValueError) as error:
                raise self._damaged(shard, str(error)) from error

    def _footer(self, shard: int) -> tuple[int, list[tuple[int, int, str]]]:
        try:
            metadata = pq.read_metadata(self.path(shard))
            own = json.loads(metadata.metadata[_METADATA])
            return metadata.num_rows, own["skipped"]
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise self._damaged(shard, str(error)) from error

    def _damaged(self, shard: int, cause: str) -> ValueError:
        prompts = self.prompts(shard)
        return ValueError(
            f"{self.path(shard)} is damaged ({' '.join(cause.split())[:200]}). Delete it and run the sampling command "
            f"again: only its prompts, {prompts.start} to {prompts.stop - 1}, are sampled anew."
        )


def load_rollouts(folder: str | Path, *, partial: bool = False) -> Dataset:
    """The rollouts of a folder, sorted by prompt, memory-mapped: they take disk space, not memory.

    Args:
        folder: where `sample_rollouts` put them.
        partial: take what is there, although shards are missing.

    Returns:
        Columns of `SCHEMA`. Writes ``rollouts.arrow`` into the folder, uncompressed, when the shards have changed;
        where the folder is read-only, into the cache of `datasets`.

    Raises:
        ValueError: no rollouts, shards missing, or a damaged one.
        OSError: no space for the copy.
    """
    store = RolloutFolder.read(folder)
    missing = store.missing()
    shards = sorted(set(range(store.settings.num_shards)) - set(missing))
    if missing and not partial:
        raise ValueError(
            f"{store.folder} is not complete: {len(missing)} of {store.settings.num_shards} shards are missing. Run "
            "the sampling command again to continue it, or pass partial=True to take what is there."
        )
    if not shards:
        raise ValueError(f"{store.folder} holds no rollouts yet.")
    arrow = store.folder / _ARROW
    state = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in map(store.path, shards)]
    digest = hashlib.sha256(json.dumps(state).encode()).hexdigest().encode()
    if _digest(arrow) != digest:
        store.skipped(shards)  # a look at each footer, before much is copied
        try:
            with _explained(f"the copy to read from, {arrow}, could not be written"), atomic_file(arrow) as file:
                write_stream(file, store.batches(shards), {_METADATA: digest})
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return Dataset.from_parquet([str(store.path(shard)) for shard in shards])
    return Dataset.from_file(str(arrow))


def write_stream(file: BinaryIO, batches: Iterable[pa.RecordBatch], metadata: dict[bytes, bytes]) -> None:
    """Rows of `SCHEMA` as the Arrow stream that `datasets.Dataset.from_file` maps."""
    schema = SCHEMA.with_metadata(metadata)
    with pa.ipc.new_stream(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(metadata))


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{what} ({error.strerror or error})") from error


def _digest(arrow: Path) -> bytes | None:
    try:
        with pa.memory_map(str(arrow)) as source, pa.ipc.open_stream(source) as reader:
            return (reader.schema.metadata or {}).get(_METADATA)
    except (OSError, pa.ArrowException):
        return None


def _shown(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) >= 64 else repr(value)
