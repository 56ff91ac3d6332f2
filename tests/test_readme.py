"""What the README and CONTRIBUTING say is what the code does."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import yaml

import visionpeft
from visionpeft import cli, tables
from visionpeft.methods import bitfit
from visionpeft.registry import FAMILIES, METHODS

ROOT = Path(__file__).resolve().parents[1]


def test_table_of_methods_is_generated() -> None:
    """Regenerate with `visionpeft methods --markdown`."""
    text = (ROOT / "README.md").read_text()
    assert text.split("<!-- methods -->\n")[1].split("\n<!-- /methods -->")[0] == tables.methods_markdown(METHODS)


def test_the_shown_method_is_the_real_one() -> None:
    shown = (ROOT / "CONTRIBUTING.md").read_text().split("```diff\n")[1].split("```")[0]
    assert shown == "".join(
        f"+{line}\n" for line in ["++ b/visionpeft/methods/bitfit.py", *inspect.getsource(bitfit).splitlines()]
    )


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").glob("*.yaml")), ids=lambda p: p.stem)
def test_data_yamls_are_in_ultralytics_format(path: Path) -> None:
    data = yaml.safe_load(path.read_text())
    assert {"train", "val", "names"} <= data.keys() and list(data["names"]) == list(range(len(data["names"])))


def test_lists() -> None:
    assert set(visionpeft.list_methods()) >= {
        "full",
        "head",
        "bitfit",
        "norm",
        "lora",
        "dora",
        "adapter",
        "prompt",
        "prefix",
        "side",
    }
    assert visionpeft.list_families() == list(FAMILIES) == ["timm", "yolo"]


@pytest.mark.parametrize(
    "command", [["methods"], ["methods", "lora"], ["families"], ["--help"], ["train", "--help"], ["--version"]], ids=" ".join
)
def test_commands_that_tell(command: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert not stopped.value.code and capsys.readouterr().out.strip()
