"""What the digest of a stage knows of the files that its nets and its solver name: more than their paths.

A file of at most 64 MiB is known by its content, a larger one by size, time of its last change and samples. A database
is its data file, a list of HDF5 files those files too. What other lists name (pictures) is not looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.machinery import PathFinder
from typing import Any

# fields of layers that name files to be read, and not folders that other names are completed with
_FILES = ("source", "mean_file", "meanfile", "file_name", "label_map_file", "name_size_file", "image_list_path",
          "label_list_path", "image_list_path2", "video_file")  # fmt: skip
_MODULE = "module"  # of python_param
_LISTS = "hdf5_data_param"
_DATABASE = ("data.mdb",)
_WHOLE = 64 << 20
_SAMPLE, _SAMPLES = 4096, 64


def of_nets(nets: list[Any]) -> dict[str, str]:
    """path -> fingerprint, for the NetParameters' files that are there; Python layers' modules by their names."""
    found: dict[str, str] = {}
    for net in nets:
        for owner, field, value in _strings(net):
            if field == _MODULE:
                origin = _module_file(value)
                found[f"module {value}"] = of_file(origin) if origin else ""
            elif field in _FILES and value:
                found |= {path: of_file(path) for path in _parts(value, listed=owner == _LISTS)}
    return found


def of_file(path: str) -> str:
    """Of one file; "" where it is not there or cannot be read, which its reader will say better."""
    try:
        stat = os.stat(path)
        if not os.path.isfile(path):
            return ""
        return _content(path, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=256)
def _content(path: str, size: int, changed: int) -> str:
    hashed = hashlib.sha256(str(size).encode())
    with open(path, "rb") as f:
        if size <= _WHOLE:
            while block := f.read(1 << 20):
                hashed.update(block)
        else:
            hashed.update(str(changed).encode())
            for i in range(_SAMPLES):
                f.seek((size - _SAMPLE) * i // (_SAMPLES - 1))
                hashed.update(f.read(_SAMPLE))
    return hashed.hexdigest()


def _parts(path: str, *, listed: bool) -> Iterator[str]:
    """The files that hold what a path stands for."""
    if os.path.isdir(path):
        yield from (os.path.join(path, name) for name in _DATABASE)
        return
    yield path
    if listed and os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as f:
            yield from (line.strip() for line in f if line.strip())


def _strings(message: Any, owner: str = "") -> Iterator[tuple[str, str, str]]:
    """(name of the message's field, name of the string's field, value) of all strings in a message."""
    for spec, value in message.ListFields():
        values = [value] if hasattr(value, "ListFields") or isinstance(value, str) else value
        if spec.message_type is not None:
            for inner in values:
                yield from _strings(inner, spec.name)
        elif spec.type == spec.TYPE_STRING:
            yield from ((owner, spec.name, str(one)) for one in values)


def _module_file(name: str) -> str | None:
    """The file of a Python module, which is not imported."""
    places: Any = sys.path
    origin = None
    for part in name.split("."):
        try:
            spec = PathFinder.find_spec(part, places)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        origin, places = spec.origin, spec.submodule_search_locations
    return origin
