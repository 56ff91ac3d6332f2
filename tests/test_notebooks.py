"""Every notebook runs, in small; what is kept of its results reads well elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

from visionpeft import scenes

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))


def outputs(path: Path) -> list[dict]:
    return [o for cell in json.loads(path.read_text())["cells"] for o in cell.get("outputs", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "night" if path.stem == "driving" else "satellite"
    monkeypatch.setenv("VISIONPEFT_DATA", str(scenes.write(own, tmp_path / "data", train=8, val=4)))
    monkeypatch.setenv("VISIONPEFT_EPOCHS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    made = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in made if o.output_type == "error"]
    said = "".join(o.text for o in made if o.output_type == "stream" and o.name == "stdout")
    assert "statistics" in said and "freeze=" in said, "a plan prints in a notebook, too"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kept_results_are_clean(path: Path) -> None:
    """Run anew as CONTRIBUTING says where this fails."""
    kept, text = outputs(path), path.read_text()
    assert path.stat().st_size < 1.5e6
    assert any(kind.startswith("image/") for o in kept for kind in o.get("data", {})), "its pictures are kept"
    assert not [o for o in kept if o.get("name") == "stderr" or o["output_type"] == "error"]
    assert not [place for place in ("/home/", "/root/", "/tmp/", "/Users/", str(ROOT)) if place in text]
