"""`caffejacinto convert_imageset`."""

from __future__ import annotations

import click


@click.command()
@click.argument("rootfolder")
@click.argument("listfile")
@click.argument("db_name")
@click.option("--gray", is_flag=True, help="Treat images as grayscale.")
@click.option("--shuffle", is_flag=True, help="Shuffle the list.")
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffle.")
@click.option("--backend", default="lmdb", show_default=True, help="Database type; only lmdb is written.")
@click.option("--resize-width", type=click.IntRange(min=0), default=0, help="Resize to this width; 0: as it is.")
@click.option("--resize-height", type=click.IntRange(min=0), default=0, help="Resize to this height; 0: as it is.")
@click.option("--check-size", is_flag=True, help="Fail when an image has another size than the first.")
@click.option("--encoded", is_flag=True, help="Store the compressed image instead of its pixels.")
@click.option("--encode-type", default="", help="Compression to store: jpg, png, ...; default: the file's own.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out missing and damaged images instead of failing.")
def command(
    rootfolder: str,
    listfile: str,
    db_name: str,
    gray: bool,
    shuffle: bool,
    seed: int,
    backend: str,
    resize_width: int,
    resize_height: int,
    check_size: bool,
    encoded: bool,
    encode_type: str,
    skip_unreadable: bool,
) -> int:
    """Make an LMDB from a list of images.

    LISTFILE has a line `path label` per image; ROOTFOLDER is put in front of each path as it is, so end it with '/'.
    DB_NAME is the LMDB directory to create; it must not exist.
    """
    from caffejacinto_py.data.convert import check_backend
    from caffejacinto_py.data.imageset import ImageOptions, convert_imageset

    check_backend(backend)
    convert_imageset(
        rootfolder,
        listfile,
        db_name,
        options=ImageOptions(gray, resize_height, resize_width, check_size, encoded, encode_type),
        shuffle=shuffle,
        seed=seed,
        skip_unreadable=skip_unreadable,
        report=lambda text: click.echo(text, err=True),
    )
    return 0
