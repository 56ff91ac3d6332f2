"""What the README and the pages show can be done: their Python and their commands exist, their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import visionpeft
from visionpeft import cli
from visionpeft.registry import FAMILIES, METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(p for p in (ROOT / "docs").rglob("*.md") if "generated" not in p.parts)]
OPTIONS = {f.name for cls in METHODS.values() for f in dataclasses.fields(cls)}
OPTIONS |= {name for cls in FAMILIES.values() for name in cls().train_options()}


def blocks(*languages: str) -> Iterator[tuple[str, str]]:
    """Every fenced block of these languages, with where it stands."""
    for page in sorted(PAGES):
        text = page.read_text()
        for found in re.finditer(r"^```([\w{}-]*)[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            if found[1] in languages:
                yield f"{page.relative_to(ROOT)}:{text[: found.start()].count(chr(10)) + 2}", found[2]


def commands() -> Iterator[tuple[str, str]]:
    """Every line of a block that calls visionpeft."""
    for where, block in blocks("", "bash", "console", "text"):
        for line in block.splitlines():
            if line.startswith("visionpeft "):
                yield where, line


@pytest.mark.parametrize(("where", "code"), list(blocks("python")), ids=lambda x: x if "\n" not in x else "")
def test_python_snippets(where: str, code: str) -> None:
    tree = ast.parse(code, where)
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if ast.unparse(call.func).startswith("visionpeft."):
            verb = getattr(visionpeft, ast.unparse(call.func).removeprefix("visionpeft."))
            known = {*inspect.signature(verb).parameters, *OPTIONS}
            assert {k.arg for k in call.keywords} <= known, f"{where}: {ast.unparse(call)}"


def test_lean_on_your_own_model_runs_as_shown(capsys: pytest.CaptureFixture) -> None:
    code = [code for where, code in blocks("python") if where.startswith("docs/lean.md")]
    exec(compile("\n".join(code), "docs/lean.md", "exec"), {"__name__": "page"})
    said = [text for where, text in blocks("text") if where.startswith("docs/lean.md") and "MiB, lean" in text]
    assert said == [capsys.readouterr().out]


@pytest.mark.parametrize(("where", "line"), list(commands()))
def test_commands(where: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    given = {"train": cli.train, "plan": cli.plan}
    if command in given.values():
        assert bound.kwargs.keys() <= {*inspect.signature(command).parameters, *OPTIONS}, f"{where}: {line}"


@pytest.mark.parametrize(("where", "text"), list(blocks("yaml")))
def test_yaml_snippets(where: str, text: str) -> None:
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    """On a code host, too; the documentation's build checks its own."""
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
        if not target.startswith("generated/"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_figures_in_the_guide_are_results() -> None:
    results = (ROOT / "docs" / "results.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
    for page in ("choosing", "faq", "concepts"):
        scores = re.findall(r"\b0\.\d{3}\b(?! %)", (ROOT / "docs" / f"{page}.md").read_text())
        assert set(scores) <= set(re.findall(r"\b0\.\d{3}\b", results)), page
