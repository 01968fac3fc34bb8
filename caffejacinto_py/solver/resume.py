"""Snapshots and restoring of a solver: what goes into the files, and how a run goes on from them."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from caffejacinto_py.engine.net import Net
from caffejacinto_py.engine.ranks import Ranks
from caffejacinto_py.errors import CaffeError, WeightsError
from caffejacinto_py.schema.dialect import Dialect
from caffejacinto_py.schema.files import check_writable
from caffejacinto_py.schema.state import SolverStateFile, read_state
from caffejacinto_py.schema.weights import read_model
from caffejacinto_py.solver import snapshot as files
from caffejacinto_py.solver import together
from caffejacinto_py.solver.snapshot import Extra

if TYPE_CHECKING:
    from caffejacinto_py.solver.feed import Feed
    from caffejacinto_py.solver.lr import Where
    from caffejacinto_py.solver.metrics import Metrics
    from caffejacinto_py.solver.progress import Clock, Losses
    from caffejacinto_py.solver.rules import Rule
    from caffejacinto_py.solver.scaling import Scaling
    from caffejacinto_py.solver.sparse import Sparse

log = logging.getLogger(__name__)


class Resumable:
    """The half of `Solver` that saves and restores."""

    param: Any
    net: Net
    test_nets: list[Net]
    feed: Feed
    test_feeds: list[Feed]
    rule: Rule
    scaling: Scaling
    sparse: Sparse
    iter: int
    current_step: int
    seed: int
    device: torch.device
    ranks: Ranks
    dialect: Dialect
    where: Where
    losses: Losses
    clock: Clock
    metrics: Metrics
    _restored = False  # the loss window came from a side file: the next step keeps it

    # --- saving ------------------------------------------------------------------------------------------------------
    def check_snapshots(self) -> None:
        """Make sure that snapshots can be written, before hours of training; creates a missing folder."""
        if not self.param.snapshot_prefix:
            hint = 'add: snapshot_prefix: "folder/name"'
            text = "snapshots are asked for, but snapshot_prefix is not set"
            raise CaffeError(text, loc=self.where("snapshot"), hint=hint)
        folder = os.path.dirname(self.param.snapshot_prefix)
        try:
            if folder and not os.path.exists(folder):
                os.makedirs(folder, exist_ok=True)  # another rank may be doing the same
                log.info("Created %s", folder)
            check_writable(folder)
        except OSError as e:
            raise CaffeError(
                f"snapshot_prefix: cannot create '{folder}': {e.strerror}",
                loc=self.where("snapshot_prefix"),
                hint="name a folder that you may write to",
            ) from e
        except CaffeError as e:
            raise CaffeError(f"snapshot_prefix: {e.text}", loc=self.where("snapshot_prefix"), hint=e.hint) from e

    def snapshot(self) -> tuple[str, str]:
        """Rank 0 writes weights, solver state and side file; returns the paths of the first two. CaffeError: disk
        full, ..."""
        hdf5 = self.param.snapshot_format == self.param.HDF5
        paths = files.paths(self.param.snapshot_prefix, self.iter, hdf5=hdf5)
        together.check_weights(self.ranks, self.net)
        if not self.ranks.first:
            return paths.model, paths.state
        running = self.clock.running
        self.clock.stop()
        kind = "HDF5 file" if hdf5 else "binary proto file"
        log.info("Snapshotting to %s %s", kind, paths.model)
        state = SolverStateFile(self.iter, paths.model, self.current_step, self.rule.blobs())
        model = self.net.model(diffs=self.param.snapshot_diff, lazy=True)
        model.dialect = self.dialect.name
        files.save(paths, model, state, self._extra(), hdf5=hdf5, diffs=self.param.snapshot_diff)
        log.info("Snapshotting solver state to %s %s", kind, paths.state)
        self.metrics.record("snapshot", self.iter, {"model": paths.model, "state": paths.state})
        if running:
            self.clock.start()
        return paths.model, paths.state

    def _snapshot_due(self, iteration: int) -> bool:
        return bool(self.param.snapshot) and iteration % self.param.snapshot == 0

    def _extra(self) -> Extra:
        kind, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
        meta = {
            "iter": self.iter,
            "solver": self.param.type,
            "seed": self.seed,
            "train": self.feed.positions(),
            "tests": [feed.positions() for feed in self.test_feeds],
            "steps": [feed.steps() for feed in (self.feed, *self.test_feeds)],
            "losses": self.losses.values(),
            "scaling": self.scaling.state(),
            "numpy": [kind, int(at), int(has_gauss), float(gauss)],
        }
        arrays = {"rng/torch": torch.get_rng_state().numpy(), "rng/numpy": np.asarray(keys)}
        if self.device.type == "cuda":
            arrays["rng/cuda"] = torch.cuda.get_rng_state(self.device).numpy()
        for name, buffer in self.net.named_buffers():
            arrays[_key(name)] = buffer.detach().cpu().numpy()
        for i, net in enumerate([self.net, *self.test_nets]):
            if net.hook is not None:
                arrays |= {f"hook/{i}/{name}": array for name, array in net.hook.state().items()}
        numbers, masks = self.sparse.state()
        return Extra({**meta, **numbers}, {**arrays, **masks})

    # --- restoring ---------------------------------------------------------------------------------------------------
    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from a solver state, ours or C++ Caffe's.

        With its side file the run continues bit for bit. Without one as in Caffe: weights, history, iteration and step,
        while data start at the first record. Nothing is changed when WeightsError is raised.
        """
        path = os.fspath(path)
        log.info("Restoring previous solver status from %s", path)
        state = read_state(path)
        extra = self._side_file(path)
        model = read_model(files.find_model(path, state.learned_net)) if state.learned_net else None
        self.rule.check(state.history, path=path)
        if model is not None:
            self.net.load(model, ignore_shape_mismatch=False)
        self.rule.load(state.history, path=path)
        self.iter, self.current_step = state.iter, state.current_step
        self.metrics.append = True
        if extra is None:
            self._restored = False
            self.sparse.replay(self.iter)
            self.feed.rewind()
            for feed in self.test_feeds:
                feed.rewind()
        else:
            self._restore_extra(extra)
        self.metrics.record("resume", self.iter, {"state": path})

    def _side_file(self, path: str) -> Extra | None:
        if not os.path.exists(path + ".extra"):
            log.info("%s.extra is not there: data start at the first record, as in Caffe", path)
            return None
        try:
            return files.load_extra(path)
        except WeightsError as e:
            log.warning("%s; going on without it: data start at the first record, as in Caffe", e)
            return None

    def _restore_extra(self, extra: Extra) -> None:
        meta, arrays = extra.meta, extra.arrays
        try:
            seed, tests = int(meta["seed"]), meta["tests"]
            self.sparse.restore(meta, arrays)
            self.scaling.restore(meta.get("scaling"))
            self._restore_random(meta, arrays)
            steps = meta.get("steps", [{}] * (1 + len(tests)))
            for feed, saved, then in zip([self.feed, *self.test_feeds], [meta["train"], *tests], steps):
                feed.seed = seed
                feed.rewind(together.positions(saved, then, feed.steps()))
            self._restore_hooks(arrays)
            self.losses.reset([float(v) for v in meta["losses"]])
            with torch.no_grad():
                for name, buffer in self.net.named_buffers():
                    buffer.copy_(torch.from_numpy(arrays[_key(name)]))
        except (KeyError, TypeError, ValueError, RuntimeError) as e:
            raise CaffeError(f"the side file of this state does not fit this net: {e}") from e
        if self.param.random_seed >= 0 and self.param.random_seed != seed:
            log.warning("random_seed of the solver is ignored: this run goes on with %d", seed)
        if len(tests) != len(self.test_feeds):
            log.warning("the state is of a run with %d test nets, this one has %d", len(tests), len(self.test_feeds))
        self.seed = seed
        self._restored = True

    def _restore_hooks(self, arrays: dict[str, np.ndarray]) -> None:
        for i, net in enumerate([self.net, *self.test_nets]):
            found = {k.removeprefix(f"hook/{i}/"): a for k, a in arrays.items() if k.startswith(f"hook/{i}/")}
            if net.hook is not None and found:
                net.hook.load_state(found)
            elif net.hook is not None and net.hook.state():
                log.warning("the state has no ranges for net %d: they are found anew", i)

    def _restore_random(self, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        torch.set_rng_state(torch.from_numpy(arrays["rng/torch"].copy()))
        kind, at, has_gauss, gauss = meta["numpy"]
        np.random.set_state((kind, arrays["rng/numpy"], at, has_gauss, gauss))
        if self.device.type == "cuda":
            if "rng/cuda" in arrays:
                torch.cuda.set_rng_state(torch.from_numpy(arrays["rng/cuda"].copy()), self.device)
            else:
                log.warning("the state was written on a CPU: random layers draw anew on this GPU")

    def _start_window(self) -> None:
        """Caffe forgets the losses of earlier calls of Step; a restored window belongs to this run and stays."""
        if not self._restored:
            self.losses.reset()
        self._restored = False


def _key(buffer: str) -> str:
    """The name of a buffer in a side file, without the wrappers that engine/precision.py puts around modules: a run in
    float16 can go on in float32."""
    return f"buffer/{buffer.replace('.inner.', '.')}"
