"""Better predictions at test time, and how sure they are, for any segmenter."""

from medgen.test_time.aggregate import Agreement, Consensus
from medgen.test_time.augment import GenerativeTTA, Prediction
from medgen.test_time.geometric import Flip, Pose, change_intensities, flips, random_pose
from medgen.test_time.run import predict
from medgen.test_time.segmenter import Segmenter
from medgen.test_time.views import GenerativeViews, ViewSettings

__all__ = [
    "Agreement",
    "Consensus",
    "Flip",
    "GenerativeTTA",
    "GenerativeViews",
    "Pose",
    "Prediction",
    "Segmenter",
    "ViewSettings",
    "change_intensities",
    "flips",
    "predict",
    "random_pose",
]
