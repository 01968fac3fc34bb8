#!/usr/bin/env python3
"""`caffejacinto upgrade_net_proto_binary` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["upgrade_net_proto_binary", *sys.argv[1:]]))
