"""What the mixes are built on: dictionary transforms that record what they drew, and their versions for arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform
from torch import Tensor

from medgen.transforms.inner import check_in_place, check_shape, seeded
from medgen.transforms.mixing import Mix, check_whole, describe, plain, tensor, wrapped
from medgen.transforms.subjects import close_sample, open_sample
from medgen.transforms.workers import DrawnWithin, SeededInWorkers
from medgen.types import BadInputError, Shape

_GIVE_LABEL = "use the dictionary version, whose inner transforms get the label too"


class RecordedMix(MapTransform, SeededInWorkers):
    """Dictionary transform that keeps what it drew, so that a call can be replayed.

    Args:
        keys: Images.
        label_key: Label, or None.
        prob: Chance of a mix, in [0, 1].

    Raises:
        BadInputError: If `prob` is out of range or the label is named as an image too.
    """

    def __init__(self, keys: str | Sequence[str], label_key: str | None, prob: float) -> None:
        MapTransform.__init__(self, keys)
        if not 0 <= prob <= 1:
            raise BadInputError(f"expected prob in [0, 1], got {prob}")
        if label_key in self.keys:
            raise BadInputError(f"expected only images in keys, got {label_key!r}, which is label_key: take it out")
        RandomizableTransform.__init__(self, prob)
        self.label_key = label_key
        self.last: Any = None

    def randomize(self, data: Shape) -> None:
        """Draw the parameters of a call into `last`.

        Args:
            data: Shape of the scan, ``(*spatial)``; of a batch ``(B, *spatial)``.
        """
        self.last = self._draw(tuple(data))

    def _draw(self, size: Shape) -> Any:
        """A record of all that a call draws."""
        raise NotImplementedError

    def _images(self, data: Mapping[str, Any], channels: int) -> tuple[dict[str, Any], Shape]:
        """The images by key, and the shape that they share, without the axis of the channels."""
        images = {key: data[key] for key in self.key_iterator(data)}
        sizes = {}
        for key, image in images.items():
            if not isinstance(image, Tensor | np.ndarray) or image.ndim not in (channels + 3, channels + 4):
                expected = "(B, C, H, W[, D])" if channels else "(C, H, W[, D])"
                raise BadInputError(f"expected {key!r} of shape {expected}, got {describe(image)}")
            sizes[key] = tuple(length for axis, length in enumerate(image.shape) if axis != channels)
        if len(set(sizes.values())) > 1:
            raise BadInputError(f"expected images of one shape, apart from their channels, got {sizes}")
        return images, next(iter(sizes.values()))

    def _label(self, data: Mapping[str, Any]) -> tuple[str, Any]:
        if self.label_key is None or self.label_key not in data:
            raise BadInputError(f"expected the label {self.label_key!r}, got only {sorted(map(str, data))}")
        return self.label_key, data[self.label_key]

    def _recorded(self) -> Any:
        if self.last is None:
            raise BadInputError("expected a draw to replay, got none: call it with randomize=True first, or set last")
        return self.last


class BatchMixd(RecordedMix):
    """Mix of samples of a collated batch.

    Args:
        keys: Images ``(B, C, *spatial)``; all get the same mix.
        label_key: Label of the batch.
        num_classes: K, at least 2; None where no class has to be encoded.
        prob: Chance of each sample to be mixed, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __init__(self, keys: str | Sequence[str], label_key: str, num_classes: int | None, prob: float) -> None:
        super().__init__(keys, label_key, prob)
        if num_classes is not None and num_classes < 2:
            raise BadInputError(f"expected num_classes of 2 or more, background included, got {num_classes}")
        self.num_classes = num_classes
        self.last: Mix | None = None

    def __call__(self, data: Mapping[str, Any], randomize: bool = True) -> dict[str, Any]:
        """Mix a batch.

        Args:
            data: Batch with images ``(B, C, *spatial)``, B at least 2, and the label.
            randomize: Draw anew; False replays `last`.

        Returns:
            The batch with mixed images and target; nothing of the given batch is changed.

        Raises:
            BadInputError: If the batch does not fit, or does not fit the draw to replay.
        """
        images, size = self._images(data, channels=1)
        label_key, label = self._label(data)
        if not all(isinstance(value, Tensor) for value in (*images.values(), label)):
            raise BadInputError("expected a collated batch of tensors: use the mix after the DataLoader, not in it")
        self._check(images, size, label)
        mix: Mix = self._weigh(self._draw(size), next(iter(images.values())), label) if randomize else self._recorded()
        if (len(mix.partner), *mix.spatial) != size:
            raise BadInputError(
                f"expected to replay a batch of {len(mix.partner)} scans of shape {mix.spatial}, got {size[0]} of "
                f"{size[1:]}"
            )
        self.last = mix
        result = dict(data)
        for key, image in images.items():
            result[key] = wrapped(self._mix_image(plain(image), mix), image)
        result[label_key] = wrapped(self._mix_label(plain(label), mix), label)
        return result

    def _check(self, images: Mapping[str, Tensor], size: Shape, label: Tensor) -> None:
        if size[0] < 2:
            raise BadInputError("expected a batch of 2 or more, got 1: there is nothing to mix with")
        if label.ndim == 0 or len(label) != size[0]:
            raise BadInputError(f"expected a label for each of the {size[0]} images, got {describe(label)}")
        if label.ndim > 2 and tuple(label.shape[2:]) != size[1:]:
            raise BadInputError(
                f"expected the label of the images' spatial shape {size[1:]}, (B, 1 or K, *spatial), or of classes, "
                f"(B,) or (B, K), got {describe(label)}"
            )

    def _draw(self, size: Shape) -> Mix:
        # Each sample gets another one, and each is another's partner at most once.
        order = self.R.permutation(size[0])
        partner = np.empty_like(order)
        partner[order] = np.roll(order, 1)
        mixed = self.R.random_sample(size[0]) < self.prob
        return self._draw_mix(np.where(mixed, partner, np.arange(size[0])), mixed, tuple(size[1:]))

    def _draw_mix(self, partner: np.ndarray, mixed: np.ndarray, spatial: Shape) -> Mix:
        raise NotImplementedError

    def _weigh(self, mix: Mix, image: Tensor, label: Tensor) -> Mix:
        """The draw, with what follows from the data."""
        return mix

    def _mix_image(self, image: Tensor, mix: Mix) -> Tensor:
        raise NotImplementedError

    def _mix_label(self, label: Tensor, mix: Mix) -> Tensor:
        raise NotImplementedError


class BatchMix(DrawnWithin):
    """Mix of a batch given as two tensors, which the mix for dictionaries within knows as `image` and `label`."""

    def __call__(self, image: Tensor, label: Tensor, *, randomize: bool = True) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            image: ``(B, C, *spatial)``, B at least 2.
            label: As the dictionary version takes it.
            randomize: Draw anew; False replays `last`.

        Returns:
            Mixed images ``(B, C, *spatial)``, and their target.

        Raises:
            BadInputError: If the batch does not fit, or does not fit the draw to replay.
        """
        mixed = self.inner({"image": image, "label": label}, randomize)
        return mixed["image"], mixed["label"]


class SampleMixd(RecordedMix):
    """Mix of pieces or views of one sample.

    Args:
        keys: Images ``(C, *spatial)``; all get the same mix.
        label_key: Label map ``(1, *spatial)`` or one-hot ``(K, *spatial)``, or None.
        prob: Chance of a mix, in [0, 1].

    Raises:
        BadInputError: If an argument is out of range.
    """

    def __call__(self, data: Mapping[str, Any], randomize: bool = True) -> dict[str, Any]:
        """Mix a sample.

        Args:
            data: Sample with images ``(C, *spatial)``, arrays or tensors; or a ``Subject`` of TorchIO.
            randomize: Draw anew; False replays `last`.

        Returns:
            The sample with mixed images, and the label that belongs to them; nothing of the given one is changed.

        Raises:
            BadInputError: If the sample does not fit, or does not fit the draw to replay.
        """
        sample = open_sample(data, (*self.keys, self.label_key))
        if self.label_key is not None:
            self._label(sample)
        return close_sample(sample | self.mix(sample, randomize), data)

    def mix(self, sample: Mapping[str, Any], randomize: bool) -> dict[str, Any]:
        """Mix what a sample holds of the images and the label map.

        Args:
            sample: Sample with images ``(C, *spatial)``, arrays or tensors.
            randomize: Draw anew; False replays `last`.

        Returns:
            The mixed images and, where it changes, the label map, by key.

        Raises:
            BadInputError: If the sample does not fit, or does not fit the draw to replay.
        """
        parts, spatial = self._images(sample, channels=0)
        if self.label_key is not None and self.label_key in sample:
            label = sample[self.label_key]
            if tuple(getattr(label, "shape", ()))[1:] != spatial:
                raise BadInputError(
                    f"expected a label map (1 or K, *spatial) of the images' spatial shape {spatial}, got "
                    f"{describe(label)}: leave the label out if it is a class, which stays as it is"
                )
            parts[self.label_key] = label
        record = self._draw(spatial) if randomize else self._recorded()
        if record.spatial != spatial:
            raise BadInputError(f"expected to replay a scan of shape {record.spatial}, got {spatial}")
        self.last = record
        return {key: wrapped(value, parts[key]) for key, value in self._mix(sample, parts, record).items()}

    def _mix(self, data: Mapping[str, Any], parts: dict[str, Any], record: Any) -> dict[str, Tensor]:
        """Images and label map of the mixed sample."""
        raise NotImplementedError

    def _seed(self) -> int:
        return int(self.R.randint(2**32, dtype=np.uint32))

    def _augmented(
        self, transform: Callable[[Any], Any] | None, seed: int, data: Mapping[str, Any], piece: dict[str, Any]
    ) -> dict[str, Tensor]:
        """A piece or view of the sample as the user's transform leaves it, tested."""
        result = {**data, **piece} if transform is None else seeded(transform, seed)({**data, **piece})
        if not isinstance(result, Mapping):
            raise BadInputError(
                f"expected a dictionary from the inner transform, got {describe(result)}: give a dictionary transform "
                "that makes one sample of one"
            )
        tensors = {key: tensor(result[key]) for key in piece}
        for key, value in piece.items():
            check_shape(f"{key!r} of the inner transform", tensors[key], value)
        if self.label_key in piece:
            check_whole(tensors[self.label_key], piece[self.label_key])
        return tensors


class SampleMix(DrawnWithin):
    """Mix of pieces or views of one image given as an array, and of its label map if there is one.

    Args:
        inner: The same for dictionaries, with the keys `image` and `label`.
        transforms: What it applies to the image alone.
    """

    def __init__(self, inner: SampleMixd, transforms: Sequence[Callable[[Any], Any]]) -> None:
        super().__init__(inner)
        self.transforms = tuple(transforms)

    def __call__(self, image: Any, label: Any = None, *, randomize: bool = True) -> Any:
        """Mix an image.

        Args:
            image: ``(C, *spatial)``, array or tensor.
            label: Its label map ``(1, *spatial)`` or one-hot ``(K, *spatial)``. With one, all inner transforms must be
                such as leave the anatomy where it is: MONAI's for intensities, or corruptions.
            randomize: Draw anew; False replays `last`.

        Returns:
            The mixed image, of the same shape and type; with its label where one was given.

        Raises:
            BadInputError: If the sample does not fit, does not fit the draw to replay, or an inner transform may move
                the anatomy away from the label.
        """
        sample = {"image": image}
        if label is not None:
            for transform in self.transforms:
                check_in_place(transform, if_moves=_GIVE_LABEL, if_unknown=_GIVE_LABEL)
            sample["label"] = label
        mixed = sample | self.inner.mix(sample, randomize)
        return mixed["image"] if label is None else (mixed["image"], mixed["label"])
