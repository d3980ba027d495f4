"""How real synthetic scans look and how much they vary: distances over features, and structural similarity."""

from __future__ import annotations

from medgen.metrics.extractor import EfficientNetLite0Features
from medgen.metrics.fid import FrechetDistance
from medgen.metrics.frechet import frechet_distance, frechet_distance_from_features
from medgen.metrics.ms_ssim import ms_ssim, num_scales

__all__ = [
    "EfficientNetLite0Features",
    "FrechetDistance",
    "frechet_distance",
    "frechet_distance_from_features",
    "ms_ssim",
    "num_scales",
]
