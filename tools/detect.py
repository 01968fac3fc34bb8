#!/usr/bin/env python3
"""`caffejacinto detect` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["detect", *sys.argv[1:]]))
