"""A net and its weights as two files, `<dir>/<name>.prototxt` and `.caffemodel`: both or neither."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caffejacinto_py.errors import UsageError

if TYPE_CHECKING:
    from caffejacinto_py.schema.weights import ModelFile


def pair(path: Path, inputs: Sequence[str | Path], *, option: str = "--output_model") -> tuple[Path, Path]:
    """The two files of `--output_model DIR/NAME` (`option`); an ending of NAME is dropped, as in caffe-jacinto.

    Raises UsageError where one of them is a file that is read, CaffeError where the directory cannot be written.
    """
    from caffejacinto_py.schema.files import check_writable

    if path.name in ("", "..") or path.is_dir():
        raise UsageError(f"{option} {path}: a directory; give DIR/NAME", hint=f"{path / 'NAME'}")
    stem = stem_of(path)
    files = stem.with_name(stem.name + ".prototxt"), stem.with_name(stem.name + ".caffemodel")
    keep_inputs(files, inputs, said=f"{option} {path}")
    check_writable(path.parent)
    return files


def stem_of(path: Path) -> Path:
    """DIR/NAME without the ending of a net or its weights."""
    return path.with_suffix("") if path.suffix in (".prototxt", ".caffemodel") else path


def keep_inputs(files: Iterable[Path], inputs: Iterable[str | Path], *, said: str) -> None:
    """Raises UsageError where a file to be written is one that is read. said: the option and its value."""
    inputs = list(inputs)
    for file in files:
        for name in inputs:
            if file.exists() and Path(name).exists() and file.samefile(name):
                raise UsageError(f"{said} would replace {name}, which is read", hint="name another file")


def write(files: tuple[Path, Path], net: Any, model: ModelFile) -> None:
    """net: a NetParameter without blobs. Neither file changes where one cannot be written."""
    from caffejacinto_py.schema.files import atomic_write
    from caffejacinto_py.schema.text import dumps
    from caffejacinto_py.schema.weights import write_model

    text, weights = files
    with atomic_write(text, "w") as f:
        f.write(dumps(net))
        f.flush()
        write_model(weights, model)
