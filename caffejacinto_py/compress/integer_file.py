"""Integer programs as files: NAME.json and NAME.npz (docs/integer.md)."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from caffejacinto_py.compress.integer_run import Program
from caffejacinto_py.schema.files import atomic_write


def paths_of(output: str | Path) -> tuple[Path, Path]:
    """The two files of a program: (NAME.json, NAME.npz). output: DIR/NAME, or one of the two."""
    output = Path(output)
    stem = output.with_suffix("") if output.suffix in (".json", ".npz") else output
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".npz")


def write_program(program: Program, output: str | Path, *, extra: dict[str, Any] | None = None) -> tuple[Path, Path]:
    """Write both files, each whole or not at all; the JSON document, which names the other by its hash, comes last.

    extra: more entries of the document, for people. The same program gives the same bytes. Raises CaffeError.
    """
    document, archive = paths_of(output)
    data = _archive(program.arrays)
    head = {k: program.info[k] for k in ("format", "version", "name")}
    info = {**head, "arrays": archive.name, "sha256": hashlib.sha256(data).hexdigest(), **program.info, **(extra or {})}
    text = json.dumps(info, indent=1, allow_nan=False)
    with atomic_write(document, "w") as words:
        words.write(text + "\n")
        with atomic_write(archive) as numbers:
            numbers.write(data)
    return document, archive


def _archive(arrays: Any) -> bytes:
    """An npz file; without the time of day in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, member.getvalue())
    return buffer.getvalue()
