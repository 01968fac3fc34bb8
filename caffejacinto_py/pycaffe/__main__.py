"""`python -m caffejacinto_py.pycaffe script.py args...`: run a script that says `import caffe`."""

from __future__ import annotations

import os
import runpy
import sys

from caffejacinto_py.errors import UsageError, render


def main(argv: list[str]) -> int:
    """Run the script as Python would: its folder is first on the path, its arguments are sys.argv. Returns 2 without a
    script.
    """
    from caffejacinto_py.pycaffe import install_as_caffe

    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, file=sys.stderr)
        return 2
    if not os.path.isfile(argv[0]):
        print(render(UsageError(f"there is no script '{argv[0]}'")), file=sys.stderr)
        return 2
    install_as_caffe()
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
