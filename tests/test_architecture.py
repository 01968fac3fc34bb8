"""The import rules of DESIGN.md, the ban on torch, on comparing layer-type strings, and the size limits."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import caffejacinto_py

PACKAGE = Path(caffejacinto_py.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# room -> rooms it may import, besides itself
ROOMS = {
    "errors": set(),
    "schema": {"errors"},
    "ir": {"errors", "schema"},
    "layers": {"errors", "schema"},
    "data": {"errors", "schema"},
    "passes": {"errors", "schema", "ir", "layers"},
    "engine": {"errors", "schema", "ir", "layers", "passes"},
    "compress": {"errors", "schema", "ir", "layers", "passes", "engine"},
    "export": {"errors", "schema", "ir", "layers", "passes", "engine", "compress"},
    "solver": {"errors", "schema", "ir", "layers", "data", "passes", "engine", "compress"},
}
ROOMS["recipes"] = {*ROOMS, "solver"}
ROOMS["checking"] = {"errors", "schema", "ir", "layers", "passes", "solver"}
ROOMS["pycaffe"] = {*ROOMS, "__init__"}
ROOMS["cli"] = {*ROOMS, "__init__"}
ROOMS["__main__"] = {"cli"}
ROOMS["__init__"] = set()

# torch may not be imported when these load; `layers/modules` is the torch half and is imported inside module() only
WITHOUT_TORCH = ("errors.py", "schema/", "ir/", "layers/", "passes/", "data/", "cli/__init__.py")
TORCH_HALF = ("layers/modules/",)
# upgrades and dialect sniffing work on messages, before there is a registry to ask
MAY_NAME_TYPES = ("layers/", "schema/")
MAX_FILE, MAX_FUNCTION = 400, 60


def path_of(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk(node: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """Nodes below, without `if TYPE_CHECKING:` bodies; functions=False: only what runs at import."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if not functions and isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield child
        yield from walk(child, functions=functions)


def imported(file: Path, *, functions: bool) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import; `from x import y` gives x.y."""
    package = ("caffejacinto_py", *file.relative_to(PACKAGE).parts[:-1])
    for node in walk(tree_of(file), functions=functions):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module or "") if x)
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def forbidden_imports(file: Path) -> list[str]:
    room = room_of(file)
    found = []
    for line, module in imported(file, functions=True):
        parts = module.split(".")
        if parts[0] != "caffejacinto_py" or len(parts) < 2:
            continue
        target = parts[1] if parts[1] in ROOMS else "__init__"
        if target != room and target not in ROOMS[room]:
            found.append(f"{path_of(file)}:{line} imports {module}")
    return found


def forbidden_torch(file: Path) -> list[str]:
    path = path_of(file)
    if not path.startswith(WITHOUT_TORCH) or path.startswith(TORCH_HALF):
        return []
    banned = ("torch.", "caffejacinto_py.layers.modules.")
    return [f"{path}:{n} imports {m}" for n, m in imported(file, functions=False) if f"{m}.".startswith(banned)]


def type_comparisons(file: Path, types: set[str]) -> list[str]:
    """Comparisons with, and match cases of, a registered layer type's name."""
    if path_of(file).startswith(MAY_NAME_TYPES):
        return []
    found = []
    for node in walk(tree_of(file), functions=True):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        else:
            continue
        texts = {c.value for o in operands for c in ast.walk(o) if isinstance(c, ast.Constant)}
        named = {t for t in texts if isinstance(t, str)} & types
        if named:
            found.append(f"{path_of(file)}:{node.lineno} compares with {sorted(named)}")
    return found


def too_long(file: Path) -> list[str]:
    lines = len(file.read_text().splitlines())
    found = [f"{path_of(file)} has {lines} lines"] if lines > MAX_FILE else []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{path_of(file)}:{node.lineno} {node.name} has {length} lines")
    return found


def test_every_room_is_in_the_table() -> None:
    assert {room_of(f) for f in FILES} - {"plugins"} <= set(ROOMS)


@pytest.mark.parametrize("room", sorted({room_of(f) for f in FILES}))
def test_imports_go_one_way(room: str) -> None:
    assert [x for f in FILES if room_of(f) == room for x in forbidden_imports(f)] == []


def test_torch_is_not_imported_where_it_is_banned() -> None:
    assert [x for f in FILES for x in forbidden_torch(f)] == []


def test_loading_the_torch_free_rooms_does_not_load_torch() -> None:
    """What the AST cannot see: an import through a third module."""
    names = []
    for file in FILES:
        path = path_of(file)
        if path.startswith(WITHOUT_TORCH) and not path.startswith(TORCH_HALF):
            module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            names.append(f"caffejacinto_py.{module}")
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-600:]


def test_layer_types_are_compared_in_the_registry_only() -> None:
    from caffejacinto_py.layers import registry

    types = set(registry.types())
    assert [x for f in FILES for x in type_comparisons(f, types)] == []


def test_files_and_functions_are_short() -> None:
    assert [x for f in FILES for x in too_long(f)] == []


def test_the_checks_find_what_they_look_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small package that breaks every rule once."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "ir").mkdir()
    bad = tmp_path / "ir" / "bad.py"
    body = "    pass\n" * 61
    bad.write_text(
        "import torch\nfrom caffejacinto_py.engine import net\nfrom ..layers import registry\n"
        "if TYPE_CHECKING:\n    from caffejacinto_py.solver import Solver\n"
        "def a(node):\n    import torch.nn\n    return node.type in ('ReLU', 'Other')\n"
        f"def long():\n{body}"
    )
    assert [x.split(" ", 1)[1] for x in forbidden_imports(bad)] == [
        "imports caffejacinto_py.engine.net",
        "imports caffejacinto_py.layers.registry",
    ]
    assert [x.split(" ", 1)[1] for x in forbidden_torch(bad)] == ["imports torch"]
    assert len(type_comparisons(bad, {"ReLU"})) == 1
    assert [x.split(" ")[1] for x in too_long(bad)] == ["long"]
