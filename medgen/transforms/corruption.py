"""Acquisition corruptions: families of artifacts per modality, each in five severities.

The five severities, most families and the qualities of JPEG are those of MedMNIST-C (Di Salvo et al. 2024,
arXiv:2406.17536). That works on 8-bit pictures of 224 pixels; here the artifacts of a scanner arise where they do in
the scanner (k-space, projections, counts of photons), in 2D and 3D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import Transform

from medgen.transforms.drawn import Changed, RandDrawn, RandDrawnd
from medgen.transforms.physics import kspace, noise, optics, picture, projection
from medgen.transforms.physics.signal import Frame, Image, on_signal
from medgen.types import BadInputError

_Apply = Callable[[torch.Tensor, float, np.random.RandomState, Frame], torch.Tensor]


@dataclass(frozen=True)
class _Family:
    """How a family acts, and its parameter at severities 1 to 5."""

    apply: _Apply
    strengths: tuple[float, float, float, float, float]


# Noise and speckle: standard deviation, in parts of the scan's range and of the signal. Motion: voxels and degrees.
# Blur: voxels. Ghosting: brightness of a ghost. Gibbs: part of k-space that is kept. Dose: part that is left. Bias
# field: standard deviation of its logarithm. Contrast: logarithm of gamma. Compression: quality. Microscopy: photons.
_BLUR = _Family(lambda x, s, rng, frame: optics.blur(x, s, frame.spacing), (0.5, 0.8, 1.2, 1.7, 2.3))
_CONTRAST = _Family(lambda x, s, rng, frame: optics.contrast(x, s, rng), (0.12, 0.24, 0.37, 0.52, 0.7))
_FIELD = _Family(lambda x, s, rng, frame: optics.bias_field(x, s, rng), (0.08, 0.16, 0.25, 0.36, 0.5))
# Cameras saturate where coils do not.
_LIGHT = replace(_FIELD, strengths=(0.04, 0.08, 0.13, 0.19, 0.27))
_JPEG = _Family(
    lambda x, s, rng, frame: picture.compression(x, int(s), color=False, axis=frame.upright), (50, 30, 15, 10, 7)
)
_COLOR_JPEG = replace(
    _JPEG,
    apply=lambda x, s, rng, frame: picture.compression(x, int(s), color=len(x) == 3, axis=frame.upright),
)

_ECHO = {
    "speckle": _Family(lambda x, s, rng, frame: noise.speckle(x, s, rng), (0.06, 0.11, 0.17, 0.25, 0.35)),
    "blur": _BLUR,
    "contrast": _CONTRAST,
    "compression": _JPEG,
}
_MODALITIES: dict[str, dict[str, _Family]] = {
    "mri": {
        "noise": _Family(lambda x, s, rng, frame: noise.rician(x, s, rng), (0.02, 0.04, 0.065, 0.095, 0.13)),
        "bias_field": _FIELD,
        "motion": _Family(
            lambda x, s, rng, frame: kspace.motion(x, s, rng, frame.spacing), (0.5, 1.0, 1.75, 2.75, 4.0)
        ),
        "ghosting": _Family(lambda x, s, rng, frame: kspace.ghosting(x, s, rng), (0.07, 0.14, 0.22, 0.32, 0.45)),
        "gibbs": _Family(lambda x, s, rng, frame: kspace.gibbs(x, s), (0.75, 0.6, 0.48, 0.38, 0.3)),
        "blur": _BLUR,
        "contrast": _CONTRAST,
    },
    "ct": {
        "low_dose": _Family(
            lambda x, s, rng, frame: projection.low_dose(x, s, rng, frame.upright),
            (1 / 4, 1 / 8, 1 / 14, 1 / 23, 1 / 36),
        ),
        "blur": _BLUR,
        # Hounsfield units are calibrated: they shift by tens with the voltage, not by hundreds.
        "contrast": replace(_CONTRAST, strengths=(0.03, 0.06, 0.1, 0.14, 0.2)),
        # 8 bits over the whole range of CT are coarse already.
        "compression": replace(_JPEG, strengths=(95, 85, 70, 50, 30)),
    },
    "xray": {
        "noise": _Family(
            lambda x, s, rng, frame: noise.radiograph_low_dose(x, s, rng), (0.4, 0.22, 0.13, 0.075, 0.045)
        ),
        "blur": _BLUR,
        "contrast": _CONTRAST,
        "compression": _JPEG,
    },
    "ultrasound": _ECHO,
    "oct": _ECHO,
    "histology": {
        "stain": _Family(lambda x, s, rng, frame: picture.stain(x, s, rng), (0.1, 0.2, 0.3, 0.4, 0.55)),
        "noise": _Family(lambda x, s, rng, frame: noise.gaussian(x, s, rng), (0.02, 0.04, 0.065, 0.095, 0.13)),
        "illumination": _LIGHT,
        "blur": _BLUR,
        "contrast": _CONTRAST,
        "compression": _COLOR_JPEG,
    },
    "microscopy": {
        "noise": _Family(lambda x, s, rng, frame: noise.shot(x, s, rng), (200, 90, 40, 18, 8)),
        "illumination": _LIGHT,
        "blur": _BLUR,
        "contrast": _CONTRAST,
        "compression": _COLOR_JPEG,
    },
}
# What DICOM (0008,0060) calls them.
_CODES = {
    "mr": "mri",
    "cr": "xray",
    "dx": "xray",
    "us": "ultrasound",
    "opt": "oct",
    "sm": "histology",
    "gm": "microscopy",
}
_COLORED = ("histology", "microscopy")
_SEVERITIES = (1, 2, 3, 4, 5)


def families(modality: str) -> tuple[str, ...]:
    """The families of corruptions that a modality has.

    Args:
        modality: ``mri``, ``ct``, ``xray``, ``ultrasound``, ``oct``, ``histology``, ``microscopy``, or DICOM's code.

    Returns:
        Their names.

    Raises:
        BadInputError: If the modality is not one of these.
    """
    return tuple(_MODALITIES[_known(modality)])


def _known(modality: str) -> str:
    name = _CODES.get(modality.lower(), modality.lower())
    if name not in _MODALITIES:
        raise BadInputError(
            f"modality: expected one of {', '.join(_MODALITIES)} or DICOM's {', '.join(_CODES).upper()}, "
            f"got {modality!r}. Take the one whose artifacts are nearest."
        )
    return name


@dataclass(frozen=True)
class Corruption(Transform):
    """One corruption of a scan: called with the same scan it gives the same voxels, anywhere.

    Intensities may have any unit: strengths are relative to the scan, from zero signal (0, or the lowest intensity
    where some are negative) to the 99.5th percentile, per channel except for colors. So MRI and CT come before
    z-scores, and CT with its padding clipped to air. Motion leaves the middle of k-space in place, so labels still fit.
    The slices of a volume, which CT projects and JPEG compresses one by one, lie across the axis closest to
    superior-inferior where an affine says which it is, else across the last.

    Attributes:
        name: A family of the modality, as :func:`families` lists them.
        severity: 1 (just visible) to 5 (hardly of use).
        modality: ``mri``, ``ct``, ``xray``, ``ultrasound``, ``oct``, ``histology``, ``microscopy``, or DICOM's code.
        seed: Of all that is drawn: noise, direction, poses. Give each scan its own. The draw does not depend on the
            severity, so that severities of one seed differ in strength alone.
    """

    name: str
    severity: int = 3
    modality: str = "mri"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what does not exist.

        Raises:
            BadInputError: If the family, the severity or the modality is not one of those that exist.
        """
        if self.name not in families(self.modality):
            raise BadInputError(
                f"corruption of {self.modality}: expected one of {', '.join(families(self.modality))}, "
                f"got {self.name!r}. Another modality may have it: see medgen.transforms.families."
            )
        if self.severity not in _SEVERITIES:
            raise BadInputError(f"severity: expected a whole number from 1 to 5, got {self.severity!r}.")

    def __call__(self, image: Image) -> Image:
        """Corrupt a scan.

        Args:
            image: ``(C, H, W[, D])`` of any unit, finite: array, tensor, MetaTensor or image of TorchIO.

        Returns:
            The scan in the same type, shape and units, with affine and metadata; integers become float32.

        Raises:
            BadInputError: If the image has another number of axes, is not finite, has a channel without signal, or
                has other than three channels where the stain of colors is to change.
        """
        channels = getattr(image, "shape", [0])[0]
        if self.name == "stain" and channels != 3:
            raise BadInputError(f"stain: expected red, green and blue, got {channels} channels.")
        modality = _known(self.modality)
        family = _MODALITIES[modality][self.name]
        rng = np.random.RandomState(self.seed)
        return on_signal(
            image,
            lambda signal, frame: family.apply(signal, family.strengths[self.severity - 1], rng, frame),
            together=modality in _COLORED and channels == 3,
        )


class RandCorruption(RandDrawn):
    """Corrupt a scan by a family and a severity that are drawn.

    Its `last` is the :class:`Corruption` of the last scan, or None if nothing was done.

    Args:
        modality: As for :class:`Corruption`.
        names: Families to draw from, or None for all of the modality.
        severities: Severities to draw from, 1 to 5.
        prob: Probability that a scan is corrupted, in [0, 1].

    Raises:
        BadInputError: If a family, a severity or the modality is not one of those that exist, or none is given, or
            `prob` is out of range.
    """

    def __init__(
        self,
        modality: str = "mri",
        names: Sequence[str] | None = None,
        severities: Sequence[int] = _SEVERITIES,
        prob: float = 0.1,
    ) -> None:
        super().__init__(prob)
        self.modality = modality
        self.names = tuple(names) if names is not None else families(modality)
        self.severities = tuple(severities)
        if not self.names or not self.severities:
            raise BadInputError("corruption: expected at least one family and one severity to draw from, got none.")
        for name in self.names:
            for severity in self.severities:
                Corruption(name, severity, modality)

    def draw_change(self) -> Corruption:
        """Draw what and how much.

        Returns:
            The corruption.
        """
        name = self.names[self.R.randint(len(self.names))]
        severity = self.severities[self.R.randint(len(self.severities))]
        return Corruption(name, severity, self.modality, int(self.R.randint(2**31 - 1)))


class Corruptiond(Changed):
    """Dictionary version of :class:`Corruption`: all keys get the same corruption; name no label among them.

    Args:
        keys: Keys of the scans.
        name: As for :class:`Corruption`.
        severity: Likewise.
        modality: Likewise.
        seed: Likewise, but all samples have it, so that their noise is the same: draws of their own come from
            :class:`RandCorruptiond`.
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If the family, the severity or the modality is not one of those that exist.
    """

    def __init__(
        self,
        keys: KeysCollection,
        name: str,
        severity: int = 3,
        modality: str = "mri",
        seed: int = 0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, Corruption(name, severity, modality, seed), allow_missing_keys=allow_missing_keys)


class RandCorruptiond(RandDrawnd):
    """Dictionary version of :class:`RandCorruption`: all keys get the same corruption; name no label among them.

    Args:
        keys: Keys of the scans.
        modality: As for :class:`Corruption`.
        names: Families to draw from, or None for all of the modality.
        severities: Severities to draw from, 1 to 5.
        prob: Probability that a sample is corrupted, in [0, 1].
        allow_missing_keys: Skip keys that a sample lacks.

    Raises:
        BadInputError: If a family, a severity or the modality is not one of those that exist, or none is given, or
            `prob` is out of range.
    """

    def __init__(
        self,
        keys: KeysCollection,
        modality: str = "mri",
        names: Sequence[str] | None = None,
        severities: Sequence[int] = _SEVERITIES,
        prob: float = 0.1,
        allow_missing_keys: bool = False,
    ) -> None:
        drawn = RandCorruption(modality, names, severities, prob)
        super().__init__(keys, drawn, allow_missing_keys=allow_missing_keys)


CorruptionD = CorruptionDict = Corruptiond
RandCorruptionD = RandCorruptionDict = RandCorruptiond
