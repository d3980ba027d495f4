"""A small segmenter by which scans are judged, the same for every set of them."""

from medgen.segmentation.preparation import Preparation, fit_preparation, load_pairs
from medgen.segmentation.segmenter import DivergedError, Pair, Recipe, score_segmenter, train_segmenter

__all__ = [
    "DivergedError",
    "Pair",
    "Preparation",
    "Recipe",
    "fit_preparation",
    "load_pairs",
    "score_segmenter",
    "train_segmenter",
]
