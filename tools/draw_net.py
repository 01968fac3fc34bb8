#!/usr/bin/env python3
"""`caffejacinto draw_net` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["draw_net", *sys.argv[1:]]))
