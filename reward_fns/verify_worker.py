"""The process in which answers meet computer algebra: `python -m reward_fns.verify_worker`.

It reads one question per line of JSON on stdin, and writes one reply per line of JSON on stdout; `verify_pool.py` is
the other end. It exists to be killed: math-verify, and sympy under it, can compute for ever and in C code that no
exception reaches, and its own limits work by SIGALRM, in the main thread only.

Three guards need no parent: stdin ends when the parent does, however it died; a timer of the kernel kills a process
that still computes a second after its time; and the address space is bounded, since `9^{9^9}` asks for memory first.
"""

import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from math_verify import LatexExtractionConfig, parse, verify

_ADDRESS_SPACE = 2 << 30  # bytes, beside the 60 MB of the imports
_GRACE_SECONDS = 1.0
_EXPRESSION = (LatexExtractionConfig(boxed_match_priority=0),)


def is_equal(gold: str, answer: str, extract: bool) -> bool:
    """math-verify's judgement.

    Args:
        gold: an expression.
        answer: an expression, or with `extract` a text, in which math-verify looks for the answer itself.

    What math-verify cannot read, or fails on, is not equal.
    """
    try:
        # its limits are off (they would take over SIGALRM): the timer and the pool keep the time
        gold_parsed = parse(_as_math(gold), _EXPRESSION, parsing_timeout=None)
        if extract:
            answer_parsed = parse(answer, parsing_timeout=None)
        else:
            answer_parsed = parse(_as_math(answer), _EXPRESSION, parsing_timeout=None)
        return bool(verify(gold_parsed, answer_parsed, timeout_seconds=None))
    except Exception:
        return False


def serve(questions: BinaryIO, replies: BinaryIO) -> None:
    """Answer every question until the stream ends."""
    _write(replies, {"ready": True})
    for line in questions:
        question = json.loads(line)
        _set_timer(question["seconds"] + _GRACE_SECONDS)
        equal = is_equal(question["gold"], question["answer"], question["extract"])
        _set_timer(0.0)
        _write(replies, {"id": question["id"], "equal": equal})


def main() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    silence = os.open(os.devnull, os.O_WRONLY)
    # antlr prints to stdout, and nobody reads stderr after the start
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    logging.disable(logging.CRITICAL)
    # Ctrl-C reaches the whole foreground group; the parent decides when its workers end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit_resources()
    # a parent that is gone needs no reply
    with contextlib.suppress(BrokenPipeError):
        serve(sys.stdin.buffer, replies)


def _as_math(expression: str) -> str:
    # math-verify reads mathematics between dollars only, and inline mathematics on one line only
    return f"${' '.join(expression.split())}$"


def _write(replies: BinaryIO, message: dict[str, object]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()


def _set_timer(seconds: float) -> None:
    # the default action of SIGALRM ends the process from the kernel, also inside a long C call that holds the GIL
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_resources() -> None:
    # some systems have no such limits, or refuse them: the time limit remains
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        # what a preloaded allocator has reserved is no computation's fault
        reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (reserved + _ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
