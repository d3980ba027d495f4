"""The picture of an evaluation: real and synthetic scans in one window, and each score beside its real counterpart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medgen.pictures import Plane, cut_planes
from medgen.provenance import atomic_path
from medgen.types import Sample

_REAL, _SYNTHETIC, _INK = "#56748c", "#e08214", "#222222"
_PLANES = ("axial", "coronal", "sagittal")
DIVERSITY_MARGIN = 0.05  # MS-SSIM of synthetic scans within this of the real ones counts as equally diverse


def draw_report(report: dict[str, Any], real: Sequence[Sample], synthetic: Sequence[Sample], path: Path) -> None:
    """Draw scans and scores of a report.

    Args:
        report: What :func:`medgen.evaluation.evaluate` returns.
        real: Real scans to show, image ``(C, H, W[, D])`` in [0, 1]; those of known orientation are in radiological
            display (patient right at the left) with letters at the edges.
        synthetic: Synthetic scans, likewise; shown in the same window.
        path: PNG to write.
    """
    rows_per_set = 3 if real[0].grid.spatial_dims == 3 else 1
    columns = max(len(real), len(synthetic))
    scans_height = 2 * rows_per_set * 1.35 + 1.0
    figure = Figure(figsize=(12, scans_height + 3.9), facecolor="white")
    FigureCanvasAgg(figure)
    panels: Any = figure.subfigures(2, 1, height_ratios=[scans_height, 3.9])
    upper, lower = panels
    upper.suptitle("Real and synthetic scans, chosen at random, in one gray window", fontsize=13, color=_INK)
    grid = upper.subplots(2 * rows_per_set, columns, squeeze=False)
    upper.subplots_adjust(left=0.09, right=0.995, top=1 - 0.45 / scans_height, bottom=0.02, wspace=0.04, hspace=0.04)
    for block, (name, scans, color) in enumerate((("real", real, _REAL), ("synthetic", synthetic, _SYNTHETIC))):
        rows = grid[block * rows_per_set : (block + 1) * rows_per_set]
        for axes in rows.flat:
            axes.set_axis_off()
        for column, scan in enumerate(scans):
            if scan.image is not None:
                for axes, plane in zip(rows[:, column], cut_planes(scan.image, scan.grid), strict=True):
                    _show(axes, plane)
        for row, plane_name in zip(rows, _PLANES, strict=False):
            label = f"{name}\n{plane_name}" if rows_per_set == 3 else name
            row[0].text(
                -0.08, 0.5, label, transform=row[0].transAxes, ha="right", va="center", color=color, weight="bold"
            )
    left, right = lower.subplots(1, 2)
    lower.subplots_adjust(left=0.16, right=0.97, top=0.8, bottom=0.27, wspace=0.42)
    _draw_distances(left, report["frechet_distance"])
    _draw_diversity(right, report["ms_ssim"])
    extractor = report["extractor"]
    lower.text(
        0.5,
        0.03,
        f"{extractor['name']} ({extractor['weights_sha256'][:8]}), {', '.join(extractor['views'])}; "
        f"real: {report['real']['split']}; seed {report['seed']}. Details in report.json.",
        ha="center",
        fontsize=8,
        color="#555555",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _show(axes: Axes, plane: Plane) -> None:
    picture = plane.image if plane.image.shape[-1] == 3 else plane.image[..., 0]
    height, width = plane.pixel
    axes.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect=height / width)
    outline = [patheffects.withStroke(linewidth=2, foreground="black")]
    style: dict[str, Any] = {"transform": axes.transAxes, "color": "white", "fontsize": 8, "path_effects": outline}
    axes.text(0.03, 0.5, plane.left, ha="left", va="center", **style)
    axes.text(0.5, 0.97, plane.top, ha="center", va="top", **style)


def _draw_distances(axes: Axes, frechet: dict[str, Any]) -> None:
    rows = (
        ("floor", "real train\nto real val", _REAL),
        ("synthetic_to_val", "synthetic\nto real val", _SYNTHETIC),
        ("synthetic_to_train", "synthetic\nto real train", _SYNTHETIC),
    )
    floor = frechet["floor"]["median"]
    _bars(
        axes,
        [label for _, label, _ in rows],
        [frechet[key]["median"] for key, _, _ in rows],
        [frechet[key]["range"] for key, _, _ in rows],
        [color for _, _, color in rows],
    )
    axes.axvline(floor, color=_REAL, linestyle="--", linewidth=1)
    ratio = frechet["ratio_to_floor"]
    times = "" if ratio is None else f": {ratio:.2f} times the floor"
    axes.set_title(f"Fréchet distance{times}", fontsize=12, color=_INK, loc="left")
    axes.set_xlabel(
        f"lower is closer; n = {frechet['n']} a side, d = {frechet['d']}; "
        f"median and range of {frechet['subsets']} subsets",
        fontsize=8,
    )


def _draw_diversity(axes: Axes, diversity: dict[str, Any]) -> None:
    rows = [("real", "real", _REAL), ("synthetic", "synthetic", _SYNTHETIC)]
    if diversity["synthetic_one_label"]:
        rows.append(("synthetic_one_label", "synthetic,\none label", _SYNTHETIC))
    real = diversity["real"]["mean"]
    axes.axvspan(real - DIVERSITY_MARGIN, real + DIVERSITY_MARGIN, color=_REAL, alpha=0.15, linewidth=0)
    scores = [diversity[key] for key, _, _ in rows]
    _bars(
        axes,
        [label for _, label, _ in rows],
        [score["mean"] for score in scores],
        [(score["mean"] - score["std"], score["mean"] + score["std"]) for score in scores],
        [color for _, _, color in rows],
    )
    axes.set_title("Similarity of random pairs (MS-SSIM)", fontsize=12, color=_INK, loc="left")
    axes.set_xlabel(
        f"lower is more diverse; band: real ± {DIVERSITY_MARGIN}; "
        f"whiskers: std over {diversity['real']['pairs']} pairs; {diversity['scales']} scales",
        fontsize=8,
    )


def _bars(
    axes: Axes, labels: list[str], values: list[float], ranges: Sequence[Sequence[float]], colors: list[str]
) -> None:
    positions = range(len(values))
    below = [max(value - low, 0) for value, (low, _) in zip(values, ranges, strict=True)]
    above = [max(high - value, 0) for value, (_, high) in zip(values, ranges, strict=True)]
    axes.barh(positions, values, color=colors, height=0.62)
    axes.errorbar(values, positions, xerr=[below, above], fmt="none", ecolor=_INK, capsize=3, linewidth=1)
    reach = max(max(high for _, high in ranges), max(values), 1e-12)
    for position, (value, (_, high)) in enumerate(zip(values, ranges, strict=True)):
        axes.text(max(value, high) + 0.02 * reach, position, f"{value:.3g}", va="center", fontsize=10, color=_INK)
    axes.set_yticks(list(positions), labels)
    axes.set_xlim(0, 1.18 * reach)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
