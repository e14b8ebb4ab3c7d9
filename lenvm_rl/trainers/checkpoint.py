"""Checkpoints that exist whole or not at all, and say so themselves.

1. A checkpoint is written in a folder beside its place, gets a manifest of all its files (sizes and SHA-256) when it is
   on disk, and then its name: `checkpoint-<step>` is never half written, and the previous one stays until then.
2. Before a run resumes from one, its files are compared with the manifest.
3. Left out: repair. What is damaged is named, and an older checkpoint serves.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lenvm_rl.atomic_file import atomic_file

MANIFEST_FILE = "lenvm_rl_manifest.json"
INCOMPLETE_FOLDER = ".incomplete"
"""In a run's folder, where checkpoints are written; nothing that looks for `checkpoint-*` looks there."""

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def publish(folder: Path, place: Path, about: dict[str, Any]) -> None:
    """Give a checkpoint its manifest and its name, once every process has written its files.

    Args:
        folder: where it was written, on the same disk as its place. Where there is none, another node that shares the
            disk was first, and nothing happens.
        place: the path it gets; a checkpoint that is there is replaced.
        about: goes into the manifest.

    Raises:
        OSError: the disk is full, or refuses.
    """
    if not folder.is_dir():
        return
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_FILE)
    with ThreadPoolExecutor() as threads:  # hashing and waiting for the disk release the interpreter
        entries = list(threads.map(_flushed, paths))
    files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    with atomic_file(folder / MANIFEST_FILE) as file:
        file.write(json.dumps({"about": about, "files": files}, indent=1).encode())
    _take_place(folder, place)
    shutil.rmtree(folder.parent, ignore_errors=True)


def settle(run: Path) -> None:
    """Clear away what a killed run was writing; a checkpoint that lacked nothing but its name gets it."""
    incomplete = run / INCOMPLETE_FOLDER
    for folder in list(incomplete.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if fault(folder) is None:
            _take_place(folder, run / folder.name)
    shutil.rmtree(incomplete, ignore_errors=True)


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the first file that is missing or differs; None if it is as it was saved."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        files = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST_FILE}, which is written last, is missing or unreadable"
    for name, entry in files.items():  # before anything is read
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"{name} has {size:,} of {entry['bytes']:,} bytes"
    with ThreadPoolExecutor() as threads:
        digests = threads.map(_digest, (checkpoint / name for name in files))
        changed = [name for name, digest in zip(files, digests, strict=True) if digest != files[name]["sha256"]]
    return f"the content of {changed[0]} changed after it was saved" if changed else None


def about(checkpoint: Path) -> dict[str, Any]:
    """What `publish` was told of a checkpoint without a fault."""
    noted: dict[str, Any] = json.loads((checkpoint / MANIFEST_FILE).read_text())["about"]
    return noted


def last_checkpoint(run: Path, skipped: Callable[[Path, str], None] = lambda checkpoint, fault: None) -> Path | None:
    """The latest checkpoint of a run that is whole; None without one.

    Args:
        run: the run's output folder.
        skipped: told of each later one that is not whole, and why.
    """
    found = [(int(match[1]), path) for path in run.glob("*") if (match := _NAME.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        if (wrong := fault(path)) is None:
            return path
        skipped(path, wrong)
    return None


def _take_place(folder: Path, place: Path) -> None:
    if place.exists():
        # folders cannot be exchanged in one step; between the two, `settle` knows what to do
        replaced = folder.with_name(f"replaced-{place.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        place.rename(replaced)
    folder.rename(place)
    with contextlib.suppress(OSError):  # no such thing on some systems
        handle = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _flushed(path: Path) -> dict[str, Any]:
    """The entry of a file in the manifest, after it has reached the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
