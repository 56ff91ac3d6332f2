"""The house: imports run downward, private things stay private, and nothing belongs to two rooms."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import visionpeft
from visionpeft.core.method import fields_of
from visionpeft.registry import METHODS

ROOT = Path(visionpeft.__file__).parent
LEVELS = {  # a room may import from rooms with a lower number only
    "_lazy": 0,
    "errors": 0,
    "_torch_private": 0,
    "deprecation": 0,
    "files": 1,
    "helptext": 1,
    "pickles": 1,
    "registry": 1,
    "schema": 1,
    "measure": 1,
    "process": 1,
    "tables": 1,
    "core": 2,
    "scenes": 2,
    "sources": 3,
    "methods": 3,
    "config": 3,
    "data": 4,
    "presets": 4,
    "lean": 4,
    "training": 5,
    "families": 6,
    "memory": 7,
    "hfpeft": 7,
    "settings": 7,
    "adapted": 8,
    "planning": 8,
    "forgetting": 9,
    "session": 9,
    "plan": 10,  # where plans were; opens the verb of that name
    "api": 10,
    "benchmark": 11,
    "report": 12,
    "__init__": 13,
    "cli": 14,
    "__main__": 15,
}
LIBRARIES = ("ultralytics", "timm")  # what families are of
FILES = sorted(f for f in ROOT.rglob("*.py") if "configs" not in f.parts and "datasets" not in f.parts)


def room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def module(path: Path) -> str:
    """Return a file's module below the package, with dots; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path) for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the modules that a file imports, also inside of functions and for types alone, and whether they are ours."""
    here = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or "", False
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level + 1], *filter(None, [node.module])]).strip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".strip(".")
                yield (name if name in MODULES else base), True


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    here = room(path)
    for name, ours in imports(path):
        there = name.split(".")[0] or "__init__"
        assert not ours or LEVELS[there] < LEVELS[here] or there == here, f"{here} imports {there}"
        assert ours or there not in LIBRARIES or here == "families", f"{here} imports {there}"


def test_imports_run_in_no_circle() -> None:
    arrows = {module(path): {name for name, ours in imports(path) if ours} for path in FILES}
    while leaves := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in leaves}
    assert not arrows, f"these import each other, or what does: {sorted(arrows)}"


@pytest.mark.parametrize("path", [f for f in FILES if room(f) in ("core", "lean", "methods")], ids=lambda p: p.name)
def test_no_library_is_named_where_none_is_known(path: Path) -> None:
    """Comments and docstrings may say why something is as it is; code goes by what it finds in a model."""
    tree = ast.parse(path.read_text())
    prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    for node in ast.walk(tree):
        said = [getattr(node, name, None) for name in ("value", "id", "attr", "name", "arg") if id(node) not in prose]
        words = " ".join(w for w in said if isinstance(w, str)).lower()
        assert not any(name in words for name in (*LIBRARIES, "yolo")), f"{path.name}:{node.lineno} names a library"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_method_or_family_is_named_outside_its_file(path: Path) -> None:
    names = {*METHODS, "yolo", "timm"} if room(path) not in ("methods", "families") else set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and ("method" in ast.unparse(node) or "family" in ast.unparse(node)):
            values = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            assert not values & names, f"{path.name}:{node.lineno} decides by the name of a method or family"


def test_no_module_needs_what_an_extra_brings() -> None:
    code = """if True:
        import importlib, pkgutil, sys
        extras = "altair jinja2 mlflow onnx onnxruntime peft pycocotools tensorboard transformers vl_convert wandb"
        sys.modules |= dict.fromkeys(extras.split())
        import visionpeft
        for module in pkgutil.walk_packages(visionpeft.__path__, "visionpeft."):
            if not module.name.endswith((".__main__", ".report.page", ".report.figures", ".report.charts")):
                importlib.import_module(module.name)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_methods_of_other_packages_are_options_of_the_command_line(tmp_path: Path) -> None:
    """A package names its module as an entry point; one that is broken is said, and does no harm."""
    (tmp_path / "mine.py").write_text(
        '"""Mine: every bias of the first stage.  Me 2026, https://example.org"""\n'
        "from dataclasses import dataclass\n"
        "from visionpeft import METHODS, Method\n"
        "@METHODS.register('mine')\n"
        "@dataclass(frozen=True)\n"
        "class MineConfig(Method):\n"
        "    stage: int = 0  # the only one\n"
        "    def train(self, anatomy):\n"
        "        return [p.name for p in anatomy.body if p.stage == self.stage and p.role.endswith('bias')]\n"
    )
    facts = tmp_path / "mine-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[visionpeft.methods]\nmine = mine\nbroken = nowhere\n")
    words = [
        "plan",
        "--model",
        "timm/test_resnet",
        "--model-args",
        "{pretrained: false}",
        "--method",
        "mine",
        "--stage",
        "1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run([sys.executable, "-m", "visionpeft", *words], capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "mine (stage=1)" in run.stdout
    assert "visionpeft: the method 'broken' of nowhere cannot be used (ModuleNotFoundError" in run.stderr
