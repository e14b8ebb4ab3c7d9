"""Files that exist whole or not at all, whatever kills the process that writes them."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_path(path: Path) -> Path:
    """Where a file is written before it gets its name: a path that no other writer has, on this machine or another."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.tmp")


def writer_may_live(temporary: Path) -> bool:
    """False where a path of `temporary_path` belongs to a process of this machine that has ended."""
    host, process, _ = temporary.name.removesuffix(".tmp").rsplit("-", 2)
    if os.name != "posix" or not host.endswith(f".{socket.gethostname()}"):
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return True


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when it is complete and on disk, and otherwise not at all."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # no such thing on some systems
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name
        finally:
            os.close(folder)
