"""Ways to spoil a working folder: texts edited, files cut and flipped, LMDB records changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import lmdb
import numpy as np

from caffejacinto_py.schema import pb

Change = Callable[[Path], object]
SIZE = 10  # pixels a side


def edit(name: str, old: str, new: str) -> Change:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return change


def net(old: str, new: str) -> Change:
    return edit("net.prototxt", old, new)


def cut(name: str, keep: float = 0.5) -> Change:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def flip(name: str, at: int) -> Change:
    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 0x80
        (folder / name).write_bytes(data)

    return change


def put(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def record(ordinal: int, change: Callable[[bytes], bytes]) -> Change:
    def change_db(folder: Path) -> None:
        env = lmdb.open(str(folder / "db"), map_size=1 << 24)
        with env.begin(write=True) as txn:
            key = f"{ordinal:08d}".encode()
            txn.put(key, change(bytes(txn.get(key))))
        env.close()

    return change_db


def datum(**fields: object) -> Callable[[bytes], bytes]:
    def change(value: bytes) -> bytes:
        found = pb.Datum.FromString(value)
        for name, new in fields.items():
            setattr(found, name, new)
        return found.SerializeToString()

    return change


def jpeg(spoil: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    data = cv2.imencode(".jpg", np.full((SIZE, SIZE), 90, np.uint8))[1].tobytes()
    return datum(encoded=True, data=spoil(data))


def without_db(then: Change = lambda folder: None) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / "db")
        then(folder)

    return change


def empty_db(folder: Path) -> None:
    lmdb.open(str(folder / "db")).close()


def into(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).mkdir()
        for file in ("net.prototxt", "solver.prototxt", "db"):
            (folder / file).rename(folder / name / file)

    return change
