#!/usr/bin/env python3
"""`caffejacinto classify` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["classify", *sys.argv[1:]]))
