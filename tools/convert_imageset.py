#!/usr/bin/env python3
"""`caffejacinto convert_imageset` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["convert_imageset", *sys.argv[1:]]))
