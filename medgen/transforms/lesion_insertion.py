"""Lesions from elsewhere put into scans: a label map gets them, and the scan is made anew where it did."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms.transform import MapTransform, RandomizableTransform
from monai.utils import convert_to_dst_type
from nibabel import orientations
from scipy import ndimage
from scipy.signal import fftconvolve

from medgen.generator import Generator
from medgen.synthesis import edit
from medgen.synthesis.inpainting import BAND, MARGIN
from medgen.transforms.scans import affine_of, check_place, give_back, grid_of, read_image, read_label
from medgen.transforms.variation import Variation, check_prob, draw_seed
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


class RandLesionInsertion(RandomizableTransform):
    """Put a lesion of another label map into a scan and its label.

    A lesion is a connected part of the class `value` in a label map, one of those given here or the one that comes with
    a scan, that no border of the map cuts. It gets a place drawn evenly among all where it lies in the field of view
    and covers classes of `within` only; a scan with no such place for any of ten lesions stays as it is. The scan is
    then made anew by :func:`medgen.synthesis.edit` where the label changed and `margin` voxels around. Beyond that and
    the blending band it is bit-identical.

    Take lesions from training cases only, or the cases that they come from leak.

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
        self._label: torch.Tensor | None = None
        self._strength, self._seed = 1.0, 0

    def randomize(self, data: tuple[torch.Tensor, Grid, Sequence[_Lesion]]) -> None:
        """Draw whether, which lesion, where, and its noise.

        Args:
            data: Label ``(H, W[, D])``, its grid, and the lesions.
        """
        label, grid, lesions = data
        self._label = None
        super().randomize(None)
        if not self._do_transform:
            return
        self._strength, self._seed = self.variation.draw_strength(self.R), draw_seed(self.R)
        free = np.isin(label.numpy(), self.within)
        for index in self.R.permutation(len(lesions))[:_MOST_TRIES]:
            covered = self._place(lesions[index], free, grid)
            if covered is not None:
                self._label = torch.where(torch.from_numpy(covered), torch.tensor(self.value), label)
                return

    def __call__(self, img: Any, label: Any, lesion: Any = None, randomize: bool = True) -> tuple[Any, Any]:
        """Insert a lesion, or not.

        Args:
            img: ``(C, H, W[, D])`` tensor, MetaTensor or array.
            label: ``(1, H, W[, D])`` class values.
            lesion: ``(1, H, W[, D])`` class values, from which the lesion is taken; without it one of those given to
                the transform.
            randomize: Whether to draw anew.

        Returns:
            Scan and label, as they came.

        Raises:
            BadInputError: If there is no lesion, or something does not fit the model or the scan.
        """
        with self.variation.model.use() as generator:
            config = generator.config
            grid = grid_of(img, config)
            before = read_label(label, grid.shape)
            check_place(img, label, "label")
            if unknown := sorted({self.value, *self.within} - set(config.class_names)):
                raise BadInputError(
                    f"value and within: expected classes of the model '{config.name}', {sorted(config.class_names)}, "
                    f"got {unknown}."
                )
            if randomize:
                lesions = self.lesions if lesion is None else self._cut_out(lesion, "lesion", parts=self.move)
                if not lesions:
                    raise BadInputError("lesion: expected a label map with one, or some given before, got none.")
                self.randomize((before, grid, lesions))
            if self._label is None:
                return img, label
            scan = read_image(img, config, self.variation.scaled_window)
            made = edit(
                generator,
                scan,
                before,
                grid=grid,
                new_label=self._label,
                seed=self._seed,
                strength=self._strength,
                band=self.band,
                margin=self.margin,
                settings=self.variation.settings(generator),
            )
            changed = give_back(made.image, img, config, self.variation.scaled_window)
        # What stays has the very bits that it had, whatever the way to the units of the model and back made of them.
        same = convert_to_dst_type(made.image == scan, img, dtype=torch.bool)[0]
        changed[same] = img[same]
        return changed, convert_to_dst_type(self._label[None], label)[0]

    def _cut_out(self, label: Any, name: str, *, parts: bool = True) -> list[_Lesion]:
        """Connected parts of the class in a label map, or all of them as one."""
        values = read_label(label, tuple(label.shape[1:]), name=name).numpy()
        mask = values == self.value
        if not mask.any():
            raise BadInputError(
                f"{name}: expected voxels of class {self.value}, got {np.unique(values).tolist()} only. Leave it out."
            )
        numbered = ndimage.label(mask, np.ones((3,) * mask.ndim))[0] if parts else mask.astype(int)
        found = [
            _Lesion(numbered[box] == index, tuple(side.start for side in box), mask.shape, affine_of(label))
            for index, box in enumerate(ndimage.find_objects(numbered), start=1)
        ]
        whole = [lesion for lesion in found if not (parts and lesion.is_cut)]
        if not whole:
            raise BadInputError(
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


class RandLesionInsertiond(RandomizableTransform, MapTransform):
    """Dictionary version of :class:`RandLesionInsertion`; scans of one sample get the same lesion, of the same noise.

    Args:
        keys: Scans.
        label_key: Their label map, which gets the lesion.
        generator: As for :class:`RandLesionInsertion`, like all further options.
        value: Class of the lesion.
        within: Classes that it may cover.
        lesions: Label maps to take lesions from.
        lesion_key: Label map of the sample to take it from instead.
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
        check_prob(prob)
        RandomizableTransform.__init__(self, prob)
        if (lesion_key is None) == (not lesions):
            got = "neither" if lesion_key is None else "both"
            raise BadInputError(f"lesions: expected some, or a lesion_key, got {got}. Give one of them.")
        self.label_key, self.lesion_key = label_key, lesion_key
        self.insert = RandLesionInsertion(generator, value, within, lesions, prob=1.0, **options)

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandLesionInsertiond:
        """Set the state that all draws come from.

        Args:
            seed: Of a new state.
            state: A state.

        Returns:
            Itself.
        """
        super().set_random_state(seed, state)
        self.insert.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Insert a lesion into the scans of a sample, or not.

        Args:
            data: The sample.

        Returns:
            The sample.

        Raises:
            BadInputError: If a key is missing or something does not fit.
        """
        done = dict(data)
        for name, wanted in (("label_key", self.label_key), ("lesion_key", self.lesion_key)):
            if wanted is not None and wanted not in done:
                raise BadInputError(f"{name}: expected {wanted!r} in the sample, got {sorted(map(str, done))}. Add it.")
        self.randomize(None)
        if not self._do_transform:
            return done
        before, lesion = done[self.label_key], None if self.lesion_key is None else done[self.lesion_key]
        for index, key in enumerate(self.key_iterator(done)):
            done[key], done[self.label_key] = self.insert(done[key], before, lesion, randomize=index == 0)
        return done


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
