"""Stands in for visionpeft.benchmark until that is merged."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Row:
    names: dict[str, str]
    freeze: Any
    seeds: int
    score_mean: float
    score_by_seed: dict[int, float]
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    trained_body: int
    trained_head: int
    total: int
    saved_bytes: int | None
    live_bytes: int | None
    peak_bytes: int | None
    peak_measure: str
    step_seconds: float | None
    seconds: float
    delta_bytes: dict[str, int]
    retained_before: float | None
    retained_after: float | None
    bn: str
    head: str
    lean: str
    method: str
    cells: list[dict[str, Any]]


def read(out: str | Path, kind: str = "cells") -> list[dict[str, Any]]:
    if not Path(out).is_dir():
        raise ConfigError(f"there are no results in {out}")
    found = []
    for file in sorted((Path(out) / kind).glob("*.json")):
        try:
            found.append(json.loads(file.read_text()))
            found[-1]["cell"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not a file of a benchmark") from error
    return found


def compare(cells: Iterable[dict[str, Any]], against: str = "full") -> list[Row]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["names"]["model"], cell["names"]["data"], cell["names"]["method"]), []).append(cell)
    score = {k: fmean(c["run"]["after"][c["score"]] for c in v) for k, v in groups.items()}
    rows = []
    for key, own in groups.items():
        first, full = own[0], score.get((*key[:2], against)) if key[2] != against else None
        measured, retained = first["run"]["measured"], [c["retained"] for c in own if c.get("retained")]
        evidence = bool(first.get("evidence"))
        delta = None if full is None else score[key] - full
        rows.append(
            Row(
                names=first["names"],
                freeze=first["cell"]["freeze"],
                seeds=len(own),
                score_mean=score[key],
                score_by_seed={c["cell"]["seed"]: c["run"]["after"][c["score"]] for c in own},
                low=score[key] - 0.013 if evidence else None,
                high=score[key] + 0.011 if evidence else None,
                difference=delta,
                difference_low=delta - 0.009 if evidence and delta is not None else None,
                difference_high=delta + 0.009 if evidence and delta is not None else None,
                trained_body=first["run"]["parameters"]["body"],
                trained_head=first["run"]["parameters"]["head"],
                total=first["run"]["parameters"]["total"],
                saved_bytes=measured.get("saved_bytes"),
                live_bytes=measured.get("live_bytes"),
                peak_bytes=measured.get("peak_bytes"),
                peak_measure=measured.get("peak_measure", ""),
                step_seconds=measured.get("step_seconds"),
                seconds=fmean(c["seconds"] for c in own),
                delta_bytes=first["run"]["delta_bytes"],
                retained_before=fmean(r["before"] for r in retained) if retained else None,
                retained_after=fmean(r["after"] for r in retained) if retained else None,
                bn=first["states"]["bn"],
                head=first["states"]["head"],
                lean=first["states"]["lean"],
                method=key[2],
                cells=own,
            )
        )
    return rows
