"""Random transforms in the workers of a DataLoader: each worker and each epoch has draws of its own."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Self

import numpy as np
from monai.transforms import Randomizable, RandomizableTransform
from torch.utils.data import get_worker_info

from medgen.seeding import derive_seed

# How many transforms took a seed from each worker, by the worker's seed.
_takers: Counter[int] = Counter()


class SeededInWorkers(RandomizableTransform):
    """Random transform that also a loader which knows no transforms gives other draws in each worker and epoch.

    MONAI's ``DataLoader`` calls ``set_random_state`` in each worker, and that stands. PyTorch's own seeds torch alone,
    and the copies of a transform in all workers would draw the same: there the first look at ``R`` takes a new stream.
    Its seed is made of the worker's, so that ``torch.manual_seed`` decides, and of how many transforms took one before,
    so that two of one class draw apart. The stream that the transform brings along does not count, because
    ``Compose`` gives one by chance to each transform that it takes.

    It stands where ``RandomizableTransform`` stood, with nothing to call.
    """

    _stream: np.random.RandomState | None = None
    _seeded_by: int | None = None

    @property
    def R(self) -> np.random.RandomState:
        """Where all draws come from."""
        if self._seeded_by != os.getpid() and (worker := get_worker_info()) is not None:
            _takers[worker.seed] += 1
            self.set_random_state(derive_seed(worker.seed, _takers[worker.seed]))
        return Randomizable.R if self._stream is None else self._stream

    @R.setter
    def R(self, stream: np.random.RandomState) -> None:
        self._stream, self._seeded_by = stream, os.getpid()


class DrawnWithin(SeededInWorkers):
    """Random transform whose draws are all made by another one that it holds: the one for arrays, for dictionaries.

    Args:
        inner: It has a ``prob``, a ``last`` and ``randomize``.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__(inner.prob)
        self.inner = inner

    @property
    def last(self) -> Any:
        """Record of the last draw; set it to replay another one with ``randomize=False``."""
        return self.inner.last

    @last.setter
    def last(self, record: Any) -> None:
        self.inner.last = record

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Self:
        """Set where the draws come from.

        Args:
            seed: Of a new stream.
            state: The stream itself.

        Returns:
            This transform.
        """
        super().set_random_state(seed, state)
        self.inner.set_random_state(state=self.R)
        return self

    def randomize(self, data: Any = None) -> None:
        """Draw into `last`.

        Args:
            data: As the transform takes it that is held.
        """
        self.inner.randomize(data)
