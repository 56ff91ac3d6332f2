"""A search for runs that fit into a budget of memory: over methods, depths of freezing, lean, batch and image sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .. import tables
from ..core.anatomy import Anatomy
from ..core.method import Method, make_method
from ..core.plan import Plan, make_plan
from ..errors import ConfigError
from ..lean import LEVELS
from ..registry import METHODS
from ..schema import Json
from .forecast import Forecast, MemoryModel

DEPTHS = (0.22, 0.44)  # shares of the body's stages that may be frozen; of YOLO11's 23 stages, 5 and 10
SHRUNK = (0.75, 0.5)  # image sizes that are looked at where nothing fits, relative to the one wanted
ROOM = 0.85  # of the budget: where a level of lean takes more, a less lean one is not looked at
SMALLEST = 4  # images a step: with fewer, gradients are noisy, so such choices come last


@dataclass(frozen=True)
class Choice:
    """One way to train that fits."""

    forecast: Forecast
    worth: float  # how near to full fine-tuning it may be expected to come: 1 is as good
    cost: float  # of a training image, relative to full fine-tuning at the image size wanted
    reason: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `train` that make it."""
        plan = self.forecast.plan
        return {
            "method": plan.method,
            "freeze": plan.freeze,
            "lean": self.forecast.lean,
            "batch": self.forecast.batch,
            "imgsz": self.forecast.imgsz,
        }

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.forecast.plan.trained_body + self.forecast.plan.trained_head


@dataclass(frozen=True)
class Fit:
    """The ways to train that fit into a budget, best first. Prints as a table."""

    budget: int  # bytes
    model: str
    choices: tuple[Choice, ...]  # none is worse than another in memory, worth and cost at once

    @property
    def best(self) -> Choice:
        """The first."""
        return self.choices[0]

    def to_dict(self) -> Json:
        """Return plain JSON values."""
        rows = [
            {**c.settings, "trained": c.trained, "cost": c.cost, "reason": c.reason, "forecast": c.forecast.to_dict()}
            for c in self.choices
        ]
        return {"model": self.model, "budget": self.budget, "choices": rows}

    def __str__(self) -> str:
        names = ("method", "freeze", "lean", "batch", "imgsz", "memory", "trained", "cost", "why")
        rows = [
            (
                *map(str, c.settings.values()),
                tables.size(c.forecast.total),
                f"{c.trained:,}",
                f"{c.cost:.2f}",
                c.reason,
            )
            for c in self.choices
        ]
        gpu = self.best.forecast.gpu
        assumed = "; of the memory, " + tables.size(self.best.forecast.allowance) + " are assumed for CUDA" if gpu else ""
        first = self.best.settings
        command = " ".join(f"--{k} {','.join(map(str, v)) if isinstance(v, list | tuple) else v}" for k, v in first.items())
        return "\n".join(
            (
                tables.text(f"{self.model} in {tables.size(self.budget)}", names, rows, right=(1, 3, 4, 5, 6, 7)),
                f"cost: of a training image, by operations and bytes moved, relative to full fine-tuning{assumed}",
                f"The first: visionpeft train --data DATA --model {self.model} {command}, and what else was given here",
            )
        )


def search(
    anatomy: Anatomy,
    budget: int,
    memory_of: Callable[[Plan, str, int], MemoryModel],
    *,
    imgsz: int,
    batch: int,
    method: Method | None = None,
    freeze: Any = None,
    bn: str | None = None,
    lean: str | None = None,
    fixed: Sequence[str] = (),
) -> Fit:
    """Search the ways to train that fit into a budget.

    Args:
        anatomy: The model's facts.
        budget: Bytes.
        memory_of: Returns the memory of a plan, at a level of lean and an image size.
        imgsz: The image size wanted; smaller ones are tried where nothing fits, unless "imgsz" is `fixed`.
        batch: The batch size wanted; smaller ones are tried unless "batch" is `fixed`.
        method: The only method to try.
        freeze: The only depth.
        bn: As for `make_plan`.
        lean: The only level.
        fixed: Which of "imgsz" and "batch" must stay as they are.

    Raises:
        ConfigError: Nothing fits. The sentence names the smallest that was tried.
    """
    plans = list(_plans(anatomy, method, freeze, bn))
    levels = (lean,) if lean else tuple(reversed(LEVELS))  # the leanest first: where it barely fits, no other does
    smaller = () if "imgsz" in fixed else (max(round(imgsz * share / 32) * 32, 32) for share in SHRUNK)
    sizes = list(dict.fromkeys([imgsz, *smaller]))
    best = plans[0] if method is None and not freeze else next(_plans(anatomy, None, None, None))
    full = memory_of(best[0], levels[0], imgsz)
    choices: list[Choice] = []
    least: Forecast | None = None
    for size in sizes:
        tried = levels
        for plan, worth in plans:
            for level in tried:
                known = plan is best[0] and level is levels[0] and size == imgsz
                try:
                    model = full if known else memory_of(plan, level, size)
                except ConfigError:
                    if size == imgsz:
                        raise
                    break  # it reads images of no other size
                fits = _largest(model, budget, batch, "batch" in fixed)
                if fits is None:
                    small = model.at(batch if "batch" in fixed else model.devices)
                    least = small if least is None or small.total < least.total else least
                    break
                choices.append(Choice(fits, worth * size / imgsz, model.at(model.devices).cost / full.at(full.devices).cost))
                if level is not levels[0]:  # a trial takes seconds; plans worth less are only tried at the leanest level
                    tried = levels[:1]
                if fits.batch < batch or fits.total > ROOM * budget:
                    break
        if any(c.forecast.batch >= min(SMALLEST, batch) for c in choices):
            break
    if not choices:
        assert least is not None
        plan = least.plan
        raise ConfigError(
            f"nothing fits into {tables.size(budget)}: the least that {anatomy.model} takes is {tables.size(least.total)}, "
            f"with method='{plan.method}', freeze={plan.freeze}, lean='{least.lean}', batch={least.batch} and "
            f"imgsz={least.imgsz}; give more memory, a smaller model, or a smaller imgsz"
        )
    return Fit(budget, anatomy.model, tuple(_explained(_pareto(choices, batch), batch, budget)))


def _plans(anatomy: Anatomy, method: Method | None, freeze: Any, bn: str | None) -> Iterator[tuple[Plan, float]]:
    """Yield plans with the worth of each, the best first."""
    stages = len(anatomy.stages)
    named = [method] if method else [make_method(n) for n, cls in METHODS.items() if cls.expected_gain is not None]
    plans, refused = [], None
    for one in named:
        worth = max((part.expected_gain or 0.0) for part in one.parts)
        deep = [round(stages * share) for share in DEPTHS] if one.search_freeze_depths else []
        for depth in [freeze] if freeze is not None else [0, *deep]:
            try:
                plan = make_plan(one, anatomy, depth, bn)
            except ConfigError as error:
                refused = error  # it does not fit this net
                continue
            share = depth / stages if isinstance(depth, int) else len(depth) / stages
            plans.append((plan, worth * (1 - _DEPTH * share)))
    if refused and not plans:
        raise refused
    yield from sorted(plans, key=lambda pair: -pair[1])


_DEPTH = 0.5  # share of a method's worth that freezing all of the body costs, from benchmarks/worth.py


def _largest(model: MemoryModel, budget: int, batch: int, fixed: bool) -> Forecast | None:
    """Return the forecast of the largest batch that fits, or None: of the one wanted, and smaller ones of one image, or an
    even number (which mixup needs), for each device."""
    devices = model.devices
    fewer = [] if fixed else [n for n in range(batch - 1, 0, -1) if n % (2 * devices) == 0 or n == devices]
    return next((forecast for n in (batch, *fewer) if (forecast := model.at(n)).total <= budget), None)


def _pareto(choices: list[Choice], batch: int) -> list[Choice]:
    """Return the choices that no other one beats in everything, best first."""

    def rank(c: Choice) -> tuple:
        return min(c.forecast.batch, min(SMALLEST, batch)), c.worth, c.forecast.batch, -c.cost, -c.forecast.total

    choices = list({rank(c): c for c in choices}.values())  # of those that are alike, the least lean
    others = [rank(c) for c in choices]

    def beaten(c: Choice) -> bool:
        mine = rank(c)
        return any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in others)

    return sorted((c for c in choices if not beaten(c)), key=rank, reverse=True)


def _explained(choices: list[Choice], batch: int, budget: int) -> Iterator[Choice]:
    """Yield the choices, each with why one would take it."""
    first = choices[0]
    few = any(c.worth > first.worth for c in choices)
    for c in choices:
        forecast, parts = c.forecast, []
        if c is first:
            parts.append(f"nearest to full fine-tuning of all that fits{f' with {SMALLEST} images a step' if few else ''}")
        elif c.worth >= first.worth:
            parts.append("nearer" if c.worth > first.worth else "as near")
        if forecast.batch < (batch if c is first else first.forecast.batch):
            parts.append(f"at a batch of {forecast.batch}")
        elif forecast.batch > first.forecast.batch:
            parts.append("a larger batch")
        if forecast.total < first.forecast.total:
            parts.append(f"{tables.size(budget - forecast.total)} to spare")
        if c.cost < 0.98 * first.cost:
            parts.append(f"{1 - c.cost / first.cost:.0%} cheaper")
        yield Choice(forecast, c.worth, c.cost, ", ".join(parts) or "another way")
