"""`caffejacinto convert_mnist_data`."""

from __future__ import annotations

import click


@click.command()
@click.argument("images")
@click.argument("labels")
@click.argument("out_db")
@click.option("--backend", default="lmdb", show_default=True, help="Database type; only lmdb is written.")
def command(images: str, labels: str, out_db: str, backend: str) -> int:
    """Make an LMDB from MNIST's idx files.

    IMAGES and LABELS may be gzipped. OUT_DB is the LMDB directory to create; it must not exist.
    """
    from caffejacinto_py.data.convert import check_backend
    from caffejacinto_py.data.datasets import convert_mnist

    check_backend(backend)
    convert_mnist(images, labels, out_db, report=lambda text: click.echo(text, err=True))
    return 0
