"""What an adapted model lost of its base's classes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from . import tables
from .adapted import Adapted
from .config import Options
from .core import attach as attaching
from .core import delta as deltas
from .core.base_model import Data
from .schema import Json


@dataclass(frozen=True)
class Forgetting:
    """What an adapted model lost of its base's classes, from `forgetting`. Prints as a table.

    Attributes:
        data: What it was measured on.
        metric: The score.
        before: Of the base.
        after: Of the adapted body with the base's own head.
        detached: Of the model after the delta was taken off again: the base's.
        per_class: Scores before and after, by class.
    """

    data: str
    metric: str
    before: float
    after: float
    detached: float
    per_class: dict[str, tuple[float, float]]

    def to_dict(self) -> Json:
        """Return plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        rows = [("all", self.before, self.after), *((n, b, a) for n, (b, a) in self.per_class.items())]
        shown = [(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}") for name, before, after in rows]
        return tables.text(f"{self.metric} on {self.data}", ("class", "before", "after", "change"), shown, right=(1, 2, 3))


def measure(adapted: Adapted, data: Data, source: str, use: Options) -> Forgetting:
    """Evaluate the base, and the adapted body with the base's own head.

    Args:
        adapted: The model.
        data: Labelled images of the base's classes.
        source: What names the data.
        use: Options of the evaluation.
    """
    family, base, plan = adapted.family, adapted.base, adapted.delta.plan
    before = family.evaluate(base.model, data, **use)
    model = attaching.attach(family.with_head(base, base.names, "keep", **data.outputs), plan, start=False)
    heads = tuple(f"{h}." for h in plan.heads)
    body = {k: v for k, v in adapted.delta.tensors.items() if not k.startswith(heads)}
    deltas.apply(model, dataclasses.replace(adapted.delta, tensors=body), base.state).eval()
    after = family.evaluate(model, data, **use)
    attaching.detach(model, base.state)
    metric = family.primary_metric(base.task)
    detached = before.metrics[metric]
    if deltas.fingerprint(model.state_dict()) != adapted.delta.header["base"]["sha256"]:  # else it is the base, bit for bit
        detached = family.evaluate(model, data, **use).metrics[metric]
    scores = before.predictions.by_class(), after.predictions.by_class()
    return Forgetting(
        data=source,
        metric=metric,
        before=before.metrics[metric],
        after=after.metrics[metric],
        detached=detached,
        per_class={base.names[i]: (round(scores[0][i], 5), round(scores[1][i], 5)) for i in scores[0]},
    )
