#!/usr/bin/env python3
"""`caffejacinto compute_image_mean` under its old name."""

import sys

from caffejacinto_py.cli import main

sys.exit(main(["compute_image_mean", *sys.argv[1:]]))
