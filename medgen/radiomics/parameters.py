"""What to extract: image types, feature classes and settings, with PyRadiomics's names, from its parameter files."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pywt
import yaml

from medgen.radiomics import firstorder, glcm, ngtdm, sizes
from medgen.radiomics.filters import IMAGE_TYPES
from medgen.radiomics.resampling import INTERPOLATORS
from medgen.types import BadInputError

# Names of each class in the order of the output.
FEATURES: dict[str, tuple[str, ...]] = {
    "firstorder": tuple(name for name in firstorder.NAMES if name != "StandardDeviation"),
    "glcm": glcm.NAMES,
    "gldm": tuple(sizes.GLDM),
    "glrlm": tuple(sizes.GLRLM),
    "glszm": tuple(sizes.GLSZM),
    "ngtdm": ngtdm.NAMES,
    "shape": (
        "Elongation",
        "Flatness",
        "LeastAxisLength",
        "MajorAxisLength",
        "Maximum2DDiameterColumn",
        "Maximum2DDiameterRow",
        "Maximum2DDiameterSlice",
        "Maximum3DDiameter",
        "MeshVolume",
        "MinorAxisLength",
        "Sphericity",
        "SurfaceArea",
        "SurfaceVolumeRatio",
        "VoxelVolume",
    ),
    "shape2D": (
        "Elongation",
        "MajorAxisLength",
        "MaximumDiameter",
        "MeshSurface",
        "MinorAxisLength",
        "Perimeter",
        "PerimeterSurfaceRatio",
        "PixelSurface",
        "Sphericity",
    ),
}
# Only computed where they are named: each is a function of another feature.
DEPRECATED = {
    "firstorder": ("StandardDeviation",),
    "shape": ("Compactness1", "Compactness2", "SphericalDisproportion"),
    "shape2D": ("SphericalDisproportion",),
}


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _counting(value: Any) -> bool:
    return _natural(value) and value > 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _each(check: Callable[[Any], bool], lengths: range) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) in lengths and all(map(check, value))


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda value: value in names


_ANY_LENGTH = range(1, 1000)
_FEW = 12  # more names than this hide the message that lists them
# SimpleITK's, which only engine="pyradiomics" has.
_OTHER_INTERPOLATORS = (
    *("sitkGaussian", "sitkLabelGaussian", "sitkLabelLinear"),
    *(f"sitk{window}WindowedSinc" for window in ("Hamming", "Cosine", "Welch", "Lanczos", "Blackman")),
    *("sitkBSpline1", "sitkBSpline2", "sitkBSpline4", "sitkBSpline5"),
    *("sitkBSplineResampler", *(f"sitkBSplineResamplerOrder{order}" for order in range(1, 6))),
)
# Setting: what it must be, and the test for it.
_SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "minimumROIDimensions": ("1, 2 or 3", lambda value: _counting(value) and value <= 3),
    "minimumROISize": ("a positive whole number", _counting),
    "geometryTolerance": ("a positive number", _positive),
    "correctMask": ("true or false", _flag),
    "additionalInfo": ("true or false", _flag),
    "label": ("a positive whole number", _counting),
    "label_channel": ("a whole number from 0", _natural),
    "binWidth": ("a positive number", _positive),
    "binCount": ("a positive whole number", _counting),
    "normalize": ("true or false", _flag),
    "normalizeScale": ("a positive number", _positive),
    "removeOutliers": ("a positive number", _positive),
    "resampledPixelSpacing": ("2 or 3 lengths in mm from 0", _each(lambda v: _number(v) and v >= 0, range(2, 4))),
    "interpolator": (
        f"{', '.join(INTERPOLATORS)}, or with engine='pyradiomics' another interpolator of SimpleITK",
        _one_of(*INTERPOLATORS, *_OTHER_INTERPOLATORS),
    ),
    "padDistance": ("a whole number from 0", _natural),
    "distances": ("positive whole numbers", _each(_counting, _ANY_LENGTH)),
    "force2D": ("true or false", _flag),
    "force2Ddimension": ("0 (axial), 1 or 2", lambda value: _natural(value) and value <= 2),
    "resegmentRange": ("one or two numbers", _each(_number, range(1, 3))),
    "resegmentMode": ("absolute, relative or sigma", _one_of("absolute", "relative", "sigma")),
    "resegmentShape": ("true or false", _flag),
    "preCrop": ("true or false", _flag),
    "sigma": ("positive lengths in mm", _each(_positive, _ANY_LENGTH)),
    "start_level": ("a whole number from 0", _natural),
    "level": ("a positive whole number", _counting),
    "wavelet": (
        "a discrete wavelet of PyWavelets, such as coif1 or haar",
        lambda value: isinstance(value, str) and value in pywt.wavelist(kind="discrete"),
    ),
    "gradientUseSpacing": ("true or false", _flag),
    "lbp2DRadius": ("a positive number", _positive),
    "lbp2DSamples": ("a positive whole number", _counting),
    "lbp2DMethod": ("default, ror, uniform or var", _one_of("default", "ror", "uniform", "var")),
    "lbp3DLevels": ("a positive whole number", _counting),
    "lbp3DIcosphereRadius": ("a positive number", _positive),
    "lbp3DIcosphereSubdivision": ("a whole number from 0", _natural),
    "voxelArrayShift": ("a number", _number),
    "symmetricalGLCM": ("true or false", _flag),
    "weightingNorm": (
        "infinity, euclidean, manhattan or no_weighting",
        _one_of("infinity", "euclidean", "manhattan", "no_weighting"),
    ),
    "gldm_a": ("a whole number from 0", _natural),
}
# They steer feature maps voxel by voxel, which are not computed here; for a region PyRadiomics passes them over too.
_VOXEL_SETTINGS = ("kernelRadius", "maskedKernel", "initValue", "voxelBatch")
# None stands for "off" in PyRadiomics.
_MAY_BE_NONE = (
    "minimumROISize",
    "binCount",
    "removeOutliers",
    "resampledPixelSpacing",
    "resegmentRange",
    "weightingNorm",
    "geometryTolerance",
    "interpolator",
)
_SECTIONS = ("imageType", "featureClass", "setting", "voxelSetting")


@dataclass(frozen=True)
class Parameters:
    """What is extracted from a scan.

    Attributes:
        image_types: Settings of their own for each image type, by name from ``IMAGE_TYPES``; they override `settings`.
        feature_classes: Feature names for each class of ``FEATURES``; an empty tuple stands for all of them.
        settings: PyRadiomics settings by name; what is not named has PyRadiomics's default.
        quantum: Step to which intensities of derived images are rounded, so that no feature hangs on rounding errors of
            the filters; 0 keeps them, as PyRadiomics does.
    """

    image_types: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"Original": {}})
    feature_classes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(FEATURES, ()))
    settings: Mapping[str, Any] = field(default_factory=dict)
    quantum: float = 0.0

    def __post_init__(self) -> None:
        for name, own in self.image_types.items():
            _require_known(name, IMAGE_TYPES, "imageType")
            _check_settings(own, f"imageType {name}")
        for name, features in self.feature_classes.items():
            _require_known(name, FEATURES, "featureClass")
            for feature in features:
                _require_known(feature, (*FEATURES[name], *DEPRECATED.get(name, ())), f"featureClass {name}")
        _check_settings(self.settings, "setting")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Parameters:
        """Parameters from the content of a PyRadiomics parameter file.

        Args:
            content: Sections ``imageType``, ``featureClass``, ``setting`` and ``voxelSetting``, all optional.

        Returns:
            The parameters.

        Raises:
            BadInputError: If a section, name or value is none that PyRadiomics knows.
        """
        for section in content:
            _require_known(section, _SECTIONS, "parameters")
        for section in _SECTIONS:
            if not isinstance(content.get(section) or {}, Mapping):
                raise BadInputError(f"{section}: expected names with values, got {content[section]!r}.")
        settings = dict(content.get("setting") or {})
        for name in content.get("voxelSetting") or {}:
            _require_known(name, _VOXEL_SETTINGS, "voxelSetting")
        classes = content.get("featureClass") or dict.fromkeys(FEATURES)
        return cls(
            image_types={name: dict(own or {}) for name, own in (content.get("imageType") or {"Original": {}}).items()},
            feature_classes={name: tuple(names or ()) for name, names in classes.items()},
            settings={name: value for name, value in settings.items() if name not in _VOXEL_SETTINGS},
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Parameters:
        """Parameters from a PyRadiomics parameter file.

        Args:
            path: YAML or JSON file.

        Returns:
            The parameters.

        Raises:
            BadInputError: If the file cannot be read, or holds what PyRadiomics does not know.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise BadInputError(f"{path}: expected a YAML parameter file, got: {error}") from error
        if not isinstance(content, Mapping):
            raise BadInputError(f"{path}: expected sections such as imageType and setting, got {content!r}.")
        try:
            return cls.from_dict(content)
        except BadInputError as error:
            raise BadInputError(f"{path}: {error}") from error

    def with_settings(self, **settings: Any) -> Parameters:
        """The same parameters with other settings.

        Args:
            **settings: PyRadiomics settings by name.

        Returns:
            New parameters.

        Raises:
            BadInputError: If a setting or its value is none that PyRadiomics knows.
        """
        return replace(self, settings={**self.settings, **settings})

    def features_of(self, name: str) -> tuple[str, ...]:
        """Names of the features of one class.

        Args:
            name: Key of ``FEATURES``.

        Returns:
            The chosen names, all current ones where none were chosen, none where the class is off.
        """
        if name not in self.feature_classes:
            return ()
        return tuple(self.feature_classes[name]) or FEATURES[name]


def _check_settings(settings: Mapping[str, Any], where: str) -> None:
    for name, value in settings.items():
        _require_known(name, _SETTINGS, where)
        expected, check = _SETTINGS[name]
        if not (check(value) or (value is None and name in _MAY_BE_NONE)):
            raise BadInputError(f"{where} {name}: expected {expected}, got {value!r}.")


def _require_known(name: str, known: Iterable[str], where: str) -> None:
    names = list(known)
    if name in names:
        return
    if close := difflib.get_close_matches(str(name), names, n=1, cutoff=0.6):
        raise BadInputError(
            f"{where}: expected a name that PyRadiomics knows, got {name!r}. Did you mean {close[0]!r}?"
        )
    if len(names) <= _FEW:
        raise BadInputError(f"{where}: expected one of {', '.join(names)}, got {name!r}.")
    raise BadInputError(
        f"{where}: expected a name that PyRadiomics knows, such as {names[0]}, got {name!r}. "
        "The chapter 'Customizing the extraction' of its documentation lists them."
    )
