"""One rank of tests/solver/test_ranks.py: runs every scenario with the other rank and writes what it found.

`python -m tests.solver.ranks_worker FOLDER`, with RANK, WORLD_SIZE and a rendezvous in the environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caffejacinto_py.engine.ranks import Ranks, environment, join
from caffejacinto_py.errors import CaffeError
from caffejacinto_py.solver import Solver
from caffejacinto_py.solver.loop import Callbacks
from tests.solver.helpers import make_files, make_solver, params

TRAIN = "display: 1\ntest_iter: 3\ntest_interval: 4\nmax_iter: 8\naverage_loss: 1"
VARIANTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # name: (solver fields, options of Solver, layers of the net that are left out)
    "plain": ("", {"dialect": "nvcaffe"}, ("bn", "drop")),
    "iter_size": ("iter_size: 2\nclip_gradients: 0.5", {"dialect": "nvcaffe"}, ("bn", "drop")),
    "sync_bn": ("", {"dialect": "nvcaffe", "sync_bn": True}, ("drop",)),
    "bn": ("", {"dialect": "nvcaffe"}, ("drop",)),
    "sparse": (
        "sparse_mode: SPARSE_UPDATE\nsparsity_target: 0.6\nsparsity_start_iter: 1\nsparsity_step_iter: 2\n"
        "sparsity_start_factor: 0.2\nsparsity_step_factor: 0.2\nsparsity_threshold_maxratio: 10\n"
        "sparsity_threshold_value_max: 10",
        {"dialect": "nvcaffe"},
        ("bn", "drop", "+wide"),
    ),
    "quantized": ("", {"dialect": "nvcaffe"}, ("bn", "drop", "+quantize")),
    "dropout": ("", {"dialect": "nvcaffe"}, ("bn",)),
    "adam": ('type: "Adam"\nbase_lr: 0.001', {"dialect": "nvcaffe"}, ("bn", "drop")),
}


def solver(folder: Path, name: str, ranks: Ranks | None, more: str = "") -> Solver:
    """A solver of a variant in its own folder (which exists, with its net)."""
    fields, options, _ = VARIANTS[name]
    given = {**options, "ranks": ranks} if ranks is not None else options
    lines = [line for line in f"{TRAIN}\n{fields}\n{more}".splitlines() if line]
    last = {line.split(":")[0]: line for line in lines}  # later ones replace earlier ones
    return make_solver(folder / name, "\n".join(last.values()), **given)


def prepare(folder: Path) -> None:
    """Nets and data of all variants, for both sides of the comparison."""
    for name, (_, _, without) in VARIANTS.items():
        (folder / name).mkdir()
        make_files(folder / name)
        net = (folder / name / "net.prototxt").read_text()
        kept = [line for line in net.splitlines() if not any(line.startswith(f'layer {{ name: "{w}"') for w in without)]
        text = "\n".join(kept)
        if "bn" in without:
            text = text.replace('bottom: "bn" top: "bn"', 'bottom: "conv" top: "conv"').replace('"bn"', '"conv"')
        if "+quantize" in without:
            text = "quantize: true\nnet_quantization_param { quantization_start: 2 }\n" + text
        if "+wide" in without:
            text = text.replace("num_output: 6 ", "num_output: 32 ")
        (folder / name / "net.prototxt").write_text(text)


def facts(run: Solver) -> dict[str, np.ndarray]:
    """What the two sides are compared by."""
    found = params(run)
    found |= {f"loss/{i}": np.array(v) for i, v in enumerate(run.seen)}  # type: ignore[attr-defined]
    if run.sparse.masks is not None:
        found |= {f"mask/{i}": m.numpy() for i, m in enumerate(run.sparse.masks)}
    if run.net.hook is not None:
        found |= {f"hook/{k}": v for k, v in run.net.hook.state().items()}
        found |= {f"testhook/{k}": v for k, v in run.test_nets[0].hook.state().items()}  # type: ignore[union-attr]
    return found


def train(run: Solver, n: int) -> None:
    """Iterations, with the loss of each and the numbers of the tests noted."""
    run.seen = getattr(run, "seen", [])  # type: ignore[attr-defined]
    record = run.metrics.record

    def note(event: str, iteration: int, values: Any) -> None:
        if event in ("train", "test"):
            run.seen.append([v for k, v in sorted(values.items()) if k in ("loss", "accuracy")])  # type: ignore[attr-defined]
        record(event, iteration, values)

    run.metrics.record = note  # type: ignore[method-assign]
    run.step(n)
    run.metrics.record = record  # type: ignore[method-assign]


def variants(folder: Path, out: Path, ranks: Ranks) -> None:
    for name in VARIANTS:
        run = solver(folder, name, ranks)
        train(run, 8)
        np.savez(out / f"{name}.{ranks.rank}.npz", **facts(run))
        run.close()


def resume(folder: Path, out: Path, ranks: Ranks) -> None:
    """A snapshot of two ranks, and going on from one of a single rank."""
    run = solver(folder, "plain", ranks, f'snapshot_prefix: "{out}/two"')
    train(run, 4)
    run.snapshot()
    run.close()
    again = solver(folder, "plain", ranks)
    again.restore(out / "one_iter_4.solverstate")
    train(again, 4)
    np.savez(out / f"resumed.{ranks.rank}.npz", **params(again))
    again.close()


def stop(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """A signal that reached rank 1 only."""
    run = solver(folder, "plain", ranks, f'snapshot_prefix: "{out}/stop"\nmax_iter: 50\nsnapshot_after_train: true')
    if ranks.rank == 1:
        run.callbacks.append(Callbacks(lambda: run.signals.request("stop") if run.iter == 3 else None, lambda: None))
    run.solve()
    return {"iter": run.iter, "stopped": run.stopped}


def bad_loss(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """A loss that is no number on rank 1 only."""
    run = solver(folder, "plain", ranks)
    if ranks.rank == 1:
        draw = run.feed.next

        def spoilt() -> dict[str, torch.Tensor]:
            batch = draw()
            batch["data"][0] = float("nan")
            return batch

        run.feed.next = spoilt  # type: ignore[method-assign]
    try:
        run.step(5)
    except CaffeError as e:
        return {"error": str(e), "iter": run.iter}
    finally:
        run.close()
    return {}


def refused(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Ranks that do not train the same."""
    other = "base_lr: 0.2" if ranks.rank else "base_lr: 0.1"
    try:
        solver(folder, "plain", ranks, other)
    except CaffeError as e:
        return {"error": str(e), "kind": type(e).__name__}
    return {}


def other_options(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Ranks with the same files and other options."""
    options = {"precision": "fp64", "sync_bn": True} if ranks.rank else {}
    try:
        make_solver(folder / "plain", TRAIN, ranks=ranks, **options)
    except CaffeError as e:
        return {"error": str(e), "kind": type(e).__name__}
    return {}


def left(folder: Path, out: Path, ranks: Ranks) -> dict[str, Any]:
    """Weights that have become different are noticed at a snapshot."""
    run = solver(folder, "plain", ranks, f'snapshot_prefix: "{out}/left"')
    run.step(2)
    if ranks.rank:
        with torch.no_grad():
            run.net.learnable[0].param[0] += 1e-6
    try:
        run.snapshot()
    except CaffeError as e:
        return {"error": str(e)}
    finally:
        run.close()
    return {}


SCENARIOS: tuple[Callable[..., Any], ...] = (variants, resume, stop, bad_loss, refused, other_options, left)


def main(folder: Path) -> None:
    around = environment()
    assert around is not None
    ranks = join(around[0], around[1], timeout=180)
    out = folder / "out"
    found = {s.__name__: s(folder, out, ranks) for s in SCENARIOS}
    (out / f"found.{ranks.rank}.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
