"""Patterns and names arrive on stdin; the number of each pattern leaves on stdout before it is tried on every name.

Run as a program, so that the system stops a pattern that never ends: Python's `re` has no limit of its own. What is no
pattern ends it with the reason.
"""

from __future__ import annotations

import json
import re
import resource
import sys


def main() -> None:
    """Match each pattern with each name: the whole of it, or its beginning."""
    asked = json.load(sys.stdin)
    # Of the processor's time: a busy machine refuses no pattern that an idle one takes.
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"], asked["seconds"] + 1))
    for number, (pattern, whole) in enumerate(asked["patterns"]):
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()
        try:
            compiled = re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            sys.exit(str(error))
        match = compiled.fullmatch if whole else compiled.match
        for name in asked["names"]:
            match(name)


if __name__ == "__main__":
    main()
