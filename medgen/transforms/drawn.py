"""Transforms that draw what is done to a scan: a deterministic transform, which stays as the record of the draw."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import ensure_tuple

from medgen.transforms.physics.signal import Image
from medgen.transforms.subjects import close_sample, open_sample
from medgen.transforms.variation import check_prob
from medgen.transforms.workers import DrawnWithin, SeededInWorkers
from medgen.types import BadInputError

Change = Callable[[Image], Image]


class RandDrawn(SeededInWorkers):
    """Changes a scan by a transform that it draws.

    Its `last` is what was done to the last scan, or None if nothing: called with that scan it gives the same voxels.

    Args:
        prob: Probability that a scan is changed, in [0, 1].

    Raises:
        BadInputError: If `prob` is out of range.
    """

    def __init__(self, prob: float) -> None:
        check_prob(prob)
        super().__init__(prob)
        self.last: Any = None

    def draw_change(self) -> Change:
        """Draw what is done to a scan.

        Returns:
            A deterministic transform, which can be pickled.

        Raises:
            NotImplementedError: Always; each kind of change has its own.
        """
        raise NotImplementedError

    def draw(self) -> Change | None:
        """Draw whether and how a scan changes.

        Returns:
            What was drawn; None to leave the scan.
        """
        return self.draw_change() if self.R.rand() < self.prob else None

    def randomize(self, data: Any = None) -> None:
        """Draw whether and how a scan changes, into `last`.

        Args:
            data: Not used.
        """
        self.last = self.draw()

    def __call__(self, image: Image, randomize: bool = True) -> Image:
        """Change a scan, or leave it as it is.

        Args:
            image: ``(C, H, W[, D])`` of any unit, finite: array, tensor, MetaTensor or image of TorchIO.
            randomize: Draw anew; else do as `last` says.

        Returns:
            The scan in the same type, shape, affine and units; integers become float32.
        """
        self.last = drawn = self.draw() if randomize else self.last
        return image if drawn is None else drawn(image)


class Changed(MapTransform):
    """Changes the scans of a sample, and may keep the originals under other keys.

    Args:
        keys: Keys of the scans.
        change: What is done to each.
        target_key: Keys under which the originals stay, one for each; None keeps none.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        change: Change | None,
        target_key: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        self.targets: tuple[Hashable | None, ...] = ensure_tuple(target_key) if target_key is not None else ()
        if target_key is not None and len(self.targets) != len(self.keys):
            raise BadInputError(f"target_key: expected one for each of {self.keys}, got {self.targets}.")
        if set(self.targets) & set(self.keys) or len(set(self.targets)) < len(self.targets):
            raise BadInputError(f"target_key: expected other keys than {self.keys}, each once, got {self.targets}.")
        self.change = change

    def __call__(self, data: Mapping[Hashable, Any]) -> Any:
        """Change the scans of a sample.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.

        Returns:
            A copy of it with the scans in the same type, shape and units, and the originals under the target keys.

        Raises:
            BadInputError: If the sample has a target key already, or a scan cannot be used.
        """
        return self._apply(data, self.change)

    def _apply(self, data: Mapping[Hashable, Any], change: Change | None) -> Any:
        sample = open_sample(data)
        for key, target in self.key_iterator(sample, self.targets or (None,) * len(self.keys)):
            original = sample[key]
            if target is not None:
                if target in sample:
                    raise BadInputError(
                        f"target_key: the sample has {target!r} already. Choose another key; the second of two "
                        "degradations takes target_key=None."
                    )
                sample[target] = original
            if change is not None:
                sample[key] = change(original)
            elif target is not None:
                sample[key] = copy.deepcopy(original)
        return close_sample(sample, data)


class RandDrawnd(DrawnWithin, Changed):
    """Dictionary version of :class:`RandDrawn`: all scans of a sample are changed alike.

    Args:
        keys: Keys of the scans.
        drawn: What draws.
        target_key: As for :class:`Changed`.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the target keys do not fit.
    """

    def __init__(
        self,
        keys: KeysCollection,
        drawn: RandDrawn,
        target_key: KeysCollection | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        Changed.__init__(self, keys, None, target_key, allow_missing_keys)
        DrawnWithin.__init__(self, drawn)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> Any:
        """Change the scans of a sample, or leave them as they are.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.
            randomize: Draw anew; else do as `last` says.

        Returns:
            A copy of it with the scans in the same type, shape and units, and the originals under the target keys, also
            where nothing was done.

        Raises:
            BadInputError: If the sample has a target key already, or a scan cannot be used.
        """
        self.last = drawn = self.inner.draw() if randomize else self.last
        return self._apply(data, drawn)
