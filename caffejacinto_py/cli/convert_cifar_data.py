"""`caffejacinto convert_cifar_data`."""

from __future__ import annotations

import click


@click.command()
@click.argument("input_folder")
@click.argument("output_folder")
@click.argument("db_type", default="lmdb")
def command(input_folder: str, output_folder: str, db_type: str) -> int:
    """Make LMDBs from CIFAR-10's binary batches.

    INPUT_FOLDER holds data_batch_1.bin to data_batch_5.bin and test_batch.bin. OUTPUT_FOLDER gets cifar10_train_lmdb
    and cifar10_test_lmdb, which must not exist. DB_TYPE: lmdb.
    """
    from caffejacinto_py.data.convert import check_backend
    from caffejacinto_py.data.datasets import convert_cifar

    check_backend(db_type)
    convert_cifar(input_folder, output_folder, report=lambda text: click.echo(text, err=True))
    return 0
