"""What fits into a budget of memory: a search over methods, depths of freezing, levels of lean, batch and image sizes."""

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
from .forecast import Forecast, Trace

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
    """What fits into a budget, best first. Prints as a table."""

    budget: int  # bytes
    model: str
    choices: tuple[Choice, ...]  # none is worse than another in memory, worth and cost at once

    @property
    def best(self) -> Choice:
        """The first."""
        return self.choices[0]

    def to_dict(self) -> dict[str, Any]:
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
    trace: Callable[[Plan, str, int], Trace],
    *,
    imgsz: int,
    batch: int,
    method: Method | None = None,
    freeze: Any = None,
    bn: str | None = None,
    lean: str | None = None,
    fixed: Sequence[str] = (),
) -> Fit:
    """Return what fits into a budget.

    Args:
        anatomy: Of the model.
        budget: Bytes.
        trace: Gives what a plan takes, at a level of lean and an image size.
        imgsz: Image size wanted.
        batch: Images per step wanted; fewer are looked at unless "batch" is `fixed`.
        method: The only one to look at.
        freeze: The only depth.
        bn: As for `make_plan`.
        lean: The only level.
        fixed: Which of "imgsz" and "batch" must stay as they are.

    Raises:
        ConfigError: Nothing fits; said is the least that does.
    """
    plans = list(_plans(anatomy, method, freeze, bn))
    levels = (lean,) if lean else tuple(reversed(LEVELS))  # the leanest first: where it barely fits, no other does
    sizes = list(dict.fromkeys([imgsz, *(() if "imgsz" in fixed else [_multiple(imgsz * share) for share in SHRUNK])]))
    best = plans[0] if method is None and not freeze else next(_plans(anatomy, None, None, None))
    full = trace(best[0], levels[0], imgsz)
    found: list[Choice] = []
    least: Forecast | None = None
    for size in sizes:
        looked = levels
        for plan, worth in plans:
            for level in looked:
                known = plan is best[0] and level is levels[0] and size == imgsz
                try:
                    made = full if known else trace(plan, level, size)
                except ConfigError:
                    if size == imgsz:
                        raise
                    break  # it reads images of no other size
                fits = _largest(made, budget, batch, "batch" in fixed)
                if fits is None:
                    small = made.at(batch if "batch" in fixed else made.devices)
                    least = small if least is None or small.total < least.total else least
                    break
                found.append(Choice(fits, worth * size / imgsz, made.at(made.devices).cost / full.at(full.devices).cost))
                if level is not levels[0]:  # every look takes seconds: the rest is worth less, and only looked at leanest
                    looked = levels[:1]
                if fits.batch < batch or fits.total > ROOM * budget:
                    break
        if any(c.forecast.batch >= min(SMALLEST, batch) for c in found):
            break
    if not found:
        assert least is not None
        plan = least.plan
        raise ConfigError(
            f"nothing fits into {tables.size(budget)}: the least that {anatomy.model} takes is {tables.size(least.total)}, "
            f"with method='{plan.method}', freeze={plan.freeze}, lean='{least.lean}', batch={least.batch} and "
            f"imgsz={least.imgsz}; give more memory, a smaller model, or a smaller imgsz"
        )
    return Fit(budget, anatomy.model, tuple(_explained(_pareto(found, batch), batch, budget)))


def _plans(anatomy: Anatomy, method: Method | None, freeze: Any, bn: str | None) -> Iterator[tuple[Plan, float]]:
    """Yield plans with what each is worth, the best first."""
    stages = len(anatomy.stages)
    named = [method] if method else [make_method(n) for n, cls in METHODS.items() if cls.expected_gain is not None]
    found, refused = [], None
    for one in named:
        worth = _worth(one)
        deep = [round(stages * share) for share in DEPTHS] if one.search_freeze_depths else []
        for depth in [freeze] if freeze is not None else [0, *deep]:
            try:
                plan = make_plan(one, anatomy, depth, bn)
            except ConfigError as error:
                refused = error  # it does not fit this net
                continue
            share = depth / stages if isinstance(depth, int) else len(depth) / stages
            found.append((plan, worth * (1 - _DEPTH * share)))
    if refused and not found:
        raise refused
    yield from sorted(found, key=lambda pair: -pair[1])


def _worth(method: Method) -> float:
    return max((part.expected_gain or 0.0) for part in method.parts)


_DEPTH = 0.5  # what freezing all of the body costs of a method's worth, from benchmarks/worth.py


def _largest(trace: Trace, budget: int, batch: int, fixed: bool) -> Forecast | None:
    """Return the forecast of the largest batch that fits, None where none does: the one wanted, or fewer images, of each
    device one or an even number (which mixup wants)."""
    own = trace.devices
    fewer = [] if fixed else [n for n in range(batch - 1, 0, -1) if n % (2 * own) == 0 or n == own]
    return next((made for n in (batch, *fewer) if (made := trace.at(n)).total <= budget), None)


def _multiple(size: float) -> int:
    return max(round(size / 32) * 32, 32)


def _pareto(found: list[Choice], batch: int) -> list[Choice]:
    """Return the choices that no other one beats in everything, best first."""

    def rank(c: Choice) -> tuple:
        return min(c.forecast.batch, min(SMALLEST, batch)), c.worth, c.forecast.batch, -c.cost, -c.forecast.total

    found = list({rank(c): c for c in found}.values())  # of those that are alike, the least lean
    others = [rank(c) for c in found]

    def beaten(c: Choice) -> bool:
        own = rank(c)
        return any(all(a >= b for a, b in zip(o, own, strict=True)) and o != own for o in others)

    return sorted((c for c in found if not beaten(c)), key=rank, reverse=True)


def _explained(choices: list[Choice], batch: int, budget: int) -> Iterator[Choice]:
    """Yield the choices, each with why one would take it."""
    first = choices[0]
    few = any(c.worth > first.worth for c in choices)
    for c in choices:
        own, parts = c.forecast, []
        if c is first:
            parts.append(f"nearest to full fine-tuning of all that fits{f' with {SMALLEST} images a step' if few else ''}")
        elif c.worth >= first.worth:
            parts.append("nearer" if c.worth > first.worth else "as near")
        if own.batch < (batch if c is first else first.forecast.batch):
            parts.append(f"at a batch of {own.batch}")
        elif own.batch > first.forecast.batch:
            parts.append("a larger batch")
        if own.total < first.forecast.total:
            parts.append(f"{tables.size(budget - own.total)} to spare")
        if c.cost < 0.98 * first.cost:
            parts.append(f"{1 - c.cost / first.cost:.0%} cheaper")
        yield Choice(own, c.worth, c.cost, ", ".join(parts) or "another way")
