#!/usr/bin/env python3
"""`caffejacinto convert_mnist_data` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["convert_mnist_data", *sys.argv[1:]]))
