"""The methods paragraph of a paper, from what a report recorded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from medgen.report.numbers import count, finite, listed, number
from medgen.report.rows import Row, score_rows, was_split
from medgen.report.score_words import SCORES

_EXTRACTORS = {
    "efficientnet-lite0": "EfficientNet-Lite0 (Tan and Le 2019) with ImageNet weights",
    "inception": "Inception (Szegedy et al. 2016) with the weights of FID",
    "radimagenet": "ResNet-50 with RadImageNet weights (Mei et al. 2022)",
    "medicalnet": "3D ResNet with MedicalNet weights (Chen et al. 2019)",
}
_PROPER = ("frechet", "gaussian_kernel", "vendi")  # scores that keep the capital of a name
_FRD = {
    "frd-robust": "frd-robust (medgen: asinh-compressed features, pooled within-set scaling with a floor, covariances "
    "shrunk after Ledoit and Wolf 2004, small-sample bias taken off by random splits; symmetric; permutation test on "
    "at most 60 scans a set, jackknife interval)",
    "frd-v0": "frd-v0 (Osuala et al. 2024, as frd-score 1.0.1)",
    "frd-v1": "frd-v1 (Konz, Osuala et al. 2026, as frd-score 1.0.1: natural logarithm of the squared distance)",
}


def methods_paragraph(report: dict[str, Any]) -> str:
    """Describe an evaluation for a paper.

    Args:
        report: Content of ``report.json``.

    Returns:
        One paragraph of plain text.
    """
    parts = (_data, _features, _distances, _statistics, _radiomics, _similarity, _memorization, _utility, _software)
    return " ".join(sentence for part in parts for sentence in part(report))


def _data(report: dict[str, Any]) -> Iterator[str]:
    real, synthetic = report["real"], report["synthetic"]
    kind = f"{report['spatial_dims']}D" + (" color" if report.get("rgb") else "")
    of = f" of {count(real['patients'], 'patient')}" if real.get("patients") else ""
    if was_split(report):
        yield (
            f"{synthetic['scans']} synthetic {kind} scans were compared with the {real['val']} validation scans of "
            f"{real['scans']} real ones{of}; {real['train']} were the training part ({real['split']})."
        )
    else:
        yield (
            f"{synthetic['scans']} synthetic {kind} scans were compared with {real['scans']} real ones{of}, without a "
            f"validation part; real scans were compared among themselves by {real['split']}."
        )


def _features(report: dict[str, Any]) -> Iterator[str]:
    extractor = report["extractor"]
    name = _EXTRACTORS.get(extractor["name"], extractor["name"])
    views = extractor.get("views") or []
    seen = f" per view ({listed(views)}; distances are means over the views)" if len(views) > 1 else ""
    yield (
        f"Each scan was described by {extractor['num_features']} features{seen} of {name} "
        f"(SHA-256 of the weights {extractor['weights_sha256'][:12]})."
    )
    steps = [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in extractor.get("preprocessing", {}).items()]
    if steps:
        yield f"Preprocessing: {'; '.join(steps)}."


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _distances(report: dict[str, Any]) -> Iterator[str]:
    named = []
    for row in score_rows(report):
        if row.key in (report.get("scores") or {}):
            title = row.words.title if row.key in _PROPER or row.words.title.isupper() else row.words.title.lower()
            reference = SCORES[row.key].reference if row.key in SCORES else ""
            named.append(f"{title} ({reference})" if reference else title)
    if named:
        yield f"Scores of these features: {listed(named)}."


def _statistics(report: dict[str, Any]) -> Iterator[str]:
    scores = list((report.get("scores") or {}).values())
    if not scores:
        return
    units = "whole patients" if report["real"].get("patients") else "scans, whose patients are not known"
    if first := next((score for score in scores if score.get("interval")), None):
        yield (
            f"Intervals are {100 * first['confidence']:.0f} % confidence intervals by the delete-half jackknife (Shao "
            f"and Wu 1989; {first['resamples']} half-samples of {units})."
        )
    if first := next((score for score in scores if finite(score.get("floor")) is not None), None):
        sizes = f"{first['floor_n'][0]} against {first['floor_n'][1]} scans" if first.get("floor_n") else "the same n"
        kind = "the validation part against the training part" if was_split(report) else first["floor_kind"]
        draws = f"; mean of {first['floor_draws']} draws" if first["floor_draws"] > 1 else ""
        yield f"As a floor, the same scores were taken between real scans ({kind}; {sizes}{draws})."
    else:
        yield "No real-versus-real floor was available."
    tested = [score for score in scores if finite(score.get("p_value")) is not None]
    if tested:
        yield (
            f"P-values are those of permutation tests ({tested[0]['permutations']} relabelings of {units}), not "
            "corrected for the number of scores."
        )
    if finite((report["scores"].get("frechet") or {}).get("extrapolated")) is not None:
        yield "The value at infinite n was extrapolated (Chong and Forsyth 2020)."


def _radiomics(report: dict[str, Any]) -> Iterator[str]:
    frd = report.get("frd") or {}
    if not frd:
        return
    protocols = listed([_FRD.get(name, name) for name in frd])
    first = next(iter(frd.values()))
    yield (
        "Radiomic features follow PyRadiomics (van Griethuysen et al. 2017) and were taken from the "
        f"{first.get('region', 'whole scans')}; the Fréchet radiomic distance (FRD) was computed by protocol "
        f"{protocols}, over {listed([_columns(row) for row in score_rows(report) if row.key in frd])}."
    )


def _columns(row: Row) -> str:
    return f"{row.d} features of {row.n[0]} real and {row.n[1]} synthetic scans"


def _similarity(report: dict[str, Any]) -> Iterator[str]:
    similarity = report.get("ms_ssim")
    if similarity:
        yield (
            f"Diversity is the mean MS-SSIM (Wang et al. 2003; {count(similarity['scales'], 'scale')}) of "
            f"{similarity['synthetic']['pairs']} random pairs of synthetic and {similarity['real']['pairs']} of real "
            "scans."
        )


def _memorization(report: dict[str, Any]) -> Iterator[str]:
    found = report.get("memorization")
    if not found:
        return
    alarms = finite(found.get("expected_false_alarms"))
    chance = "" if alarms is None else f", at most {number(alarms, digits=2)} false alarms being expected"
    yield (
        f"Each synthetic scan was aligned with its closest real {'training ' if was_split(report) else ''}scan over "
        "flips, rotations, shifts and scales; it counts as a copy where their correlation exceeds "
        f"{number(found['threshold'])}, a threshold from the similarity of real scans of different patients{chance}."
    )
    if apart := found.get("held_out"):
        yield f"The real scans outside the training part ({apart['searched']}) were searched by the same threshold."
    known = [name for name, key in _COPY_SCORES if finite(found.get(key)) is not None]
    if known:
        yield f"Further, {listed(known)} {'was' if len(known) == 1 else 'were'} computed."


_COPY_SCORES = (("AuthPct (Alaa et al. 2022)", "auth_pct"), ("C_T (Meehan et al. 2020)", "c_t"))


def _utility(report: dict[str, Any]) -> Iterator[str]:
    utility = report.get("utility")
    if not utility:
        return
    effort = next((f"{utility[key]} {key}" for key in ("steps", "epochs") if utility.get(key)), "equal effort")
    yield (
        f"For utility, one segmenter each was trained for {effort} on real scans, on synthetic scans and on both, and "
        f"tested on real validation scans by the Dice score of {listed([str(name) for name in utility['classes']])}."
    )
    if utility.get("adherence"):
        yield "Adherence is the Dice score of the real-trained segmenter on synthetic scans against their labels."


def _software(report: dict[str, Any]) -> Iterator[str]:
    versions = (report.get("runtime") or {}).get("versions") or {}
    named = [f"{name} {versions[name]}" for name in ("medgen", "python", "torch", "numpy") if name in versions]
    software = f"Software: {listed(named)}; s" if named else "S"
    yield f"{software}eed {report['seed']}."
