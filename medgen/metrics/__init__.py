"""How real synthetic scans look and how much they vary: distances over features, and structural similarity."""

from __future__ import annotations

from medgen.metrics.authenticity import auth_pct, c_t
from medgen.metrics.copies import CopySearch, find_copies
from medgen.metrics.efficientnet_features import EfficientNetLite0Features
from medgen.metrics.extractor import FeatureExtractor, ModuleFeatures, build_extractor, published_name, stamp
from medgen.metrics.fid import FrechetDistance
from medgen.metrics.frd import FrechetRadiomicDistance
from medgen.metrics.frechet import frechet_distance, frechet_distance_from_features
from medgen.metrics.gaussian_kernel import GaussianKernelDistance, gaussian_kernel_distance
from medgen.metrics.kernel import KernelDistance, kernel_distance
from medgen.metrics.memorization import Memorization
from medgen.metrics.ms_ssim import ms_ssim, num_scales
from medgen.metrics.pose import apply_pose, summarize_pose
from medgen.metrics.prdc import PRDC, prdc
from medgen.metrics.score import Score
from medgen.metrics.statistics import score_features
from medgen.metrics.uncertainty import (
    aurc,
    calibration_error,
    error_map_auc,
    error_map_dice,
    generalized_energy_distance,
    normalized_cross_correlation,
    volume_cv,
)
from medgen.metrics.vendi import VendiScore, vendi_score

__all__ = [
    "PRDC",
    "CopySearch",
    "EfficientNetLite0Features",
    "FeatureExtractor",
    "FrechetDistance",
    "FrechetRadiomicDistance",
    "GaussianKernelDistance",
    "KernelDistance",
    "Memorization",
    "ModuleFeatures",
    "Score",
    "VendiScore",
    "apply_pose",
    "aurc",
    "auth_pct",
    "build_extractor",
    "c_t",
    "calibration_error",
    "error_map_auc",
    "error_map_dice",
    "find_copies",
    "frechet_distance",
    "frechet_distance_from_features",
    "gaussian_kernel_distance",
    "generalized_energy_distance",
    "kernel_distance",
    "ms_ssim",
    "normalized_cross_correlation",
    "num_scales",
    "prdc",
    "published_name",
    "score_features",
    "stamp",
    "summarize_pose",
    "vendi_score",
    "volume_cv",
]
