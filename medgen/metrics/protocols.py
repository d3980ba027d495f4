"""Named protocols of the Fréchet radiomic distance: which features, and which distance over them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from medgen.metrics.radiomic_distance import RadiomicDistance, frd_v0, frd_v1
from medgen.metrics.robust_distance import frd_robust
from medgen.radiomics import Parameters
from medgen.radiomics.parameters import FEATURES

_SIGMAS = (2.0, 3.0, 4.0, 5.0)
_V1_CLASSES = {
    "firstorder": (),
    "glcm": tuple(name for name in FEATURES["glcm"] if name not in ("MCC", "SumAverage")),
    "glrlm": (),
    "glszm": (),
    "ngtdm": (),
}
_V1_SETTINGS: dict[str, Any] = {
    "normalize": True,
    "normalizeScale": 100,
    "interpolator": "sitkBSpline",
    "padDistance": 10,
    "preCrop": True,
    "binWidth": 5,
    "voxelArrayShift": 300,
    "label": 1,
}
_DIAGNOSTICS = (
    *(f"diagnostics_Image-original_{name}" for name in ("Mean", "Minimum", "Maximum")),
    *(f"diagnostics_Mask-original_{name}" for name in ("VoxelNum", "VolumeNum")),
    *(f"diagnostics_Image-interpolated_{name}" for name in ("Mean", "Minimum", "Maximum")),
    *(f"diagnostics_Mask-interpolated_{name}" for name in ("VoxelNum", "VolumeNum", "Mean", "Minimum", "Maximum")),
)


@dataclass(frozen=True)
class Protocol:
    """One way to compute a Fréchet radiomic distance; its name goes with every value.

    Attributes:
        name: ``frd-v0``, ``frd-v1`` or ``frd-robust``.
        unit: What the value is.
        symmetric: Whether both sets are treated alike.
        distance: The distance over ``(N, D)`` and ``(M, D)`` features with column names.
    """

    name: str
    unit: str
    symmetric: bool
    distance: Callable[..., RadiomicDistance]

    def parameters(self, spatial_dims: int) -> Parameters:
        """What is extracted from a scan.

        Args:
            spatial_dims: 2 or 3.

        Returns:
            The parameters.
        """
        if self.name == "frd-v0":
            return Parameters()
        types: dict[str, dict[str, Any]] = {"Original": {}, "LoG": {"sigma": list(_SIGMAS)}, "Wavelet": {}}
        settings = {**_V1_SETTINGS, "resampledPixelSpacing": [2, 2] if spatial_dims == 2 else [2, 2, 2]}
        if spatial_dims == 3:
            settings["minimumROIDimensions"] = 1
        if self.name == "frd-v1" and spatial_dims == 2:
            # frd-score passes a volume of one slice, of which PyRadiomics makes no LoG, and says nothing.
            del types["LoG"]
        quantum = 1e-4 if self.name == "frd-robust" else 0.0
        return Parameters(types, _V1_CLASSES, settings, quantum)

    def columns(self, spatial_dims: int) -> tuple[str, ...]:
        """Names of the features, in the order of the columns.

        Args:
            spatial_dims: 2 or 3.

        Returns:
            PyRadiomics's names, without ``original_``.
        """
        parameters = self.parameters(spatial_dims)
        images = []
        for image_type in parameters.image_types:
            if image_type == "Original":
                images.append("")
            elif image_type == "LoG":
                images += [f"log-sigma-{str(sigma).replace('.', '-')}-mm-3D_" for sigma in _SIGMAS]
            else:
                images += [f"wavelet-{''.join(bands)}_" for bands in itertools.product("LH", repeat=spatial_dims)]
        shape = "shape2D" if spatial_dims == 2 else "shape"
        classes = [name for name in parameters.feature_classes if not name.startswith("shape") or name == shape]
        return (
            *(_DIAGNOSTICS if self.name == "frd-v1" else ()),
            *(
                f"{image}{group}_{name}"
                for image in images
                for group in classes
                if not image or not group.startswith("shape")
                for name in parameters.features_of(group)
            ),
        )

    def whole_mask(self, shape: tuple[int, ...]) -> np.ndarray:
        """The mask that stands for "no mask".

        Args:
            shape: Spatial shape of the scan.

        Returns:
            Ones; ``frd-v1`` leaves out one corner voxel.
        """
        mask = np.ones(shape, dtype=np.uint8)
        if self.name == "frd-v1":
            mask[(0,) * len(shape)] = 0
        return mask


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol("frd-v0", "squared distance of min-max scaled features", True, frd_v0),
        Protocol("frd-v1", "natural logarithm of the squared distance of z-scores", False, frd_v1),
        Protocol(
            "frd-robust",
            "squared distance per standardized feature, less that of equal distributions",
            True,
            frd_robust,
        ),
    )
}
