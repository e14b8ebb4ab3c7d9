"""Processes that need not import again what this one has imported."""

import os
import traceback
from collections.abc import Callable


def fork(act: Callable[[], None]) -> int:
    """Id of a new process that acts and ends, with exit code 0, or with 1 and a traceback."""
    if child := os.fork():
        return child
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
