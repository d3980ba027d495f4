"""The same extraction by an installed PyRadiomics, to compare with or to rest on."""

from __future__ import annotations

from typing import Any

import numpy as np

from medgen.radiomics.parameters import Parameters
from medgen.types import BadInputError, Spacing


def extract(
    image: np.ndarray, mask: np.ndarray, spacing: Spacing, parameters: Parameters, *, diagnostics: bool = False
) -> dict[str, float]:
    """Features of one region by PyRadiomics.

    Args:
        image: ``(Z, Y, X)`` or ``(Y, X)`` float64.
        mask: Bool of the same shape.
        spacing: Voxel edges in mm, in array order.
        parameters: Parameters without a quantum, which PyRadiomics does not know.
        diagnostics: Whether to keep its numeric diagnostics.

    Returns:
        Values by name.

    Raises:
        BadInputError: If PyRadiomics is not installed, or refuses the region.
    """
    try:
        import SimpleITK
        from radiomics import featureextractor, setVerbosity
    except ImportError as error:
        raise BadInputError(
            "engine: expected PyRadiomics to be installed, got none. "
            "Run `python -m pip install 'medgen[oracle]'`, which needs a C compiler, or use engine='medgen'."
        ) from error
    if parameters.quantum:
        raise BadInputError(f"engine: expected parameters without a quantum, got {parameters.quantum:g}.")
    setVerbosity(60)
    content: dict[str, Any] = {
        "imageType": {name: dict(own) for name, own in parameters.image_types.items()},
        "featureClass": {name: list(names) for name, names in parameters.feature_classes.items()},
        "setting": {**parameters.settings, "label": 1},
    }
    extractor = featureextractor.RadiomicsFeatureExtractor(content)
    images = []
    for array in (image, mask.astype(np.uint8)):
        picture = SimpleITK.GetImageFromArray(array)
        picture.SetSpacing(tuple(reversed(spacing)))
        images.append(picture)
    try:
        found = extractor.execute(*images)
    except (ValueError, RuntimeError) as error:
        raise BadInputError(f"PyRadiomics refuses the region: {error}") from error
    kept = {}
    for name, value in found.items():
        if not name.startswith("diagnostics_") or (diagnostics and isinstance(value, (int, float, np.number))):
            kept[name] = float(value)
    return kept
