#!/usr/bin/env python3
"""`caffejacinto extract_features` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["extract_features", *sys.argv[1:]]))
