"""`caffejacinto parse_log`."""

from __future__ import annotations

from pathlib import Path

import click

from caffejacinto_py.cli import options
from caffejacinto_py.errors import UsageError


@click.command()
@click.argument("log", type=options.FILE)
@click.argument("outdir", type=options.FILE)
@click.option("--delimiter", default=",", show_default=True, help="Between columns; one character, or 'tab'.")
@click.option("--verbose", is_flag=True, help="Print the last row of each table.")
def command(log: Path, outdir: Path, delimiter: str, verbose: bool) -> int:
    """Make tables (CSV) of a training log.

    LOG is what `train` printed, of this program or of any Caffe, or a metrics.jsonl. OUTDIR, which is made if needed,
    gets LOG.train and LOG.test with the columns NumIters, Seconds, LearningRate and one for each output of the net;
    what a row does not have is nan.
    """
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.solver.readlog import read_log, table, write_csv

    sign = "\t" if delimiter in ("tab", "\\t") else delimiter
    if len(sign) != 1 or sign in '"\r\n':
        raise UsageError(f"--delimiter '{delimiter}': give one character, or 'tab'")
    rows = read_log(log)
    outdir.mkdir(parents=True, exist_ok=True)
    for kind in ("train", "test"):
        names, body = table(rows, kind)
        target = outdir / f"{log.name}.{kind}"
        with atomic_write(target, "w") as file:
            write_csv(file, names, body, delimiter=sign)
        click.echo(f"Wrote {target}: {len(body)} rows")
        if verbose and body:
            click.echo("  " + ", ".join(f"{name} {value:g}" for name, value in zip(names, body[-1], strict=True)))
    return 0
