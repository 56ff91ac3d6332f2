"""From a configuration to the cells of a sweep: what each is, what it is called, and its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import sources
from ..config import OPTIONS, RENAMED, ModelArgs, Options, TrainConfig
from ..core.base_model import Base
from ..errors import ConfigError
from ..families.base import Family
from ..methods.base import matches
from ..scenes import PREFIX
from ..schema import Json
from ..settings import find_family, split_options

AXES = ("model", "data", "method", "freeze", "seed")
OWN = ("name", "retain", "search", "equal", "against")  # of the benchmark, not of train()
EQUAL = ("epochs", "time")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        spec: What it is, as plain JSON values: all that its hash is of. Paths are as they were given.
        names: What its model, data and method are called in a table.
        root: What paths are relative to.
    """

    spec: Json
    names: Mapping[str, str] = field(compare=False)
    root: str = field(compare=False)

    @property
    def hash(self) -> str:
        """16 hex digits."""
        return hash_of(self.spec)

    def arguments(self) -> Options:
        """Return what `train` is called with, paths resolved."""
        spec = self.spec
        made = {
            "data": below(self.root, spec["data"]),
            "model": below(self.root, spec["model"]),
            "method": spec["method"],
            "freeze": spec["freeze"],
            "seed": spec["seed"],
            **spec["options"],
        }
        if spec["model_args"]:
            made["model_args"] = {k: below(self.root, v) for k, v in spec["model_args"].items()}
        return made

    def __str__(self) -> str:
        return " · ".join((*self.names.values(), f"seed {self.spec['seed']}"))


@dataclass(frozen=True)
class Grid:
    """A configuration, resolved."""

    name: str
    axes: dict[str, list[Any]]
    shared: Options  # options of all cells
    search: dict[str, list[Any]]
    equal: str
    against: str  # the label of the method that all others are compared with
    cells: list[Cell]

    def trials(self, cell: Cell) -> list[Cell]:
        """Return the runs that choose a cell's searched options, on a part of its training images held back."""
        names = list(self.search)
        spec = {**cell.spec, "retain": None, "retain_sha256": "", "equal": "epochs"}
        spec["seed"] = cell.spec["search_seed"]
        points = (dict(zip(names, values, strict=True)) for values in itertools.product(*self.search.values()))
        return [dataclasses.replace(cell, spec={**spec, "trial": point}) for point in points] if self.search else []

    def reference(self, cell: Cell) -> Cell | None:
        """Return the cell that a cell's time is made equal to; None: it is one of those itself."""
        if cell.names["method"] == self.against:
            return None
        same = ("model", "model_args", "data", "seed")
        return next(
            c for c in self.cells if c.names["method"] == self.against and all(c.spec[k] == cell.spec[k] for k in same)
        )

    def to_dict(self) -> Json:
        """Return plain JSON values."""
        more = {"search": self.search, "equal": self.equal, "against": self.against}
        return {"name": self.name, "grid": self.axes, "defaults": {**self.shared, **more}}


def make_grid(config: Options, name: str, root: str | Path = ".", only: str | None = None) -> Grid:
    """Resolve a configuration, and look at its models and data.

    Args:
        config: Arguments of `train`, of which model, data, method, freeze and seed may be lists. An entry of model, data or
            method may be a mapping that holds further options for its cells. Besides: name, retain, search, equal, against.
        name: Of the sweep, where the configuration has none.
        root: What paths are relative to.
        only: A regular expression for methods as the table calls them; the others are left out.

    Raises:
        VisionpeftError: Something in it is not usable.
    """
    root = str(Path(root).resolve())
    axes = {axis: _entries(axis, config.get(axis, {"freeze": 0, "seed": 0}.get(axis))) for axis in AXES}
    shared = {k: v for k, v in config.items() if k not in (*AXES, *OWN)}
    search = config.get("search") or {}
    if not isinstance(search, dict) or not all(isinstance(v, list) and v for v in search.values()):
        raise ConfigError(f"search={search} is not understood; write search: {{lr0: [0.0005, 0.001, 0.002]}}")
    if (equal := config.get("equal", "epochs")) not in EQUAL:
        raise ConfigError(f"equal={equal!r} is not known; it is {' or '.join(EQUAL)}")
    places = _Sources(root)
    cells = []
    # seeds outermost: a sweep that is not done yet has all methods of the first seed
    for seed, data, model, freeze, method in itertools.product(
        *map(axes.__getitem__, ("seed", "data", "model", "freeze", "method"))
    ):
        merged = {"retain": config.get("retain"), **shared, **model, **data, "freeze": freeze, **method, "seed": seed}
        own = {**({"freeze": freeze} if freeze else {}), **{k: v for k, v in method.items() if k != "method"}}
        cells.append(_cell(merged, own, equal, search, axes["seed"][0], places))
    hashes = [cell.hash for cell in cells]
    if twice := next((cell for cell in cells if hashes.count(cell.hash) > 1), None):
        raise ConfigError(f"the grid holds {twice} twice; name each combination once")
    against = str(config.get("against", "full"))
    if only is not None:
        names = dict.fromkeys(cell.names["method"] for cell in cells)
        cells = [cell for cell in cells if matches(only, cell.names["method"])]
        if not cells:
            raise ConfigError(f"only='{only}' matches none of the grid's methods: {'; '.join(names)}")
    labels = {cell.names["method"] for cell in cells}
    if equal == "time" and against not in labels:
        raise ConfigError(
            f"equal: time needs '{against}' in the grid, whose time it takes; there are {', '.join(sorted(labels))}"
        )
    return Grid(str(config.get("name") or name), axes, shared, search, equal, against, cells)


def hash_of(spec: Mapping[str, object]) -> str:
    """Return the hash that a cell's files are named by."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def below(root: str, value: Any) -> Any:
    """Return the path of what lies below the root, and anything else as it is."""
    if isinstance(value, str) and value and not value.startswith("/") and (path := Path(root) / value).exists():
        return str(path)
    return value


def command(arguments: Options) -> str:
    """Return the command that runs `train` with these arguments."""
    words = ["visionpeft", "train"]
    for name, value in arguments.items():
        if value is None or (name, value) == ("freeze", 0):
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        if name == "freeze" and isinstance(value, list):
            text = ",".join(map(str, value))
        words += [f"--{name}", text]
    return shlex.join(words)


class _Sources:
    """What models and data are, each looked at once."""

    def __init__(self, root: str):
        self.root = root
        self._bases: dict[str, tuple[Family, Base, str]] = {}
        self._data: dict[tuple[str, str, bool], str] = {}

    def base(self, model: str, model_args: ModelArgs) -> tuple[Family, Base, str]:
        """Return a model's family, itself, and the hash of the files that it is read from."""
        key = hash_of({"model": model, "model_args": model_args})
        if key not in self._bases:
            source = below(self.root, model)
            given = {k: below(self.root, v) for k, v in model_args.items()}
            family = find_family(source)
            read = [sources.find(source), *(v for v in given.values() if isinstance(v, str))]
            digest = hashlib.sha256()
            for file in (Path(f) for f in read if Path(f).is_file()):
                digest.update(file.read_bytes())
            self._bases[key] = family, family.load(source, **given), digest.hexdigest()
        return self._bases[key]

    def data(self, source: str, family: Family, base: Base, allow_download: bool, old: bool = False) -> str:
        """Return the fingerprint of a data set; with `old`, check that the base knows its classes."""
        key = (source, base.source, old)
        if key not in self._data:
            read = family.read_data(sources.find(below(self.root, source)), base, allow_download=allow_download)
            if old:
                family.check_classes(base.names, read)
            self._data[key] = read.fingerprint
        return self._data[key]


def _entries(axis: str, given: Any) -> list[Any]:
    """Return an axis as a list; models, data and methods as mappings."""
    if given is None:
        raise ConfigError(f"the config has no {axis}; give one, or a list")
    entries = given if isinstance(given, list) else [given]
    if not entries:
        raise ConfigError(f"{axis}: [] is empty; give at least one")
    if axis in ("freeze", "seed"):
        return entries
    made = [e if isinstance(e, dict) else {axis: e} for e in entries]
    if bad := next((e for e in made if not isinstance(e.get(axis), str)), None):
        raise ConfigError(f"{axis}: {bad} is not understood; give a name, or {{{axis}: NAME, option: value}}")
    return [{str(k).replace("-", "_"): v for k, v in e.items()} for e in made]


def _cell(given: dict[str, Any], own: Options, equal: str, search: Options, first: int, places: _Sources) -> Cell:
    model, data, method, freeze, seed, retain = (given.pop(k) for k in (*AXES, "retain"))
    model_args = given.pop("model_args", None) or {}
    family, base, weights = places.base(model, model_args)
    allowed = bool(given.pop("allow_download", False))  # what is fetched now is there for the cells
    _check(family, method, freeze, {**given, **{k: values[0] for k, values in search.items()}})
    spec = {
        "model": model,
        "model_args": model_args,
        "weights_sha256": weights,
        "data": data,
        "data_sha256": places.data(data, family, base, allowed),
        "method": method,
        "freeze": freeze,
        "seed": seed,
        "options": given,
        "own": sorted(k for k in own if k in given),
        "retain": retain,
        "retain_sha256": places.data(retain, family, base, allowed, old=True) if retain else "",
        "equal": equal,
        "search": dict(search),
        "search_seed": first if search else None,
    }
    label = ", ".join([method, *(f"{k} {_short(v)}" for k, v in own.items())])
    names = {
        "model": Path(model).stem if Path(model).suffix == ".pt" else Path(model).name,
        "data": _name(data),
        "method": label,
    }
    return Cell(json.loads(json.dumps(spec, default=str)), names, places.root)


def _check(family: Family, method: str, freeze: Any, options: Options) -> None:
    """Refuse options that no training run of this method and family would take, before any has started."""
    if settled := next((name for name in options if name in OPTIONS and OPTIONS[name].placement), None):
        raise ConfigError(f"'{settled}' is settled by the sweep; leave it out of the config")
    others = {k: v for k, v in options.items() if k not in (*OPTIONS, *RENAMED)}
    split_options(family, TrainConfig(method=method, freeze=freeze, options=others), [*OPTIONS, *OWN])


def _name(data: str) -> str:
    """Return what a data set is called: a data.yaml by its folder."""
    path = Path(data)
    return path.parent.name if path.stem == "data" and path.parent.name else data if data.startswith(PREFIX) else path.stem


def _short(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
