"""What is said, and done, when a checkpoint does not fit on the disk."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lenvm_rl.trainers.checkpoint import last_checkpoint

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch raise errors of their own; what torch says names only its writer of archives (2.13)
_SIGNS = ("inline_container", "iostream error", *(f"os error {number}" for number in _FULL))


@contextmanager
def says_what_to_do(folder: Path, run: Path) -> Iterator[None]:
    """Around the writing of a checkpoint.

    Args:
        folder: where it is written. What did not fit is removed, so that what is there can still be worked with.
        run: the folder of the run.

    Raises:
        OSError: the disk is full, with what to do. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        last = last_checkpoint(run)
        goes_on = f"with resume_from_checkpoint={str(last)!r}, which is whole" if last else "anew"
        raise OSError(
            f"{folder.name} could not be written to {str(run)!r}, where {shutil.disk_usage(run).free / 2**30:.1f} GiB "
            f"are free: {str(error).strip().partition(chr(10))[0]}. Free space, or lower save_total_limit, and start "
            f"{goes_on}."
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    return error is not None and (
        (isinstance(error, OSError) and error.errno in _FULL)
        or any(sign in str(error) for sign in _SIGNS)
        or _is_full_disk(error.__cause__ or error.__context__)
    )
