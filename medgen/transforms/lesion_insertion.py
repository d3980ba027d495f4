"""Lesions from elsewhere put into scans: a label map gets them, and the scan is made anew where it did."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms.transform import MapTransform
from monai.utils import convert_to_dst_type
from nibabel import orientations
from scipy import ndimage
from scipy.signal import fftconvolve

from medgen.generator import Generator, GeneratorConfig
from medgen.generator.scans import affine_of, check_place, give_back, grid_of, read_image, read_label
from medgen.synthesis import edit
from medgen.synthesis.inpainting import BAND, MARGIN
from medgen.transforms.subjects import close_sample, open_sample
from medgen.transforms.variation import Noising, Variation, check_prob
from medgen.transforms.workers import DrawnWithin, SeededInWorkers
from medgen.types import BadInputError, Grid, Shape

# Lesions that are tried in one scan before it is left as it is.
_MOST_TRIES = 10
_SPACING_TOLERANCE = 0.01


@dataclass(frozen=True, eq=False)
class _Lesion:
    """One connected part of a class, cut out; and the map that it was in."""

    mask: np.ndarray
    corner: tuple[int, ...]
    map_shape: Shape
    affine: np.ndarray | None

    @property
    def is_cut(self) -> bool:
        ends = zip(self.corner, self.mask.shape, self.map_shape, strict=True)
        return any(start == 0 or start + side == voxels for start, side, voxels in ends)


class _NoLesionError(BadInputError):
    """A label map has none."""


@dataclass(frozen=True, eq=False)
class Insertion:
    """What a lesion insertion draws.

    Attributes:
        covered: ``(H, W[, D])`` bool, voxels that become the lesion.
        noising: Strength and noise of what is made there.
    """

    covered: np.ndarray
    noising: Noising


class RandLesionInsertion(SeededInWorkers):
    """Put a lesion of another label map into a scan and its label.

    A lesion is a connected part of the class `value` in a label map, one of those given here or the one that comes with
    a scan, that no border of the map cuts. It gets a place drawn evenly among all where it lies in the field of view
    and covers classes of `within` only; a scan with no such place for any of ten lesions stays as it is. The scan is
    then made anew by :func:`medgen.synthesis.edit` where the label changed and `margin` voxels around. Beyond that and
    the blending band it is bit-identical.

    Take lesions from training cases only, or the cases that they come from leak.

    Its `last` holds the :class:`Insertion` of the last call, or None where the scan stayed.

    Args:
        generator: As for :class:`medgen.transforms.variation.Variation`, like all further options; label maps
            have to steer it.
        value: Class of the lesion in the label maps.
        within: Classes that it may cover.
        lesions: ``(1, H, W[, D])`` label maps to take lesions from, of the orientation and voxel size of the scans.
        move: Whether it gets a new place; False puts it where it is in its own map, as far as that lies `within`.
        prob: Chance of an insertion.
        band: Width of the blending band in voxels.
        margin: Voxels around the lesion that are made anew.
        strength: Share in (0, 1] of the noise process, or the two ends that it is drawn between; 1 makes it from noise.
        **options: ``num_inference_steps``, ``guidance_scale``, ``precision``, ``scaled_window``, ``device``.

    Raises:
        BadInputError: If a number is out of range, or a label map has no lesion.
    """

    def __init__(
        self,
        generator: Generator | str | Path,
        value: int,
        within: Sequence[int],
        lesions: Sequence[Any] = (),
        *,
        move: bool = True,
        prob: float = 0.1,
        band: int = BAND,
        margin: int = MARGIN,
        strength: float | tuple[float, float] = 1.0,
        **options: Any,
    ) -> None:
        check_prob(prob)
        super().__init__(prob)
        if value in within or not within:
            raise BadInputError(
                f"within: expected the classes that a lesion of class {value} may cover, got {list(within)}."
            )
        self.variation = Variation(generator, strength=strength, use_edges=False, **options)
        self.value, self.within, self.move = int(value), tuple(within), move
        self.band, self.margin = band, margin
        with_index = enumerate(lesions)
        self.lesions = [part for index, each in with_index for part in self._cut_out(each, f"lesions[{index}]")]
        self.last: Insertion | None = None
        self._has_warned = False

    def randomize(self, data: tuple[Any, Any, Any]) -> None:
        """Draw whether, which lesion, where, and its noise, into `last`.

        Args:
            data: Scan, label and lesion of a call.
        """
        self.last = self.draw(*data)

    def draw(self, img: Any, label: Any, lesion: Any) -> Insertion | None:
        """Draw whether, which lesion, where, and its noise.

        Args:
            img: ``(C, H, W[, D])``.
            label: ``(1, H, W[, D])`` class values.
            lesion: ``(1, H, W[, D])`` class values to take the lesion from; None for those of the transform.

        Returns:
            What was drawn; None to leave the scan.

        Raises:
            BadInputError: If there is no lesion, or something does not fit the model or the scan.
        """
        if self.R.rand() >= self.prob:
            return None
        with self.variation.model.use() as generator:
            before, grid = self._read(img, label, generator.config)
        lesions = self.lesions if lesion is None else self._of_partner(lesion)
        if not lesions:
            if lesion is None:
                raise BadInputError("lesion: expected a label map with one, or some given before, got none.")
            return None
        noising = self.variation.draw(self.R)
        free = np.isin(before.numpy(), self.within)
        for index in self.R.permutation(len(lesions))[:_MOST_TRIES]:
            covered = self._place(lesions[index], free, grid)
            if covered is not None:
                return Insertion(covered, noising)
        return None

    def __call__(self, img: Any, label: Any, lesion: Any = None, *, randomize: bool = True) -> tuple[Any, Any]:
        """Insert a lesion, or not.

        Args:
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values.
            lesion: ``(1, H, W[, D])`` class values, from which the lesion is taken; without it one of those given to
                the transform. A scan whose map has none stays as it is; a warning tells once.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            Scan and label, as they came.

        Raises:
            BadInputError: If there is no lesion, or something does not fit the model or the scan.
        """
        self.last = drawn = self.draw(img, label, lesion) if randomize else self.last
        return (img, label) if drawn is None else self.apply(drawn, img, label)

    def apply(self, drawn: Insertion, img: Any, label: Any) -> tuple[Any, Any]:
        """Insert a lesion as was drawn.

        Args:
            drawn: What was drawn.
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values, without the lesion.

        Returns:
            Scan and label, as they came.

        Raises:
            BadInputError: If something does not fit the model or the draw.
        """
        with self.variation.model.use() as generator:
            config = generator.config
            before, grid = self._read(img, label, config)
            if drawn.covered.shape != grid.shape:
                raise BadInputError(
                    f"image: expected the {drawn.covered.shape} voxels that the lesion was drawn for, got "
                    f"{grid.shape}. Bring all scans of a sample to the same voxels."
                )
            after = torch.where(torch.from_numpy(drawn.covered), torch.tensor(self.value), before)
            scan = read_image(img, config, self.variation.scaled_window)
            made = edit(
                generator,
                scan,
                before,
                grid=grid,
                new_label=after,
                seed=drawn.noising.seed,
                strength=drawn.noising.strength,
                band=self.band,
                margin=self.margin,
                settings=self.variation.settings(generator),
            )
            changed = give_back(made.image, img, config, self.variation.scaled_window)
        # What stays has the very bits that it had, whatever the way to the units of the model and back made of them.
        same = convert_to_dst_type(made.image == scan, img, dtype=torch.bool)[0]
        changed[same] = img[same]
        return changed, convert_to_dst_type(after[None], label)[0]

    def _read(self, img: Any, label: Any, config: GeneratorConfig) -> tuple[torch.Tensor, Grid]:
        """The label ``(H, W[, D])`` and where the scan lies."""
        grid = grid_of(img, config)
        values = read_label(label, grid.shape)
        check_place(img, label, "label")
        if unknown := sorted({self.value, *self.within} - set(config.class_names)):
            raise BadInputError(
                f"value and within: expected classes of the model '{config.name}', {sorted(config.class_names)}, "
                f"got {unknown}."
            )
        return values, grid

    def _of_partner(self, lesion: Any) -> list[_Lesion]:
        """Lesions of a map that came with a scan; many cases of a data set have none."""
        try:
            return self._cut_out(lesion, "lesion", parts=self.move)
        except _NoLesionError as error:
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{error} Its scan stays as it is (told once)", stacklevel=4)
            return []

    def _cut_out(self, label: Any, name: str, *, parts: bool = True) -> list[_Lesion]:
        """Connected parts of the class in a label map, or all of them as one."""
        values = read_label(label, tuple(label.shape[1:]), name=name).numpy()
        mask = values == self.value
        if not mask.any():
            raise _NoLesionError(
                f"{name}: expected voxels of class {self.value}, got {np.unique(values).tolist()} only. Leave it out."
            )
        numbered = ndimage.label(mask, np.ones((3,) * mask.ndim))[0] if parts else mask.astype(int)
        found = [
            _Lesion(numbered[box] == index, tuple(side.start for side in box), mask.shape, affine_of(label))
            for index, box in enumerate(ndimage.find_objects(numbered), start=1)
        ]
        whole = [lesion for lesion in found if not (parts and lesion.is_cut)]
        if not whole:
            raise _NoLesionError(
                f"{name}: expected a part of class {self.value} that the border of the map does not cut, got none. "
                "Leave it out."
            )
        return whole

    def _place(self, lesion: _Lesion, free: np.ndarray, grid: Grid) -> np.ndarray | None:
        """Voxels that a lesion covers, or None where it has no place."""
        _check_voxels(lesion, grid)
        covered = np.zeros(grid.shape, dtype=bool)
        corner = lesion.corner
        if self.move:
            if any(side > voxels for side, voxels in zip(lesion.mask.shape, grid.shape, strict=True)):
                return None
            # Voxels of the lesion that would lie on something else, for each place of its corner.
            blocked = fftconvolve((~free).astype(float), np.flip(lesion.mask).astype(float), mode="valid")
            places = np.argwhere(blocked < 0.5)
            if not len(places):
                return None
            corner = tuple(places[self.R.randint(len(places))])
        elif lesion.map_shape != grid.shape:
            raise BadInputError(
                f"lesion: expected the voxels of the scan {grid.shape}, got {lesion.map_shape}. Set move to True."
            )
        box = tuple(slice(start, start + side) for start, side in zip(corner, lesion.mask.shape, strict=True))
        covered[box] = lesion.mask
        covered &= free
        return covered if covered.any() else None


class RandLesionInsertiond(DrawnWithin, MapTransform):
    """Dictionary version of :class:`RandLesionInsertion`; scans of one sample get the same lesion, of the same noise.

    Args:
        keys: Scans.
        label_key: Their label map, which gets the lesion.
        generator: As for :class:`RandLesionInsertion`, like all further options.
        value: Class of the lesion.
        within: Classes that it may cover.
        lesions: Label maps to take lesions from.
        lesion_key: Label map of the sample to take it from instead. Where it has no lesion, the sample stays as it is,
            and a warning tells once.
        prob: Chance of an insertion.
        allow_missing_keys: Whether a scan may be missing.
        **options: As for :class:`RandLesionInsertion`.

    Raises:
        BadInputError: As for :class:`RandLesionInsertion`.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: Hashable,
        generator: Generator | str | Path,
        value: int,
        within: Sequence[int],
        lesions: Sequence[Any] = (),
        *,
        lesion_key: Hashable | None = None,
        prob: float = 0.1,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if (lesion_key is None) == (not lesions):
            got = "neither" if lesion_key is None else "both"
            raise BadInputError(f"lesions: expected some, or a lesion_key, got {got}. Give one of them.")
        self.label_key, self.lesion_key = label_key, lesion_key
        DrawnWithin.__init__(self, RandLesionInsertion(generator, value, within, lesions, prob=prob, **options))

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> Any:
        """Insert a lesion into the scans of a sample, or not.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.
            randomize: Whether to draw anew; False replays `last`.

        Returns:
            A new one of the same kind.

        Raises:
            BadInputError: If a key is missing or something does not fit.
        """
        done = open_sample(data, (*self.keys, self.label_key, self.lesion_key))
        for name, wanted in (("label_key", self.label_key), ("lesion_key", self.lesion_key)):
            if wanted is not None and wanted not in done:
                raise BadInputError(f"{name}: expected {wanted!r} in the sample, got {sorted(map(str, done))}. Add it.")
        present = list(self.key_iterator(done))
        if not present:
            return close_sample(done, data)
        before, lesion = done[self.label_key], None if self.lesion_key is None else done[self.lesion_key]
        self.last = drawn = self.inner.draw(done[present[0]], before, lesion) if randomize else self.last
        if drawn is not None:
            for key in present:
                done[key], done[self.label_key] = self.inner.apply(drawn, done[key], before)
        return close_sample(done, data)


def _check_voxels(lesion: _Lesion, scan: Grid) -> None:
    """Refuse a lesion that would be turned or stretched."""
    dims = scan.spatial_dims
    if lesion.mask.ndim != dims:
        raise BadInputError(f"lesion: expected a label map of {dims} axes, got one of {lesion.mask.ndim}.")
    if lesion.affine is None or not scan.known:
        return
    own = Grid(lesion.map_shape, lesion.affine)
    codes = ["".join(orientations.aff2axcodes(grid.affine)[:dims]) for grid in (own, scan)]
    if codes[0] != codes[1] or not np.allclose(own.spacing, scan.spacing, rtol=_SPACING_TOLERANCE):
        got, wanted = (
            f"{code} at {' x '.join(f'{value:.3g}' for value in grid.spacing)} mm"
            for code, grid in zip(codes, (own, scan), strict=True)
        )
        raise BadInputError(
            f"lesion: expected the orientation and voxels of the scan, {wanted}, got {got}. Give both to Orientationd "
            "and Spacingd first."
        )


RandLesionInsertionD = RandLesionInsertionDict = RandLesionInsertiond
