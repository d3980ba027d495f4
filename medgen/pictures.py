"""Pictures that people judge scans by: contact sheets of a data set and sample grids of a training run."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from medgen.provenance import atomic_path
from medgen.types import BadInputError, Grid, Sample

_BACKGROUND, _INK, _FAINT = (16, 17, 20), (235, 235, 235), (150, 155, 165)
_GAP, _TEXT = 10, 20
_TILE = {2: 256, 3: 200}  # pixels of one panel's longer side
# Okabe and Ito's colors, which color-blind readers can tell apart, less the two that vanish on a dark ground.
_COLORS = ((230, 159, 0), (86, 180, 233), (0, 190, 130), (240, 228, 66), (204, 121, 167), (213, 94, 0))


@dataclass(frozen=True, eq=False)
class Plane:
    """One plane as it is shown, row 0 at the top.

    Attributes:
        image: ``(rows, columns, 1 or 3)`` in [0, 1], gray or color.
        label: ``(rows, columns)`` class indices, or None.
        pixel: Height and width of a pixel in mm.
        left: Letter of the patient's side at the left edge; empty where it is not known.
        top: Letter at the upper edge, likewise.
    """

    image: np.ndarray
    label: np.ndarray | None
    pixel: tuple[float, float]
    left: str = ""
    top: str = ""


def contact_sheet(
    samples: Iterable[Sample], path: Path, *, class_names: Mapping[int, str] | None = None, title: str = ""
) -> Path:
    """Show scans with and without their label, several to a page, on a dark ground.

    Scans with a known orientation are in radiological display (patient right at the left of the picture) with letters
    at the edges; volumes show the axial, coronal and sagittal plane that cuts most of the label. Each scan has its own
    gray window (percentiles 0.5 and 99.5); color scans are shown as stored.

    Args:
        samples: Scans with an image ``(C, H, W[, D])`` in source units, and a label or None; read one at a time.
        path: PNG to write.
        class_names: Names for the legend, by label value.
        title: First line of the sheet.

    Returns:
        The path.

    Raises:
        BadInputError: If there is no sample, or one has no image.
    """
    cells, dims, known, values = [], 2, True, set()
    for sample in samples:
        if sample.image is None:
            raise BadInputError(f"{sample.case}: expected a scan with an image, got none. Leave it out of the sheet.")
        image = _unit_range(sample.image.numpy())
        label = None if sample.label is None else sample.label.numpy()
        values |= set() if label is None else set(np.unique(label).tolist())
        dims, known = sample.grid.spatial_dims, known and sample.grid.known
        channels = sample.image.shape[0]
        note = f"  (channel 1 of {channels})" if image.shape[-1] == 1 and channels > 1 else ""
        cells.append(_cell(sample.case + note, _views(image, label, sample.grid), dims))
    display = "Radiological display: patient right is at the left." if known else "Rows and columns as stored."
    return _sheet(cells, path, title, display, _legend(values, class_names))


def sample_grid(
    images: torch.Tensor,
    labels: torch.Tensor | None,
    path: Path,
    *,
    captions: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Show a batch from the model grid, as at each validation of a training run.

    Args:
        images: ``(B, C, H, W[, D])`` in [-1, 1], which become black and white; volumes in (right, anterior, superior)
            order.
        labels: ``(B, H, W[, D])`` class indices, or None.
        path: PNG to write.
        captions: One line above each sample; None numbers them.
        class_names: Names for the legend, by class index.

    Returns:
        The path.

    Raises:
        BadInputError: If the batch is empty or a caption is missing.
    """
    dims = images.ndim - 2
    names = [f"{index}" for index in range(len(images))] if captions is None else list(captions)
    if len(names) != len(images) or dims not in (2, 3):
        raise BadInputError(
            f"sample grid: expected images (B, C, H, W[, D]) and one caption each, got shape {tuple(images.shape)} and "
            f"{len(names)} captions. Pass both for the same batch."
        )
    grid = Grid(tuple(images.shape[2:]), np.eye(4), known=False)
    cells = []
    for index, name in enumerate(names):
        image = np.clip((images[index].detach().float().cpu().numpy() + 1) / 2, 0, 1)
        label = None if labels is None else labels[index].detach().cpu().numpy()
        cells.append(_cell(name, _views(_channels_last(image), label, grid), dims))
    present = set() if labels is None else set(torch.unique(labels).tolist())
    return _sheet(
        cells, path, "", "Gray window fixed to the model range.", _legend(present, dict(enumerate(class_names or ())))
    )


def cut_planes(image: torch.Tensor, grid: Grid) -> list[Plane]:
    """Planes through the middle of a scan, turned for the reader as in :func:`contact_sheet`.

    Args:
        image: ``(C, H, W[, D])`` in [0, 1]; three channels in 2D are colors, else the first one is shown.
        grid: Where its voxels lie.

    Returns:
        The axial, coronal and sagittal plane of a volume; one plane in 2D.
    """
    return _views(_channels_last(image.detach().float().cpu().numpy()), None, grid)


def strip(scans: Sequence[tuple[str, torch.Tensor]], grid: Grid) -> Image.Image:
    """Scans of one grid side by side, in the display of :func:`contact_sheet`.

    Args:
        scans: Name and image ``(C, H, W[, D])`` in [0, 1] of each.
        grid: Where their voxels lie.

    Returns:
        The picture.
    """
    cells = [_cell(name, cut_planes(image, grid), grid.spatial_dims) for name, image in scans]
    size = (sum(cell.width for cell in cells) + _GAP * (len(cells) - 1), max(cell.height for cell in cells))
    picture = Image.new("RGB", size, _BACKGROUND)
    left = 0
    for cell in cells:
        picture.paste(cell, (left, 0))
        left += cell.width + _GAP
    return picture


def _channels_last(image: np.ndarray) -> np.ndarray:
    """Color stays ``(H, W, 3)``; anything else shows its first channel."""
    shown = image if image.shape[0] == 3 and image.ndim == 3 else image[:1]
    return np.moveaxis(shown, 0, -1)


def _unit_range(image: np.ndarray) -> np.ndarray:
    shown = _channels_last(image.astype(np.float32))
    if shown.shape[-1] == 3:
        return np.clip(shown / (255.0 if shown.max() <= 255 else 65535.0), 0, 1)
    low, high = np.percentile(shown, (0.5, 99.5))
    if high <= low:
        low, high = float(shown.min()), float(shown.max())
    return np.clip((shown - low) / max(float(high - low), 1e-12), 0, 1)


def _views(image: np.ndarray, label: np.ndarray | None, grid: Grid) -> list[Plane]:
    """Cut the planes to show from ``image (*spatial, 1 or 3)`` and turn them for the reader."""
    spacing = grid.spacing
    if grid.spatial_dims == 2 and not grid.known:
        return [Plane(image, label, (spacing[0], spacing[1]))]
    affine = np.array(grid.affine, dtype=np.float64)
    if grid.spatial_dims == 2:  # a slice is a volume of one voxel's thickness, and so knows which plane it is
        image, label = image[:, :, None], None if label is None else label[:, :, None]
        affine[:3, 2] = np.cross(affine[:3, 0], affine[:3, 1])
        spacing = (*spacing, 1.0)
    if grid.known:
        turn = nib.orientations.io_orientation(affine)
        image = nib.orientations.apply_orientation(image, turn)
        label = None if label is None else nib.orientations.apply_orientation(label, turn)
        spacing = tuple(spacing[int(axis)] for axis in np.argsort(turn[:, 0]))
    # Axes are now (right, anterior, superior); by convention no view puts the normal axis anywhere but behind.
    views = []
    for normal, across, up in ((2, 0, 1), (1, 0, 2), (0, 1, 2)):
        if grid.spatial_dims == 2 and image.shape[normal] != 1:
            continue
        position = _best_slice(label, normal, image.shape[normal])
        plane = np.take(image, position, axis=normal)[::-1, ::-1].swapaxes(0, 1)
        plane_label = None if label is None else np.take(label, position, axis=normal)[::-1, ::-1].T
        letters = ("RAS"[across] if across == 0 else "A", "RAS"[up]) if grid.known else ("", "")
        views.append(Plane(plane, plane_label, (spacing[up], spacing[across]), *letters))
        if grid.spatial_dims == 2:
            break
    return views


def _best_slice(label: np.ndarray | None, normal: int, size: int) -> int:
    if label is None or not (label > 0).any():
        return size // 2
    return int((label > 0).sum(axis=tuple(axis for axis in range(3) if axis != normal)).argmax())


def _cell(name: str, views: list[Plane], dims: int) -> Image.Image:
    """One scan: its name, its planes, and the same planes under the label (below in 3D, beside in 2D)."""
    tile = _TILE[dims]
    extents = [side * step for view in views for side, step in zip(view.image.shape[:2], view.pixel, strict=True)]
    scale = tile / max(extents)  # one scale for all planes, so that they fit together
    pictures = [[_draw(view, scale, tile, overlay=False) for view in views]]
    if any(view.label is not None for view in views):
        overlays = [_draw(view, scale, tile, overlay=True) for view in views]
        pictures = [pictures[0], overlays] if dims == 3 else [pictures[0] + overlays]
    cell = Image.new("RGB", (len(pictures[0]) * (tile + 2), _TEXT + 8 + len(pictures) * (tile + 2)), _BACKGROUND)
    ImageDraw.Draw(cell).text((2, 2), name, fill=_INK, font=ImageFont.load_default(_TEXT))
    for row, line in enumerate(pictures):
        for column, picture in enumerate(line):
            cell.paste(picture, (column * (tile + 2), _TEXT + 8 + row * (tile + 2)))
    return cell


def _draw(view: Plane, scale: float, tile: int, *, overlay: bool) -> Image.Image:
    rows, columns = (
        max(round(side * step * scale), 1) for side, step in zip(view.image.shape[:2], view.pixel, strict=True)
    )
    levels = np.round(np.ascontiguousarray(view.image) * 255).astype(np.uint8)
    plane = Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0]).convert("RGB")
    plane = plane.resize((columns, rows), Image.Resampling.BICUBIC)
    if overlay and view.label is not None:
        plane = _paint(plane, np.ascontiguousarray(view.label))
    panel = Image.new("RGB", (tile, tile), (0, 0, 0))
    panel.paste(plane, ((tile - columns) // 2, (tile - rows) // 2))
    if not overlay:
        draw, font = ImageDraw.Draw(panel), ImageFont.load_default(15)
        draw.text((4, tile // 2), view.left, fill=_INK, font=font, anchor="lm", stroke_width=2, stroke_fill=(0, 0, 0))
        draw.text((tile // 2, 3), view.top, fill=_INK, font=font, anchor="mt", stroke_width=2, stroke_fill=(0, 0, 0))
    return panel


def _paint(plane: Image.Image, label: np.ndarray) -> Image.Image:
    """A thin veil over each class and a line around it."""
    big = np.array(Image.fromarray(label.astype(np.int32)).resize(plane.size, Image.Resampling.NEAREST))
    picture = np.asarray(plane, dtype=np.float32).copy()
    edge = np.zeros(big.shape, dtype=bool)
    for axis in (0, 1):
        for shift in (1, -1):
            edge |= np.roll(big, shift, axis) != big
    for value in np.unique(big[big > 0]).tolist():
        inside = big == value
        picture[inside] = 0.7 * picture[inside] + 0.3 * np.array(_color(value))
        picture[inside & edge] = _color(value)
    return Image.fromarray(picture.astype(np.uint8))


def _color(value: int) -> tuple[int, int, int]:
    if 1 <= value <= len(_COLORS):
        return _COLORS[value - 1]
    red, green, blue = colorsys.hsv_to_rgb(value * 0.618034 % 1, 0.65, 0.95)  # golden ratio: neighbors differ
    return (round(red * 255), round(green * 255), round(blue * 255))


def _legend(values: set[int], names: Mapping[int, str] | None) -> list[tuple[int, str]]:
    return [(value, (names or {}).get(value, f"label {value}")) for value in sorted(values) if value > 0]


def _sheet(cells: list[Image.Image], path: Path, title: str, display: str, legend: list[tuple[int, str]]) -> Path:
    if not cells:
        raise BadInputError(f"{path}: expected at least one scan to show, got none.")
    width, height = (max(cell.size[axis] for cell in cells) + _GAP for axis in (0, 1))
    columns = min(max(round(math.sqrt(len(cells) * height / width)), 1), max(2400 // width, 1))
    rows = math.ceil(len(cells) / columns)
    font = ImageFont.load_default(_TEXT)
    lines = [title] if title else []
    top = _GAP + len(lines) * (_TEXT + 12)
    needed = max([font.getlength(text) for text in [*lines, display]] + [columns * width - _GAP])
    bottom = (2 if legend else 1) * (_TEXT + 12)
    canvas = Image.new("RGB", (math.ceil(needed) + 2 * _GAP, top + rows * height + bottom), _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for line in lines:
        draw.text((_GAP, _GAP), line, fill=_INK, font=font)
    for index, cell in enumerate(cells):
        canvas.paste(cell, (_GAP + index % columns * width, top + index // columns * height))
    under = top + rows * height
    draw.text((_GAP, under), display, fill=_FAINT, font=font)
    across = float(_GAP)
    for value, name in legend:
        draw.rectangle((across, under + _TEXT + 16, across + 14, under + _TEXT + 30), fill=_color(value))
        draw.text((across + 20, under + _TEXT + 11), name, fill=_INK, font=font)
        across += 44 + font.getlength(name)
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG")
    return Path(path)
