#!/usr/bin/env python3
"""`caffejacinto upgrade_solver_proto_text` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["upgrade_solver_proto_text", *sys.argv[1:]]))
