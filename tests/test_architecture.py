"""The house: imports run downward, private things stay private, and nothing belongs to two rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import visionpeft
from visionpeft.core.method import fields_of
from visionpeft.registry import METHODS

ROOT = Path(visionpeft.__file__).parent
LEVELS = {  # a room may import from rooms with a lower number only
    "errors": 0,
    "deprecation": 0,
    "files": 1,
    "pickles": 1,
    "registry": 1,
    "schema": 1,
    "measure": 1,
    "process": 1,
    "tables": 1,
    "presets": 2,
    "core": 2,
    "scenes": 2,
    "plan": 3,
    "methods": 3,
    "data": 4,
    "lean": 4,
    "training": 5,
    "families": 6,
    "memory": 7,
    "hfpeft": 7,
    "settings": 7,
    "planning": 8,
    "api": 9,
    "benchmark": 10,
    "report": 11,
    "cli": 12,
    "__init__": 13,
    "__main__": 13,
}
FILES = sorted(f for f in ROOT.rglob("*.py") if "configs" not in f.parts and "datasets" not in f.parts)


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Top-level imports only: what a function imports when it runs is no arrow of the house."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [a.name for a in node.names]
            found += [(n, node.level) for n in names]
        elif isinstance(node, ast.Import):
            found += [(a.name, 0) for a in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    here, depth = room(path), len(path.relative_to(ROOT).parts)
    for name, level in imports(path):
        if level == depth:  # relative to the package itself
            there = name.split(".")[0]
            if (ROOT / there).is_dir() or (ROOT / f"{there}.py").is_file():
                assert LEVELS[there] < LEVELS[here] or there == here, f"{here} imports {there}"
        assert not (name.split(".")[0] in ("ultralytics", "timm") and here != "families"), f"{here} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_method_or_family_is_named_outside_its_file(path: Path) -> None:
    names = {*METHODS, "yolo", "timm"} if room(path) not in ("methods", "families") else set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and ("method" in ast.unparse(node) or "family" in ast.unparse(node)):
            values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not values & names, f"{path.name}:{node.lineno} decides by the name of a method or family"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_comes_from(name: str) -> None:
    module = ast.parse((ROOT / "methods" / f"{METHODS[name].__module__.rpartition('.')[2]}.py").read_text())
    first = (ast.get_docstring(module) or "").splitlines()[0]
    assert "https://" in first and ":" in first
    assert all(comment for *_, comment in fields_of(METHODS[name])), "every field carries a comment"


def test_a_new_file_is_a_new_method(tmp_path: Path, monkeypatch) -> None:
    """Adding a method is adding one file: the registry finds it, and its fields are options at once."""
    from visionpeft.core.method import make_method
    from visionpeft.registry import Registry

    package = tmp_path / "more_methods"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "mine.py").write_text(
        '"""Mine: W + 1.  Me 2026, https://example.org"""\n'
        "from dataclasses import dataclass\n"
        "from visionpeft.registry import METHODS\n"
        "from visionpeft.methods.base import Method\n"
        "@METHODS.register('mine')\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Method):\n"
        "    strength: float = 1.0  # how much\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    len(METHODS)  # scanned
    before = dict(METHODS._classes)
    try:
        len(Registry("more_methods", "method"))
        assert make_method("mine", {"strength": "2"}).strength == 2.0
        assert make_method("lora+mine", {"r": 4, "strength": 3}).settings()["mine"] == {"strength": 3.0}
    finally:
        METHODS._classes = before
