"""The functions that `lean` replaced in a forward, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """The functions that were replaced in one forward, those that were not, and why. Prints as a table.

    Attributes:
        folded: Count of the frozen BatchNorms that are folded into their convolutions.
        unfolded: Convolutions whose BatchNorm is never folded into them, and why.
        taken: Bytes of outputs of replaced functions, by kind.
        left: Bytes of outputs of functions that were not replaced but could be, by function and reason.
        others: Bytes of outputs of functions that have no leaner form, by function.
    """

    folded: int
    unfolded: Mapping[str, str]
    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Bytes of the outputs of replaced functions, as a share of those that could be replaced."""
        return sum(self.taken.values()) / max(sum(self.taken.values()) + sum(self.left.values()), 1)

    def __str__(self) -> str:
        counts = {"taken": self.taken, "left": self.left, "as it is": self.others}
        rows = [(name, n, verdict) for verdict, counter in counts.items() for name, n in counter.most_common()]
        width = max((len(name) for name, *_ in rows), default=0)
        lines = [f"{name:<{width}}  {n / 2**20:9.1f} MiB  {verdict}" for name, n, verdict in rows]
        lines.append(f"{self.share:.1%} of the outputs' bytes taken; {self.folded} frozen BatchNorms folded")
        return "\n".join([*lines, *(f"not folded: {name}, {why}" for name, why in self.unfolded.items())])
