"""Fuzz what reads files: the property tests of tests/schema and tests/data with a new seed each time.

    python bench/fuzz.py --what text --seconds 600
    python bench/fuzz.py --what wire --seconds 600
    python bench/fuzz.py --what lmdb --seconds 600

Each round is a fresh process with bounded memory and time. A failure ends the run and shows the seed that repeats it.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

TESTS = {
    "text": ["tests/schema/test_text.py", "-k", "any_text or hypothesis or fuzz or scan"],
    "wire": ["tests/schema/test_weights_fuzz.py"],
    "lmdb": ["tests/data/test_lmdb_check.py", "-k", "random"],
}
MEMORY = 6 << 30  # address space of a round, bytes
LIMIT = 300  # seconds for a round


def bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=sorted(TESTS), required=True)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1, help="the first seed")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    began, rounds, tests = time.monotonic(), 0, 0
    seed = options.seed
    while time.monotonic() - began < options.seconds:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *TESTS[options.what]], cwd=root, env=env, capture_output=True, text=True, timeout=LIMIT,
            preexec_fn=bounded,
        )  # fmt: skip
        passed = re.search(r"(\d+) passed", done.stdout)
        if done.returncode or not passed:
            print(done.stdout[-4000:], done.stderr[-1000:], f"seed {seed} fails", sep="\n")
            return 1
        rounds, tests, seed = rounds + 1, tests + int(passed.group(1)), seed + 1
    print(f"{options.what}: {rounds} rounds, {tests} property tests passed in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
