"""Atomic writing: whole files or none, whatever happens."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from caffejacinto_py.errors import CaffeError, WeightsError
from caffejacinto_py.schema.files import atomic_path, atomic_write, check_writable, open_bytes
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model


def test_a_written_file_has_the_content_and_the_usual_mode(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "a") as f:
        f.write(b"one")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"one"
    old = os.umask(0)
    os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~old
    with atomic_write(tmp_path / "a", "w") as f:
        f.write("zwei: ü")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "zwei: ü"
    assert os.listdir(tmp_path) == ["a"]


def _write_and_raise(path: Path, error: type[BaseException]) -> None:
    with atomic_write(path) as f:
        f.write(b"new")
        raise error


def _write_by_name_and_raise(path: Path, error: type[BaseException]) -> None:
    with atomic_path(path) as name:
        Path(name).write_bytes(b"new")
        raise error


def test_a_failing_body_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    for error in (KeyboardInterrupt, ZeroDivisionError):
        for write in (_write_and_raise, _write_by_name_and_raise):
            with pytest.raises(error):
                write(tmp_path / "a", error)
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as f:
        f.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_device_is_written_directly() -> None:
    with atomic_write("/dev/null") as f:
        f.write(b"x")
    assert not Path("/dev/null").is_file()


def test_errors_name_the_path_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CaffeError, match="nowhere/a") as e, atomic_write(tmp_path / "nowhere" / "a"):
        pass
    assert e.value.hint is not None
    assert "mkdir" in e.value.hint
    with pytest.raises(CaffeError, match="cannot write"), atomic_write(tmp_path):
        pass


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC when the data is flushed, as delayed allocation reports it."""
    path = tmp_path / "a.caffemodel"
    model = ModelFile("n", [LayerBlobs("l", "InnerProduct", [np.ones((3, 4), np.float32)])])
    write_model(path, model)
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    model.layers[0].blobs = [np.zeros((3, 4), np.float32)]
    for form in ("binaryproto", "hdf5"):
        with pytest.raises(CaffeError, match="No space left") as e:
            write_model(path, model, format=form)
        assert e.value.hint is not None
        assert "MiB are free" in e.value.hint
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.caffemodel"]


def test_a_really_full_device(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with pytest.raises(CaffeError, match="No space left"):
        write_model("/dev/full", ModelFile("n", [LayerBlobs("l", "X", [np.ones(100000, np.float32)])]))


_WRITER = """
import sys, numpy as np
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, write_model
print("ready", flush=True)
value = 0
while True:
    value += 1
    blobs = [np.full((300, 1000), value, np.float32) for _ in range(3)]
    write_model(sys.argv[1], ModelFile("n", [LayerBlobs("l", "InnerProduct", blobs)]))
"""


def test_kill_in_the_middle_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.caffemodel"
    write_model(path, ModelFile("n", [LayerBlobs("l", "InnerProduct", [np.zeros((300, 1000), np.float32)] * 3)]))
    for i in range(4):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == "ready\n"
            time.sleep(0.03 + 0.017 * i)
            process.send_signal(signal.SIGKILL)
            process.wait()
        (layer,) = read_model(path).layers
        assert [b.shape for b in layer.blobs] == [(300, 1000)] * 3
        assert len({float(v) for b in layer.blobs for v in (b.min(), b.max())}) == 1


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []
    with pytest.raises(CaffeError, match="does not exist") as e:
        check_writable(tmp_path / "missing")
    assert e.value.hint is not None
    assert "mkdir" in e.value.hint
    (tmp_path / "file").touch()
    with pytest.raises(CaffeError, match="is not a directory"):
        check_writable(tmp_path / "file")
    with pytest.raises(CaffeError, match="cannot write"):
        check_writable("/proc")


def test_open_bytes_errors(tmp_path: Path) -> None:
    (tmp_path / "lenet.caffemodel").write_bytes(b"x")
    with pytest.raises(WeightsError, match="no such weights file") as e:
        open_bytes(tmp_path / "lenett.caffemodel", what="weights file")
    assert e.value.hint == "did you mean 'lenet.caffemodel'?"
    assert e.value.loc is not None
    assert e.value.loc.file.endswith("lenett.caffemodel")
    with pytest.raises(WeightsError, match="directory"):
        open_bytes(tmp_path)
    with pytest.raises(WeightsError, match="regular file"):
        open_bytes("/dev/null")
    (tmp_path / "empty").touch()
    assert len(open_bytes(tmp_path / "empty")) == 0
