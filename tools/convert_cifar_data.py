#!/usr/bin/env python3
"""`caffejacinto convert_cifar_data` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["convert_cifar_data", *sys.argv[1:]]))
