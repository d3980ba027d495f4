"""A small segmenter by which scans are judged, the same for every set of them."""

from medgen.segmentation.augmentation import CLASSICAL, UNCHANGED, Augmentation, Pair, augment
from medgen.segmentation.preparation import Preparation, fit_preparation, load_pairs
from medgen.segmentation.segmenter import (
    DivergedError,
    Recipe,
    build_segmenter,
    fit_network,
    score_segmenter,
    train_segmenter,
)

__all__ = [
    "CLASSICAL",
    "UNCHANGED",
    "Augmentation",
    "DivergedError",
    "Pair",
    "Preparation",
    "Recipe",
    "augment",
    "build_segmenter",
    "fit_network",
    "fit_preparation",
    "load_pairs",
    "score_segmenter",
    "train_segmenter",
]
