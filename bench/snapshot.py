"""What a snapshot takes while it is written: memory beyond the net and its history, and time.

Weights and history of a net of models/ (random numbers; nothing is trained), written blob by blob, as a solver does,
and for comparison from copies of everything. Each line is a process of its own; its memory is what the system counts as
the process's own (RssAnon of /proc, looked at every 2 ms), at most during the snapshot, less what it was before. The
files of both ways must be equal. Linux only.

    python bench/snapshot.py [--net caffenet] [--rule SGD] [--types float32,bfloat16,int8] [--format binaryproto,hdf5]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MODELS = Path(__file__).resolve().parents[1] / "models"
WAYS = ("copies", "blob by blob")


class Watch(threading.Thread):
    """The most bytes of the process's own memory while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = own_bytes()
        self.going = True

    def run(self) -> None:
        while self.going:
            self.most = max(self.most, own_bytes())
            time.sleep(0.002)

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.join()


def own_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))


def one(args: argparse.Namespace) -> dict[str, Any]:
    """One snapshot in this process."""
    from caffejacinto_py.engine import allocator

    allocator.tune()
    import torch

    from caffejacinto_py.checking import fit
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes.memory import with_batch
    from caffejacinto_py.schema import pb
    from caffejacinto_py.schema.state import SolverStateFile, write_state
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.schema.weights import write_model
    from caffejacinto_py.solver import rules

    torch.set_num_threads(1)
    torch.manual_seed(0)
    graph = with_batch(fit(load_net(MODELS / args.net / "train_val.prototxt"), phase="TRAIN")[0], 1)
    net = Net(graph, seed=0)
    rule = rules.make(net.learnable, pb.SolverParameter(type=args.rule, momentum=0.9, history_type=args.types))
    for blob in net.learnable:
        blob.param.grad = torch.randn_like(blob.param)
    rule.step(rules.Rates(1e-4, 0.9 if args.rule not in ("AdaGrad", "RMSProp") else 0.0, 0.0, 0))
    for blob in net.learnable:
        blob.param.grad = None
    ctypes.CDLL(None).malloc_trim(0)  # what is free in the heap would not be seen when it is used again
    largest = max(b.param.nbytes for b in net.learnable)
    files = [Path(args.folder) / name for name in ("model", "state")]
    began = time.perf_counter()
    with Watch() as seen:
        if args.way == WAYS[0]:
            model, history = net.model(), rule.export()
        else:
            model, history = net.model(lazy=True), rule.blobs()
        write_model(files[0], model, format=args.format)
        write_state(files[1], SolverStateFile(1, "net", 0, list(history)), format=args.format)
    seconds = time.perf_counter() - began
    sums = [hashlib.sha1(path.read_bytes()).hexdigest() for path in files]
    size = sum(path.stat().st_size for path in files)
    return {"extra": seen.most - seen.before, "s": seconds, "sums": sums, "size": size, "largest": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="caffenet")
    parser.add_argument("--rule", default="SGD")
    parser.add_argument("--types", default="float32,bfloat16,int8")
    parser.add_argument("--format", default="binaryproto,hdf5")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one(args)))
        return
    print(f"{args.net}, {args.rule}; MiB\nhistory   format       way            extra  largest blob  files  seconds")
    for kind in args.types.split(","):
        for form in args.format.split(","):
            sums = []
            for way in WAYS:
                with tempfile.TemporaryDirectory() as folder:
                    own = [f"--net={args.net}", f"--rule={args.rule}", f"--types={kind}", f"--format={form}"]
                    command = [sys.executable, __file__, *own, f"--way={way}", f"--folder={folder}"]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found = json.loads(out.splitlines()[-1])
                sums.append(found["sums"])
                extra, largest, size = (found[k] / 2**20 for k in ("extra", "largest", "size"))
                print(
                    f"{kind:8}  {form:11}  {way:12}  {extra:6.1f}  {largest:12.1f}  {size:5.0f}  {found['s']:7.2f}",
                    flush=True,
                )
            if sums[0] != sums[1]:
                sys.exit("the files differ")
    print("files of both ways are equal")


if __name__ == "__main__":
    main()
