"""The committed prototxts are what generate.py writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from models import generate

MODELS = Path(generate.__file__).parent


@pytest.mark.parametrize("path", sorted(generate.texts()))
def test_committed_file_is_current(path: str) -> None:
    assert (MODELS / path).read_text() == generate.texts()[path], "run `make models`"


def test_every_folder_has_a_solver_for_its_net() -> None:
    for folder in generate.NETS:
        text = (MODELS / folder / "solver.prototxt").read_text()
        assert f'net: "models/{folder}/train_val.prototxt"' in text
        assert f'snapshot_prefix: "runs/{folder}/' in text


def test_main_writes_the_files(tmp_path: Path) -> None:
    generate.main(tmp_path)
    written = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.prototxt")}
    assert written == set(generate.texts())
