from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medgen.pictures import contact_sheet, sample_grid
from medgen.types import BadInputError, Grid, Sample

ORANGE = (230, 159, 0)  # color of label 1


def corner_scan(affine: np.ndarray, shape: tuple[int, int, int] = (20, 24, 16)) -> Sample:
    """A dark volume, stored as `affine` says, with a bright block at the right, anterior, superior corner."""
    ras = np.zeros(shape, dtype=np.float32)
    label = np.zeros(shape, dtype=np.int16)
    ras[12:18, 16:22, 10:14] = 100.0
    label[12:18, 16:22, 10:14] = 1
    turn = nib.orientations.io_orientation(affine)
    inverse = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    image = nib.orientations.apply_orientation(ras, inverse)
    stored = nib.orientations.apply_orientation(label, inverse)
    return Sample(
        "case", Grid(stored.shape, affine), torch.from_numpy(image.copy())[None], torch.from_numpy(stored.copy())
    )


def panel(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    """One 200-pixel panel of a sheet with a single 3D cell and no title."""
    top, left = 10 + 28 + row * 202, 10 + column * 202
    return sheet[top : top + 200, left : left + 200].astype(int)


def center_of(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "ASL"])
def test_volumes_are_in_radiological_display_however_they_are_stored(tmp_path: Path, codes: str) -> None:
    affine = np.eye(4)
    for axis, (world, sign) in enumerate(nib.orientations.axcodes2ornt(codes).astype(int)):
        affine[:3, axis] = sign * np.eye(3)[world]
    sheet = np.asarray(Image.open(contact_sheet([corner_scan(affine)], tmp_path / "sheet.png")).convert("RGB"))
    for column, block_at_left in ((0, True), (1, True), (2, True)):  # axial and coronal: right; sagittal: anterior
        bright = panel(sheet, 0, column).min(axis=-1) > 128
        bright[:20], bright[:, :20] = False, False  # the letters at the edges
        row, across = center_of(bright)
        assert (across < 100) == block_at_left
        assert row < 100  # anterior or superior is up


def test_the_label_is_painted_on_the_structure_and_only_in_the_overlay(tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(contact_sheet([corner_scan(np.eye(4))], tmp_path / "sheet.png")).convert("RGB"))
    for column in range(3):
        plain, overlay = panel(sheet, 0, column), panel(sheet, 1, column)
        edge = (overlay == ORANGE).all(axis=-1)
        bright = plain.min(axis=-1) > 128
        bright[:20], bright[:, :20] = False, False
        assert np.allclose(center_of(edge), center_of(bright), atol=2)
        assert not (plain == ORANGE).all(axis=-1).any()


def test_planes_keep_their_proportions_in_mm(tmp_path: Path) -> None:
    image = torch.rand(1, 20, 20, 5, generator=torch.Generator().manual_seed(0)) + 1
    image[:, 0, 0, 0] = 0
    scan = Sample("thick", Grid((20, 20, 5), np.diag([1.0, 1.0, 2.0, 1.0])), image)
    sheet = np.asarray(Image.open(contact_sheet([scan], tmp_path / "sheet.png")).convert("L"))
    coronal = panel(sheet, 0, 1)[:, 30:90]  # beside the letters
    assert abs(int((coronal.max(axis=1) > 0).sum()) - 100) <= 2  # 5 slices of 2 mm beside 20 mm at 200 pixels


def test_a_slice_without_orientation_is_shown_as_stored(tmp_path: Path) -> None:
    image = torch.zeros(1, 32, 32)
    image[:, 2:10, 20:30] = 200.0  # upper right
    scan = Sample("slice", Grid((32, 32), np.eye(4), known=False), image)
    sheet = np.asarray(Image.open(contact_sheet([scan], tmp_path / "sheet.png")).convert("L"))
    row, column = center_of(sheet[38:294, 10:266] > 128)
    assert row < 80
    assert column > 160


def test_an_axial_slice_with_orientation_is_turned_like_a_volume(tmp_path: Path) -> None:
    image = torch.zeros(1, 32, 32)
    image[:, 24:30, 24:30] = 200.0  # nibabel order (X, Y): right and anterior
    scan = Sample("slice", Grid((32, 32), np.eye(4)), image)
    sheet = np.asarray(Image.open(contact_sheet([scan], tmp_path / "sheet.png")).convert("L"))
    bright = sheet[38:294, 10:266] > 128
    bright[:22, 110:150], bright[110:150, :22] = False, False
    row, column = center_of(bright)
    assert row < 80
    assert column < 80


@pytest.mark.parametrize("top", [255.0, 65535.0])
def test_color_is_shown_as_stored(tmp_path: Path, top: float) -> None:
    image = torch.zeros(3, 16, 16)
    image[0], image[1, 0, 0] = 0.5 * top, top
    scan = Sample("rgb", Grid((16, 16), np.eye(4), known=False), image)
    sheet = np.asarray(Image.open(contact_sheet([scan], tmp_path / "sheet.png")))
    assert np.allclose(sheet[200, 150], (128, 0, 0), atol=1)


def test_a_constant_scan_and_an_empty_label_can_be_shown(tmp_path: Path) -> None:
    scan = Sample("flat", Grid((8, 8, 8), np.eye(4)), torch.ones(1, 8, 8, 8), torch.zeros(8, 8, 8, dtype=torch.int16))
    assert contact_sheet([scan], tmp_path / "sheet.png").stat().st_size > 0


def test_a_sheet_without_scans_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="expected at least one scan to show, got none"):
        contact_sheet([], tmp_path / "sheet.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", [(3, 1, 16, 20), (3, 3, 16, 20), (3, 1, 12, 16, 10), (3, 2, 12, 16, 10)])
def test_the_sample_grid_maps_the_model_range_to_black_and_white(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = torch.stack([torch.full(shape[1:], value) for value in (-1.0, 0.0, 1.0)])
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int16)
    sheet = np.asarray(Image.open(sample_grid(images, labels, tmp_path / "grid.png", captions=["a", "b", "c"])))
    present = set(map(int, np.unique(sheet[..., 0])))
    assert {0, 128, 255} <= present or {0, 127, 255} <= present


def test_the_sample_grid_wants_one_caption_each(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"one caption each, got shape \(2, 1, 8, 8\) and 1 captions"):
        sample_grid(torch.zeros(2, 1, 8, 8), None, tmp_path / "grid.png", captions=["a"])
