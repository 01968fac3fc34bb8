"""docs/: the generated pages are up to date, and the page about migration tells the truth."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from caffejacinto_py.cli.group import VERBS, cli
from caffejacinto_py.layers import registry
from caffejacinto_py.schema.dialect import DIALECTS, Dialect

DOCS = Path(__file__).parents[2] / "docs"
# what `caffe` and its tools have (gflags and arguments)
CAFFE = {
    "gpu", "solver", "model", "phase", "level", "stage", "snapshot", "weights", "iterations", "sigint-effect",
    "sighup-effect", "gray", "shuffle", "backend", "resize-width", "resize-height", "check-size", "encoded",
    "encode-type",
    # caffe-jacinto's
    "display-sparsity", "optimize-net", "output-model", "output",
}  # fmt: skip


def test_the_generated_pages_are_up_to_date() -> None:
    """A layer, a field or an option has changed: `make docs` writes the pages anew; commit them."""
    done = subprocess.run([sys.executable, str(DOCS / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stderr}`make docs` writes docs/*.md; commit them too"


def test_every_layer_has_a_section_and_every_link_a_target() -> None:
    page = (DOCS / "layers.md").read_text()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```text.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
    assert {registry.find(name).type for name in registry.types()} <= set(headings)
    anchors: list[str] = []
    for heading in headings:
        same = sum(a == heading.lower() for a in anchors)
        anchors.append(heading.lower() + (f"-{same}" if same else ""))
    assert set(re.findall(r"\]\(#([^)]*)\)", page)) <= set(anchors)
    batch_norm = page.split("\n## BatchNormParameter\n")[1].split("\n## ")[0]
    assert "| `moving_average_fraction` | float | `0.999` |" in batch_norm


@pytest.fixture(scope="module")
def page() -> str:
    return (DOCS / "migrating-from-caffe.md").read_text()


def test_the_table_of_dialects(page: str) -> None:
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    head = next(line for line in lines if line.startswith("| choice |"))
    assert [cell.strip() for cell in head.split("|")[2:-1]] == list(DIALECTS)
    for field in dataclasses.fields(Dialect):
        if field.name in ("name", "compat", "reason"):
            continue
        row = next((line for line in lines if line.startswith(f"| `{field.name}` |")), None)
        assert row is not None, f"docs/migrating-from-caffe.md: the table lacks {field.name}"
        assert f"\n- `{field.name}`: " in page, f"docs/migrating-from-caffe.md does not explain {field.name}"
        values = [getattr(d, field.name) for d in DIALECTS.values()]
        words = [("yes" if v else "no") if isinstance(v, bool) else f"{v:g}" for v in values]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == words, field.name


@pytest.mark.parametrize(
    "verb", ["train", "test", "time", "check", "summary", "device_query", "convert_imageset", "optimize"]
)
def test_options_of_our_own_are_explained(verb: str, page: str) -> None:
    command = cli.get_command(click.Context(cli), verb)
    assert command is not None
    for param in command.params:
        names = [o.lstrip("-") for o in param.opts if isinstance(param, click.Option)]
        missing = [n for n in names if n not in CAFFE and f"`--{n}" not in page]
        assert not missing, f"docs/migrating-from-caffe.md does not explain --{missing[0]} of {verb}"


def test_what_is_said_to_be_missing_is_missing(page: str) -> None:
    """`**Not yet**: A, B, ...`: layer types in these sentences are not registered, and no verb has that name."""
    sentences = re.findall(r"\*\*[Nn]ot yet\*\*:(.*?)(?:\n\n|\n- |\n#)", page, re.DOTALL)
    assert len(sentences) >= 3
    words = set(re.findall(r"[A-Za-z_]+", " ".join(sentences)))
    there = sorted(words & (set(registry.types()) | {v for v in VERBS if "_" in v}))
    assert not there, f"docs/migrating-from-caffe.md says that these are missing: {there}"
