"""PyRadiomics's feature names in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from medgen.report.feature_vocabulary import DIAGNOSTICS, FILTERS, MEANINGS
from medgen.report.numbers import listed

_SHORT = {"firstorder": "first order", "shape": "shape", "shape2D": "2D shape"}


@dataclass(frozen=True)
class FeatureWords:
    """A feature in words.

    Attributes:
        meaning: What it measures.
        feature: Class and name, as papers call it.
        image: What of the image it looks at; empty for the image itself.
        filter: The filter that shows it; empty likewise.
    """

    meaning: str
    feature: str
    image: str
    filter: str


def describe_feature(name: str) -> FeatureWords:
    """Take a feature's name apart.

    Args:
        name: As PyRadiomics has it, with or without ``original_``, or with ``channel0_`` before it.

    Returns:
        Its parts in words; a name that is not known is its own meaning.
    """
    channel = re.match(r"channel(\d+)_", name)
    rest = name[channel.end() :] if channel else name
    if rest.startswith("diagnostics_"):
        described = _diagnostic(rest)
    else:
        image, group, feature = ["original", "", *rest.split("_")][-3:]
        meaning = MEANINGS.get(group, {}).get(feature)
        seen, by = _image_in_words(image)
        described = FeatureWords(meaning or rest, f"{_SHORT.get(group, group.upper())} {feature}", seen, by)
        if meaning is None:
            described = FeatureWords(rest, "", "", "")
    if channel is None:
        return described
    image = ", ".join(filter(None, (f"channel {int(channel[1]) + 1}", described.image)))
    return FeatureWords(described.meaning, described.feature, image, described.filter)


def feature_in_words(name: str) -> str:
    """A feature's name as a phrase.

    Args:
        name: As PyRadiomics has it.

    Returns:
        Text such as "contrast of neighboring gray levels (GLCM Contrast), fine detail from top to bottom (wavelet LH)".
    """
    words = describe_feature(name)
    parts = ((words.meaning, words.feature), (words.image, words.filter))
    return ", ".join(f"{text} ({term})" if term else text for text, term in parts if text)


def _image_in_words(image: str) -> tuple[str, str]:
    if image in ("", "original"):
        return "", ""
    if wavelet := re.fullmatch(r"wavelet(\d*)-([LH]+)", image):
        level, letters = wavelet[1], wavelet[2]
        return _band_in_words(letters, "fine" if not level else "coarser"), f"wavelet{level} {letters}"
    if log := re.fullmatch(r"log-sigma-(\d+(?:-\d+)?)-mm-[23]D", image):
        sigma = f"{float(log[1].replace('-', '.')):g} mm"
        return f"edges and spots of about {sigma} (pixels, where their size is unknown)", f"LoG σ = {sigma}"
    return FILTERS.get(image, (image, ""))


def _band_in_words(letters: str, size: str) -> str:
    """The letters run x, y and, in volumes, z; H is what changes quickly along that axis."""
    high = [axis for axis, letter in zip("xyz", letters, strict=False) if letter == "H"]
    if not high:
        return "smoothed image" if size == "fine" else "image smoothed again"
    if len(letters) == 2:
        ways = {"x": "detail from side to side", "y": "detail from top to bottom", "xy": "diagonal detail"}
        return f"{size} {ways[''.join(high)]}"
    return f"{size} detail along {listed(high)}"


def _diagnostic(name: str) -> FeatureWords:
    _, source, value = (*name.split("_"), "", "")[:3]
    kind, _, step = source.partition("-")
    when = "as read" if step == "original" else "after resampling"
    of = "the region" if kind == "Mask" else "the whole image"
    if value not in DIAGNOSTICS:
        return FeatureWords(name, "", "", "")
    return FeatureWords(f"{DIAGNOSTICS[value]} of {of} {when}", f"diagnostics {source} {value}", "", "")
