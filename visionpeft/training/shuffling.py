"""The order in which a loader takes images, which can be taken up again in the middle of an epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized

import torch
from torch.utils.data import BatchSampler, RandomSampler

from ..process import RandomStates, random_states, set_random_states


class Order(BatchSampler):
    """Batches in a random order; after `go_to`, the rest of an epoch as it would have gone on, bit for bit.

    accelerate fetches a batch before the step on the one before it. So a batch that was fetched, but not yet trained on, is
    augmented again from the random states before it was.

    Args:
        images: The data set.
        batch: Images in a batch.
        generator: Of the order.
        drop_last: Leave out a last batch that is smaller.
        ahead: Other processes load the images, with random numbers of their own, some batches ahead. Those passed over are
            then loaded, too, to be dropped by who iterates.
        shares: Processes that train. Each goes through all batches, and takes its own.
    """

    def __init__(
        self, images: Sized, batch: int, generator: torch.Generator, *, drop_last: bool, ahead: bool, shares: int = 1
    ):
        super().__init__(RandomSampler(images, generator=generator), batch, drop_last)
        self.ahead = ahead
        self._passed: int = 0
        self._states: list[RandomStates] = []
        self._fetched: deque[tuple[int, RandomStates]] = deque(maxlen=2 * shares)  # batches, and random states before each

    def __iter__(self) -> Iterator[list[int]]:
        passed, states, count = self._passed, self._states, 0
        self._passed, self._states = 0, []
        self._fetched.clear()
        for count, batch in enumerate(super().__iter__(), 1):
            if 0 < count - passed <= len(states):
                set_random_states(states[count - passed - 1])
            if not self.ahead:
                if count <= passed:
                    continue
                self._fetched.append((count, random_states()))
            yield batch
        if count < passed + len(states):  # there was none left to fetch
            set_random_states(states[-1])

    def fetched_after(self, steps: int) -> list[RandomStates]:
        """Return the random states before those batches were fetched that come after so many."""
        return [states for count, states in self._fetched if count > steps]

    def go_to(self, steps: int, states: list[RandomStates]) -> None:
        """Pass over so many batches of the next epoch; `states` are those to have before each of the next is fetched."""
        self._passed, self._states = steps, states
