"""Ultralytics' loader of training images, which can be taken up again in the middle of an epoch; and stored views in it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from ultralytics.data.build import InfiniteDataLoader

from ...training.feature_cache import CachedFeatureDataset


class ReplayableLoader(InfiniteDataLoader):
    """Ultralytics' loader, which can say where it is and go there again. Exact with workers=0.

    Its iterator outlives epochs and draws from the generator when it starts, and lazily, so the generator's state alone
    does not tell what comes next; the state before the iterator started and the count of batches since do.
    """

    drawn = 0  # batches since the iterator started
    replay = 0  # batches whose indices the next iterator draws and drops before it begins
    passed = 0  # steps of the coming epoch that are done already; None is yielded for each

    def _get_iterator(self) -> Any:
        self.origin = self.generator.get_state()
        iterator = super()._get_iterator()
        for _ in range(self.replay):
            iterator._next_index()
        self.drawn, self.replay = self.replay, 0
        return iterator

    def __iter__(self) -> Any:
        passed, self.passed = self.passed, 0
        if passed and self.iterator is None:  # now, for the next epoch may start another
            self.iterator = self._get_iterator()
        yield from [None] * passed
        for batch in islice(super().__iter__(), len(self) - passed):
            self.drawn += 1
            yield batch

    def position(self) -> dict[str, Any]:
        """Where it is, for `go_to`."""
        return {"origin": self.origin, "drawn": self.drawn, "generator": self.generator.get_state()}

    def go_to(self, position: Mapping[str, Any], anew: bool, passed: int = 0) -> None:
        """Go there, `passed` batches into an epoch; with `anew`, to a new iterator that starts there."""
        self.reset()
        self.generator.set_state(position["generator" if anew else "origin"])
        self.replay, self.passed = 0 if anew else position["drawn"], passed


class CachedViews(CachedFeatureDataset):
    """Stored views in place of Ultralytics' data set, with the attributes that its trainer uses."""

    buffer = ()  # the images in memory that mosaic chooses from, of which there are none

    def close_mosaic(self, hyp: Any) -> None:
        """Do nothing: the last views were augmented without mosaic."""
