#!/usr/bin/env python3
"""`caffejacinto plot` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["plot", *sys.argv[1:]]))
