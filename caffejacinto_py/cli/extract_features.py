"""`caffejacinto extract_features`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError, near

if TYPE_CHECKING:
    import numpy as np

    from caffejacinto_py.engine.net import Net


@click.command()
@click.argument("weights", type=options.CommaList())
@click.argument("model", type=options.FILE)
@click.argument("blobs", type=options.CommaList(), metavar="BLOB,BLOB")
@click.argument("databases", type=options.CommaList(), metavar="DB,DB")
@click.argument("batches", type=click.IntRange(min=1))
@click.argument("backend", default="lmdb")
@click.argument("mode", default="CPU", type=click.Choice(["CPU", "GPU"], case_sensitive=False), metavar="CPU|GPU")
@click.argument("device", default=0, type=click.IntRange(min=0))
@options.state
@options.dialect
@options.workers
@options.threads
@options.python_layers
@options.log_level
def command(
    weights: tuple[str, ...], model: Path, blobs: tuple[str, ...], databases: tuple[str, ...], batches: int,
    backend: str, mode: str, device: int, **given: Any,
) -> int:  # fmt: skip
    """Write blobs of a net into LMDBs.

    The net runs in phase TEST over BATCHES batches of its own data. Each of the blobs goes into the database at the
    same place in the list: one float Datum per image, with the keys 0000000000, 0000000001 and so on. The databases
    must not exist yet; BACKEND can only be lmdb.
    """
    from caffejacinto_py.cli.running import prepare_run
    from caffejacinto_py.data.convert import check_backend

    check_backend(backend)
    if len(blobs) != len(databases):
        raise UsageError(f"{len(blobs)} blobs but {len(databases)} databases", hint="name one database for each blob")
    if len({Path(d).resolve() for d in databases}) < len(databases):
        raise UsageError("two blobs cannot go into one database")
    log = prepare_run(given)
    given["gpu"] = str(device) if mode == "GPU" else "-1"
    net = _open(model, weights, given, log)
    _check_blobs(net, blobs)
    count = _extract(net, blobs, databases, batches, given["workers"])
    for blob, database in zip(blobs, databases, strict=True):
        click.echo(f"Wrote {database}: {count} features of blob '{blob}'")
    return 0


def _open(model: Path, weights: Sequence[str], given: dict[str, Any], log: Any) -> Net:
    """The net with every blob kept (nothing in place), and its weights."""
    from caffejacinto_py.cli import devices
    from caffejacinto_py.data import probe
    from caffejacinto_py.engine.net import Net
    from caffejacinto_py.passes import prepare
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver.build import load_weights

    device = devices.pick(given["gpu"], log=log)
    doc = load_net(model)
    dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
    state: dict[str, Any] = {"phase": "TEST", "level": given["level"], "stages": given["stage"]}
    graph = prepare(doc, dialect=dialect, probe=probe, python_layers=given["python_layers"], **state)
    net = Net(graph, device=device, seed=0, inplace=False)
    load_weights([net], weights, tolerant=dialect.ignore_shape_mismatch)
    return net


def _check_blobs(net: Net, blobs: Sequence[str]) -> None:
    """Refuse blobs that the net does not have or that a Datum cannot hold."""
    shapes = {value.name: shape for value, shape in net.graph.shapes.items()}
    for blob in blobs:
        if blob not in shapes:
            raise UsageError(
                f"the net has no blob '{blob}' in phase TEST",
                hint=near(blob, shapes) or f"blobs: {', '.join(sorted(shapes)[:20])}",
            )
        if not 1 <= len(shapes[blob]) <= 4:
            raise UsageError(f"blob '{blob}' has {len(shapes[blob])} axes, and a Datum holds one image of 1 to 3 axes")


def _extract(net: Net, blobs: Sequence[str], databases: Sequence[str], batches: int, workers: int) -> int:
    """Run and write; returns the number of features of each blob. Nothing stays when it fails."""
    import torch

    from caffejacinto_py.data.convert import LmdbWriter
    from caffejacinto_py.schema.datum import make_datum
    from caffejacinto_py.solver.feed import Feed

    feed = Feed(net, seed=0, workers=workers)
    with ExitStack() as stack:
        writers = [stack.enter_context(LmdbWriter(path)) for path in databases]
        stack.callback(feed.close)
        for _ in range(batches):
            inputs = feed.next()
            held = {name: net.feed(name, inputs) for source in net.sources for name in source.tops}
            with torch.no_grad():
                for _ in net.run(held):
                    pass
            for blob, writer in zip(blobs, writers, strict=True):
                for image in images(held[blob]):
                    writer.put(b"%010d" % writer.count, make_datum(image))
        return writers[0].count


def images(blob: Any) -> np.ndarray:
    """N x C x H x W float32 of a blob of 1 to 4 axes."""
    array = blob.detach().float().cpu().contiguous().numpy()
    return array.reshape(array.shape + (1,) * (4 - array.ndim))
