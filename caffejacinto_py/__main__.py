"""The program: `caffejacinto`, and `python -m caffejacinto_py`."""

from __future__ import annotations

import os
import signal
import sys


def main() -> int:
    """Run the command line and return its exit code. Ctrl-C while the program is still being imported ends it as it
    does later: one word, exit code 130."""
    watched = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not nohup's, nor somebody else's
    if watched:
        signal.signal(signal.SIGINT, _leave)
    from caffejacinto_py import cli

    if watched:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _leave(number: int, frame: object) -> None:
    """Nothing has been opened yet: the quick way out, past handlers of half-imported modules."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
