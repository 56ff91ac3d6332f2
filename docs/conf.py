"""The documentation site: ``sphinx-build -W docs SITE`` builds it from these pages and the docstrings, without a network.

What would otherwise be said twice is made here before the pages are read: the methods from the registry, the recipes
from their files, the notebooks from where they are run. It lies in ``docs/generated``, which is not kept.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout is documented as it stands, whatever is installed

import visionpeft  # noqa: E402
from visionpeft import tables  # noqa: E402
from visionpeft.core.method import fields_of  # noqa: E402
from visionpeft.registry import METHODS  # noqa: E402

project = "visionpeft"
release = version = visionpeft.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "cyclopts.ext.sphinx"]

html_theme = "furo"  # brings its own style and asks for no font or script from elsewhere
html_title = f"visionpeft {release}"
html_copy_source = False
html_show_sphinx = html_show_copyright = False

myst_enable_extensions = ["colon_fence", "deflist", "html_image"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks hold their results; the test suite runs them
nb_render_markdown_format = "myst"  # with tables

smartquotes = False  # --option keeps its two dashes
highlight_language = "text"  # of blocks that name none: commands and their output

default_role = "py:obj"  # `train` in a docstring is a link where there is such an object, else code
autodoc_typehints = "none"  # signatures without types: the arguments' descriptions say what they take
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
toc_object_entries = False


LINKS = {  # of the README, and what they are here
    "CONTRIBUTING.md": "extending.md",
    "configs/train": "generated/recipes.md",
    "datasets/README.md": "datasets.md",
    "notebooks": "generated/satellite.ipynb",
}
RECIPES = """A recipe is a YAML file of `train`'s arguments. visionpeft brings these; `--config` takes a name or a path, and
what is given besides overrides it:

```
visionpeft train --config satellite-6gb --data airports.yaml --epochs 20
```

Their sizes come from counting what a step keeps (`python benchmarks/recipes.py`, see [Memory](../memory.md)), not from runs
on such cards, and leave at least a fifth of the card free. Their other settings follow [the results](../results.md) where
there are any.
"""


# ------------------------------------------------------------------------------------------------- what is made, not written
def first_page() -> str:
    """Return the README's beginning, its links turned to pages of the site."""
    text = (ROOT / "README.md").read_text().partition("\n## Methods")[0]
    text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda m: f"]({LINKS.get(m[1], m[1].removeprefix('docs/'))})", text)
    return text.replace('src="docs/', 'src="')


def methods_page() -> str:
    """Return the table of methods, then each with its settings."""
    lines = [
        "# Methods",
        "",
        "`visionpeft methods --markdown` prints this table; `visionpeft methods NAME` one method's settings.",
        "",
    ]
    lines += [tables.methods_markdown(METHODS), ""]
    for name, cls in METHODS.items():
        lines += [f"## {name}", "", re.sub(r"(https://[^\s),;]+[^\s),;.])", r"<\1>", tables.first_line(cls)), ""]
        train = f"Body learning rate relative to full fine-tuning: {cls.lr_scale:g}."
        lines += [train, ""]
        fields = fields_of(cls)
        if not fields:
            lines += ["It has no settings.", ""]
            continue
        lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        lines += [
            "| " + " | ".join(_cell(x) for x in (f"`{field}`", f"`{kind}`", f"`{default!r}`", comment)) + " |"
            for field, kind, default, comment in fields
        ]
        lines.append("")
    return "\n".join(lines)


def recipes_page() -> str:
    """Return every packaged recipe as it lies in the repository: its comments are its documentation."""
    lines = ["# Recipes", "", RECIPES]
    for path in sorted((ROOT / "configs" / "train").glob("*.yaml")):
        lines += [f"## {path.stem}", "", f"```yaml\n{path.read_text().rstrip()}\n```", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _generate(app: Any, config: Any) -> None:
    folder = ROOT / "docs" / "generated"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "readme.txt").write_text(first_page())
    (folder / "methods.md").write_text(methods_page())
    (folder / "recipes.md").write_text(recipes_page())
    (folder / "plan.txt").write_text(f"{visionpeft.plan('yolo11n.yaml', method='lora', freeze=5)}\n")
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        shutil.copy(notebook, folder / notebook.name)


def _document_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Describe a dataclass's fields by the comments beside them, as the house writes them."""
    if what != "class" or not dataclasses.is_dataclass(obj) or "Attributes:" in lines:
        return
    said = re.findall(r"^    (\w+): [^#\n]+#\s*(.+)$", inspect.getsource(obj), re.MULTILINE)
    if said:
        lines += ["", "Attributes:", *(f"    {field}: {comment}" for field, comment in said), ""]


def setup(app: Any) -> None:
    app.connect("config-inited", _generate)
    app.connect("autodoc-process-docstring", _document_fields, priority=400)  # before napoleon reads "Attributes:"
