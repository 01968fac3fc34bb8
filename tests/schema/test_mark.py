"""The dialect that a file says of itself, in text and in weights, and who wins against whom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from caffejacinto_py.errors import PrototxtError, UsageError
from caffejacinto_py.schema import pb
from caffejacinto_py.schema.dialect import resolve_dialect
from caffejacinto_py.schema.mark import mark, mark_model
from caffejacinto_py.schema.text import dumps, parse
from caffejacinto_py.schema.upgrade import load_net
from caffejacinto_py.schema.weights import LayerBlobs, ModelFile, read_model, write_model

LIKE_JACINTO = 'name: "n" quantize: true layer { name: "a" type: "ReLU" bottom: "x" top: "y" }'


def test_text_says_it_in_a_comment() -> None:
    net = mark(parse(LIKE_JACINTO, "NetParameter").message, "bvlc")
    text = dumps(net)
    assert text.startswith("# dialect: bvlc\n")
    assert "dialect" not in text[len("# dialect: bvlc\n") :]
    plain = pb.NetParameter()
    text_format.Parse(text, plain)  # a reader that knows no marks
    assert not plain.HasField("dialect")
    assert parse(text, "NetParameter").message == net


def test_what_needs_no_mark_gets_none() -> None:
    net = parse(LIKE_JACINTO, "NetParameter").message
    assert dumps(mark(net, "jacinto")) == text_format.MessageToString(net)
    assert dumps(mark(mark(net, "bvlc"), "jacinto")) == text_format.MessageToString(net)
    said = parse("# dialect: bvlc\n" + 'name: "n"', "NetParameter").message
    assert mark(said, "bvlc").dialect == "bvlc"  # its author wanted it


@pytest.mark.parametrize("top", ["", "\n\n", "# a net\n\n  # of ours\n", "#\r\n"])
@pytest.mark.parametrize("line", ["# dialect: ssd\n", "#dialect:ssd \n", "\t# dialect:  ssd\r\n"])
def test_where_the_comment_may_stand(top: str, line: str) -> None:
    doc = parse(top + line + LIKE_JACINTO, "NetParameter")
    found = resolve_dialect(doc.message)
    assert (found.name, found.reason) == ("ssd", "the file says so")
    assert doc.locs.find(("quantize",)) is not None


@pytest.mark.parametrize(
    "text", [LIKE_JACINTO + "\n# dialect: ssd\n", "# dialect: ssd or so\n" + LIKE_JACINTO, "# the dialect: ssd\n"]
)
def test_other_comments_say_nothing(text: str) -> None:
    assert not parse(text, "NetParameter").message.dialect


def test_options_win_and_fields_lose() -> None:
    net = parse("# dialect: bvlc\n" + LIKE_JACINTO, "NetParameter").message
    solver = parse("sparse_mode: SPARSE_UPDATE", "SolverParameter").message
    assert resolve_dialect(net, solver).name == "bvlc"
    assert resolve_dialect(net, solver, "jacinto").name == "jacinto"


@pytest.mark.parametrize(
    ("text", "place"),
    [("# net\n# dialect: bvcl\nname: 'n'", (2, 12)), ("# net\n\ndialect: 'bvcl'", (3, 1))],
)
def test_a_dialect_that_does_not_exist(text: str, place: tuple[int, int]) -> None:
    with pytest.raises(PrototxtError, match="unknown dialect 'bvcl'") as caught:
        parse(text, "NetParameter", file="f")
    assert caught.value.loc is not None
    assert (caught.value.loc.line, caught.value.loc.col) == place
    assert "bvlc" in str(caught.value.hint)


def test_unknown_fields_do_not_hide_it(tmp_path: Path) -> None:
    (tmp_path / "n.prototxt").write_text("# dialect: ssd\nname: 'n' nonsense: 3\n")
    assert load_net(tmp_path / "n.prototxt", unknown="collect").message.dialect == "ssd"


def weights() -> ModelFile:
    net = parse(LIKE_JACINTO, "NetParameter").message
    head = pb.NetParameter(quantize=True).SerializeToString()
    entry = LayerBlobs("a", "ReLU", [np.ones(3, np.float32)], proto=net.layer[0])
    return ModelFile("n", [entry], head=head)


def test_weights_say_it_in_a_field(tmp_path: Path) -> None:
    write_model(tmp_path / "w", mark_model(weights(), "bvlc"))
    found = read_model(tmp_path / "w")
    assert found.dialect == "bvlc"
    assert resolve_dialect(found.net()).reason == "the file says so"
    write_model(tmp_path / "again", found)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "w").read_bytes()
    whole = pb.NetParameter.FromString((tmp_path / "w").read_bytes())
    assert whole.dialect == "bvlc"
    assert list(whole.layer[0].blobs[0].data) == [1, 1, 1]
    assert not mark_model(found, "jacinto").net().HasField("dialect")


def test_weights_without_a_mark_stay_as_they_are(tmp_path: Path) -> None:
    before = weights()
    head = before.head
    assert mark_model(before, "jacinto").head == head
    assert not before.net().HasField("dialect")


def test_weights_of_a_dialect_of_tomorrow(tmp_path: Path) -> None:
    """Are read by what their bytes show; only the net in them is refused."""
    model = weights()
    model.head = pb.NetParameter(quantize=True, dialect="next").SerializeToString()
    write_model(tmp_path / "w", model)
    found = read_model(tmp_path / "w")
    assert found.dialect == "jacinto"
    assert np.array_equal(found.layer("a").blobs[0], np.ones(3))
    with pytest.raises(UsageError, match="unknown dialect 'next'"):
        resolve_dialect(found.net())
