#!/usr/bin/env python3
"""`caffejacinto digits` as a program."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["digits", *sys.argv[1:]]))
