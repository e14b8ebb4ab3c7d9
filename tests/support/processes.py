"""Processes that a test started, seen from outside."""

import time
from pathlib import Path


def wait_for(condition, process, log=None, seconds=200):
    """Wait while the process runs; the end of its log is shown if it ends first, or if nothing happens in time."""
    until = time.monotonic() + seconds
    while not condition():
        waits = process.poll() is None and time.monotonic() < until
        assert waits, log.read_text()[-3000:] if log else "it ended, or nothing happened"
        time.sleep(0.02)


def processes_of(folder):
    """Ids of the processes whose command line names the folder; torchrun gives its workers sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found
