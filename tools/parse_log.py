#!/usr/bin/env python3
"""`caffejacinto parse_log` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["parse_log", *sys.argv[1:]]))
