"""`python -m caffejacinto_py` is `caffejacinto`."""

from __future__ import annotations

import sys

from caffejacinto_py.cli import main

if __name__ == "__main__":
    sys.exit(main())
