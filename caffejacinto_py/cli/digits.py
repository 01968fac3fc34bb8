"""`caffejacinto digits`."""

from __future__ import annotations

import click


@click.command()
@click.argument("output_folder", default=".")
@click.option("--size", type=click.IntRange(8, 512), default=28, show_default=True, help="Pixels a side.")
@click.option("--test", type=click.IntRange(1, 1796), default=360, show_default=True, help="Images to test with.")
@click.option("--seed", default=0, show_default=True, help="Seed of the split into train and test.")
def command(output_folder: str, size: int, test: int, seed: int) -> int:
    """Make train and test LMDBs of scikit-learn's handwritten digits.

    OUTPUT_FOLDER gets digits_train_lmdb and digits_test_lmdb, which must not exist: 1,797 gray images in 10 classes,
    enlarged from 8x8. Needs the extra `demo`; nothing is downloaded.
    """
    from caffejacinto_py.data.datasets import make_digits

    make_digits(output_folder, size=size, test=test, seed=seed, report=lambda text: click.echo(text, err=True))
    return 0
