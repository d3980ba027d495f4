"""What is said of each score: its name, which values are good, what it measures, and its paper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreWords:
    """What is said of a kind of score.

    Attributes:
        title: Its name.
        direction: Which values are good.
        meaning: What it measures, in one sentence.
        reference: Authors and year of its paper.
    """

    title: str
    direction: str
    meaning: str
    reference: str = ""


LOWER, HIGHER, NEAR_FLOOR = "lower is better", "higher is better", "best near the floor"
BY_TAIL = {"upper": LOWER, "lower": HIGHER, "both": NEAR_FLOOR}
SCORES = {
    "frechet": ScoreWords(
        "Fréchet distance",
        LOWER,
        "How far apart the mean and the spread of the network features lie. It rises as n falls.",
        "Heusel et al. 2017",
    ),
    "kernel": ScoreWords(
        "Kernel distance",
        LOWER,
        "How far apart the distributions of the network features lie (squared MMD, polynomial kernel). For like sets "
        "it is 0 on average at any n, and so at times below 0.",
        "Bińkowski et al. 2018",
    ),
    "gaussian_kernel": ScoreWords(
        "Gaussian kernel distance",
        LOWER,
        "The same with a Gaussian kernel on features of unit length; with CLIP features it would be CMMD.",
        "Jayasumana et al. 2024",
    ),
    "precision": ScoreWords(
        "Precision",
        HIGHER,
        "Share of the synthetic scans that lie among the real ones: do they look real?",
        "Kynkäänniemi et al. 2019",
    ),
    "recall": ScoreWords(
        "Recall",
        HIGHER,
        "Share of the real scans that lie among the synthetic ones: is the variety there?",
        "Kynkäänniemi et al. 2019",
    ),
    "density": ScoreWords(
        "Density",
        NEAR_FLOOR,
        "As precision, but counts how many real scans are near; about 1 for like sets.",
        "Naeem et al. 2020",
    ),
    "coverage": ScoreWords(
        "Coverage",
        HIGHER,
        "Share of the real scans that have a synthetic scan near by: gaps lower it.",
        "Naeem et al. 2020",
    ),
    "vendi": ScoreWords(
        "Vendi score",
        NEAR_FLOOR,
        "Effective number of different synthetic scans. It grows with n and says nothing about realism.",
        "Friedman and Dieng 2023",
    ),
}
FRD = {
    "frd-robust": ScoreWords(
        "FRD (frd-robust)",
        LOWER,
        "How far apart the radiomic features lie, per feature and symmetric: 0 for like sets at any n; 1 where the "
        "average feature is off by about one standard deviation.",
    ),
    "frd-v0": ScoreWords(
        "FRD (frd-v0)",
        LOWER,
        "Squared distance of radiomic features as frd-score computes it, for comparison with published values. It "
        "rises as n falls.",
        "Osuala et al. 2024",
    ),
    "frd-v1": ScoreWords(
        "FRD (frd-v1)",
        LOWER,
        "Natural logarithm of the squared distance of radiomic features as frd-score computes it, for comparison with "
        "published values. It rises as n falls, and may be below 0.",
        "Konz, Osuala et al. 2026",
    ),
}
