"""`caffejacinto compute_image_mean`."""

from __future__ import annotations

import click


@click.command()
@click.argument("input_db")
@click.argument("output_file", required=False)
@click.option("--backend", default="lmdb", show_default=True, help="Database type; only lmdb is read.")
def command(input_db: str, output_file: str | None, backend: str) -> int:
    """Compute the mean image of an LMDB.

    OUTPUT_FILE gets the mean image as .binaryproto, for transform_param { mean_file }. The mean of each channel is
    printed, for mean_value.
    """
    from caffejacinto_py.data.convert import check_backend
    from caffejacinto_py.data.datasets import compute_image_mean

    check_backend(backend)
    mean = compute_image_mean(input_db, output_file, report=lambda text: click.echo(text, err=True))
    click.echo(f"Number of channels: {len(mean)}")
    for i, value in enumerate(mean.reshape(len(mean), -1).mean(1, dtype="float64")):
        click.echo(f"mean_value channel [{i}]: {value:.6g}")
    return 0
