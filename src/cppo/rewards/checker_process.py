"""The child side of `worker.py`: compares answers with math-verify, a JSON line in, "1" or "0" out.

Run as a script by its path, with nothing of this package imported, so it starts fast and works whatever the
parent's `__main__` is. It limits its own memory and processor time, and trusts the parent to kill it when it sleeps.
Answers are parsed by math-verify's LaTeX grammar alone; its other extractor hands text to a parser that evaluates
Python.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_LIMIT_BYTES = 2 * 1024**3


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The protocol keeps the real standard output for itself; whatever a library prints goes nowhere.
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    limit_memory()
    equivalent = load_checker()
    if not equivalent(r"\frac{1}{2}", "0.5"):
        sys.exit("math-verify does not find 1/2 and 0.5 equal")
    replies.write(b"ready\n")
    for line in sys.stdin.buffer:
        question = json.loads(line)
        limit_processor_time(question["seconds"])
        equal = equivalent(question["given"], question["expected"])
        limit_processor_time(0)
        replies.write(b"1\n" if equal else b"0\n")


def load_checker() -> Callable[[str, str], bool]:
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig()]

    def equivalent(given: str, expected: str) -> bool:
        try:
            sides = [parse(f"${text}$", latex, parsing_timeout=None) for text in (expected, given)]
            return bool(verify(*sides, timeout_seconds=None))
        except Exception:  # any failure on hostile text means "not shown to be equal"
            return False

    return equivalent


def limit_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY_LIMIT_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, hard)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ValueError, OSError):  # macOS refuses this limit
        return


def limit_processor_time(seconds: float) -> None:
    """End this process after `seconds` more of its own processor time; 0 lifts the limit.

    The signal's default action ends it inside C code too, and whether or not the parent is still there.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
