"""`caffejacinto teacher_dump`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.solver.feed import Feed
    from caffejacinto_py.solver.teacher_net import Part


@click.command()
@click.option("--model", required=True, type=options.FILE, help="The teacher, a prototxt.")
@click.option("--weights", required=True, type=options.CommaList(), help="Its weights, comma-separated files.")
@click.option("--blobs", required=True, type=options.CommaList(), metavar="A,B", help="Blobs to write, such as scores.")
@click.option("--output", required=True, type=options.CommaList(), metavar="DB,DB", help="A new LMDB for each blob.")
@click.option("--data", type=options.FILE, metavar="NET",
              help="The student: its data layers of phase TRAIN feed the teacher, by blob name. Default: the teacher's "
              "own data layers, of phase TEST.")  # fmt: skip
@click.option("--iterations", type=click.IntRange(min=1), help="Batches. Default: every record of the data once.")
@options.gpu
@options.state
@options.dialect
@options.workers
@options.threads
@options.log_level
def command(
    model: Path, weights: tuple[str, ...], blobs: tuple[str, ...], output: tuple[str, ...], data: Path | None,
    iterations: int | None, **given: Any,
) -> int:  # fmt: skip
    """Write what a teacher makes of its data into LMDBs: a student then learns without it.

    One float Datum for each record of the data, in their order, none twice, with the keys 0000000000, 0000000001 and so
    on. A Data layer of the student reads them beside the images; both wrap around together. Data that are shuffled are
    refused. --level and --stage are of the net that has the data. See docs/distillation.md.
    """
    from caffejacinto_py.cli.running import prepare_run

    if len(blobs) != len(output):
        raise UsageError(f"{len(blobs)} blobs but {len(output)} databases", hint="name one database for each blob")
    if len({Path(o).resolve() for o in output}) < len(output):
        raise UsageError("two blobs cannot go into one database")
    log = prepare_run(given)
    part, feed, count = _open(model, weights, blobs, data, given, log)
    batch = feed.batch
    most = min(n for n in (count, iterations and iterations * batch) if n) if count or iterations else 0
    if not most:
        raise UsageError("these data have no end", hint="say how many batches to write: --iterations N")
    _write(part, feed, blobs, output, most)
    for blob, path in zip(blobs, output, strict=True):
        click.echo(f"Wrote {path}: {most} records of blob '{blob}', {part.shapes[blob][1:]} each")
    return 0


def _open(
    model: Path, weights: Sequence[str], blobs: Sequence[str], data: Path | None, given: dict[str, Any], log: Any
) -> tuple[Part, Feed, int | None]:
    """The teacher, what feeds it, and the number of records; None: endless."""
    import torch

    from caffejacinto_py.cli import devices
    from caffejacinto_py.data.make import disorder, records
    from caffejacinto_py.schema import pb
    from caffejacinto_py.schema.dialect import resolve_dialect
    from caffejacinto_py.schema.upgrade import load_net
    from caffejacinto_py.solver.nets import NetSource
    from caffejacinto_py.solver.teacher import data_feed
    from caffejacinto_py.solver.teacher_net import Part, Spec, inputs

    device = torch.device(devices.pick(given["gpu"], log=log))
    doc = load_net(model)
    dialect = resolve_dialect(doc.message, None, given["dialect"], compat=given["compat"])
    own = dialect
    message = pb.TeacherSpec(net=str(model), weights=list(weights), level=given["level"], stage=given["stage"])
    if data is not None:
        student = load_net(data)
        message.level, own = 0, resolve_dialect(student.message, None, given["dialect"], compat=given["compat"])
        del message.stage[:]
    source = NetSource(student if data is not None else doc, str(data or model), given["level"], given["stage"])
    phase = "TRAIN" if data is not None else "TEST"
    spec = Spec(message, doc, dialect, lambda *_: None)
    for blob in blobs:
        spec.check(blob, None)
    names = inputs(spec, blobs)
    feed, shapes = data_feed(source, phase, names, dialect=own, device=device, workers=given["workers"])
    part = Part(spec, blobs, shapes, device=device)
    for blob, shape in part.shapes.items():
        if not 1 <= len(shape) <= 4:
            raise UsageError(f"blob '{blob}' has {len(shape)} axes, and a Datum holds one record of 1 to 3 axes")
    for layer in (s.layer for s in feed.sources):
        wrong, line = disorder(layer)
        if wrong:
            raise UsageError(
                f"layer '{layer.name}': {wrong}", hint="a student reads records in the order of their keys"
            )
        if line:
            log.warning("layer '%s': %s", layer.name, line)
    counts = [n for n in (records(s.layer) for s in feed.sources) if n]
    return part, feed, min(counts) if counts else None


def _write(part: Part, feed: Feed, blobs: Sequence[str], output: Sequence[str], most: int) -> None:
    """Run and write `most` records of each blob. Nothing stays when it fails."""
    from caffejacinto_py.cli.extract_features import images
    from caffejacinto_py.data.convert import LmdbWriter
    from caffejacinto_py.schema.datum import make_datum

    with ExitStack() as stack:
        writers = [stack.enter_context(LmdbWriter(path)) for path in output]
        stack.callback(feed.close)
        while writers[0].count < most:
            found = part(feed.next())
            left = most - writers[0].count
            for blob, writer in zip(blobs, writers, strict=True):
                for image in images(found[blob])[:left]:
                    writer.put(b"%010d" % writer.count, make_datum(image))
