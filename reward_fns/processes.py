"""What the other processes score in the same call.

TRL calls a reward function in every process with that process's completions, and the completions of one prompt may be
spread over processes. Every process must make the call, as with TRL's own gathering of the rewards right after it.
"""

import sys
from collections.abc import Sequence
from typing import TypeVar

Row = TypeVar("Row")


def gather_rows(rows: Sequence[Row], fingerprint: object = None) -> tuple[list[Row], slice]:
    """The rows of all processes in the order of their ranks, and where the rows of this one are.

    Args:
        rows: picklable; their number may differ between processes.
        fingerprint: of whatever state the caller keeps, which must be the same in every process.

    Raises:
        ValueError: the fingerprints differ.

    Without `torch.distributed`, or in a world of one, these are the rows themselves.
    """
    torch = sys.modules.get("torch")  # a process that never imported torch has initialised no process group
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return list(rows), slice(0, len(rows))
    world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    if world_size == 1:
        return list(rows), slice(0, len(rows))
    parts: list = [None] * world_size
    torch.distributed.all_gather_object(parts, (fingerprint, list(rows)))
    fingerprints = [part[0] for part in parts]
    if any(other != fingerprints[0] for other in fingerprints):
        raise ValueError(
            f"the state of a reward function differs between processes ({fingerprints}), so that they would reward "
            "the same completion differently: call load_state_dict with the same state in every process, and call the "
            "reward function in all of them or in none."
        )
    start = sum(len(part[1]) for part in parts[:rank])
    return [row for part in parts for row in part[1]], slice(start, start + len(rows))
