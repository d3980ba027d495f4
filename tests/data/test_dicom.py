"""DICOM series written here and real files that pydicom ships, against nibabel's reader and the standard's equation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from nibabel.nicom.dicomwrappers import wrapper_from_file
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from medgen.data.io import read_grid, read_image, read_label, write_image
from medgen.types import BadInputError

SERIES = generate_uid()
ROWS, COLUMNS, SLICES = 6, 8, 5
STEP = 2.5
# Direction cosines of an oblique slice: along a row, then along a column, LPS.
ALONG_ROW = np.array([0.8, 0.6, 0.0])
ALONG_COLUMN = np.array([-0.36, 0.48, -0.8])
NORMAL = np.cross(ALONG_ROW, ALONG_COLUMN)
ORIGIN = np.array([-40.0, 25.0, 310.0])
Change = Callable[[int, Dataset], None]


def make_slice(index: int, *, axial: bool = False) -> Dataset:
    row, column = (np.eye(3)[0], np.eye(3)[1]) if axial else (ALONG_ROW, ALONG_COLUMN)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.SeriesInstanceUID, dataset.Modality = SERIES, "CT"
    dataset.InstanceNumber = SLICES - index  # against the direction of the normal, as many scanners count
    dataset.ImageOrientationPatient = [*row, *column]
    dataset.ImagePositionPatient = list(ORIGIN + index * STEP * np.cross(row, column))
    dataset.PixelSpacing, dataset.SliceThickness = [0.75, 1.25], 2.0  # between rows, between columns
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = ROWS, COLUMNS, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1024
    dataset.PixelData = stored(index).tobytes()
    return dataset


def stored(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 4096, (ROWS, COLUMNS)).astype(np.uint16)


def write_series(folder: Path, change: Change | None = None, *, axial: bool = False) -> Path:
    folder.mkdir()
    for index in range(SLICES):
        dataset = make_slice(index, axial=axial)
        if change is not None:
            change(index, dataset)
        name = "badce"[index]  # names in another order than positions
        dataset.save_as(folder / f"{name}.dcm", enforce_file_format=True)
    return folder


def test_every_voxel_of_a_series_lies_where_the_standard_puts_it(tmp_path: Path) -> None:
    image, grid = read_image(write_series(tmp_path / "series"))
    assert image.shape == (1, COLUMNS, ROWS, SLICES) and grid.known
    assert grid.spacing == pytest.approx((1.25, 0.75, STEP))
    for k in range(SLICES):
        for j in range(ROWS):
            for i in range(COLUMNS):
                # PS3.3 equation C.7.6.2.1-1
                position = ORIGIN + k * STEP * NORMAL + ALONG_ROW * 1.25 * i + ALONG_COLUMN * 0.75 * j
                np.testing.assert_allclose((grid.affine @ [i, j, k, 1])[:3], position * [-1, -1, 1], atol=1e-4)
                assert image[0, i, j, k] == 2.0 * stored(k)[j, i] - 1024


def test_slices_agree_with_nibabel(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    image, grid = read_image(folder)
    for k, name in enumerate("badce"):
        reference = wrapper_from_file(folder / f"{name}.dcm")
        np.testing.assert_allclose(image[0, :, :, k].numpy().T, reference.get_data())
        for row, column in ((0, 0), (ROWS - 1, 0), (2, COLUMNS - 1)):
            lps = (reference.affine @ [row, column, 0, 1])[:3]
            np.testing.assert_allclose((grid.affine @ [column, row, k, 1])[:3], lps * [-1, -1, 1], atol=1e-4)


def test_the_left_of_the_patient_stays_left(tmp_path: Path) -> None:
    def mark(index: int, dataset: Dataset) -> None:
        pixels = np.zeros((ROWS, COLUMNS), np.uint16)
        pixels[0, COLUMNS - 1] = 1 if index == SLICES - 1 else 0  # axial LPS: left, anterior, and in the top slice
        dataset.PixelData = pixels.tobytes()
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0

    image, grid = read_image(write_series(tmp_path / "series", mark, axial=True))
    index = image[0].nonzero()[0].numpy()
    centre = grid.affine @ [*((np.array(grid.shape) - 1) / 2), 1]
    x, y, z = (grid.affine @ [*index, 1] - centre)[:3]
    assert x < 0 and y > 0 and z > 0  # RAS: left is negative, front and top are positive


def test_a_series_becomes_the_same_nifti(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    image, grid = read_image(folder)
    header = read_grid(folder)
    assert header.shape == grid.shape
    np.testing.assert_array_equal(header.affine, grid.affine)
    write_image(tmp_path / "a.nii.gz", image, grid, dtype="int16")
    again, again_grid = read_image(tmp_path / "a.nii.gz")
    assert torch.equal(again, image)
    np.testing.assert_allclose(again_grid.affine, grid.affine, atol=1e-4)


def test_every_slice_has_its_own_rescale(tmp_path: Path) -> None:
    def slope(index: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = index + 1, 0

    image, _ = read_image(write_series(tmp_path / "series", slope))
    for k in range(SLICES):
        np.testing.assert_array_equal(image[0, :, :, k].numpy().T, (k + 1.0) * stored(k))


def test_signed_pixels_keep_their_sign(tmp_path: Path) -> None:
    def sign(index: int, dataset: Dataset) -> None:
        dataset.PixelRepresentation, dataset.BitsStored, dataset.HighBit = 1, 16, 15
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = (stored(index).astype(np.int16) - 2000).tobytes()

    image, _ = read_image(write_series(tmp_path / "series", sign))
    np.testing.assert_array_equal(image[0, :, :, 3].numpy().T, stored(3).astype(np.float32) - 2000)


def test_a_label_series_gives_integers(tmp_path: Path) -> None:
    def classes(index: int, dataset: Dataset) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0
        dataset.PixelData = (stored(index) % 3).tobytes()

    label, _ = read_label(write_series(tmp_path / "series", classes))
    np.testing.assert_array_equal(label[:, :, 2].numpy().T, stored(2) % 3)


@pytest.mark.parametrize("name", ["CT_small.dcm", "MR_small.dcm"])
def test_a_real_single_file_is_a_picture_of_rows_and_columns(tmp_path: Path, name: str) -> None:
    file = get_testdata_file(name, download=False)
    reference = wrapper_from_file(file)
    image, grid = read_image(file)
    np.testing.assert_allclose(image[0].numpy(), reference.get_data())
    assert grid.shape == image.shape[1:] == read_grid(file).shape
    assert grid.spacing == pytest.approx([float(value) for value in pydicom.dcmread(file).PixelSpacing])
    for index in ((0, 0, 0, 1), (30, 7, 0, 1)):
        np.testing.assert_allclose(
            (grid.affine @ index)[:3], (reference.affine @ index)[:3] * [-1, -1, 1], rtol=1e-5, atol=1e-3
        )


def test_other_files_in_the_folder_do_not_matter(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    expected = read_image(folder)[0]
    (folder / "a.dcm").rename(folder / "IM0001")
    (folder / "DICOMDIR").write_bytes(b"index")
    (folder / "notes.txt").write_text("scan of a phantom")
    (folder / ".hidden").write_bytes(b"x")
    assert torch.equal(read_image(folder)[0], expected)


def test_radiographs_with_white_as_zero_are_inverted(tmp_path: Path) -> None:
    def radiograph(index: int, dataset: Dataset) -> None:
        dataset.Modality, dataset.PhotometricInterpretation = "CR", "MONOCHROME1"
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, 0

    folder = write_series(tmp_path / "series", radiograph)
    image, _ = read_image(folder / "b.dcm")
    np.testing.assert_array_equal(image[0].numpy(), 4095.0 - stored(0))


def test_color_pixels_become_channels(tmp_path: Path) -> None:
    dataset = make_slice(0)
    colors = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS, 3)).astype(np.uint8)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelData = colors.tobytes()
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_image(tmp_path / "a.dcm")[0].numpy(), np.moveaxis(colors, -1, 0))


def test_a_picture_without_position_keeps_its_spacing(tmp_path: Path) -> None:
    dataset = make_slice(0)
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
    dataset.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    grid = read_grid(tmp_path / "a.dcm")
    assert grid.known and grid.spacing == pytest.approx((0.75, 1.25))
    del dataset.PixelSpacing
    dataset.save_as(tmp_path / "b.dcm", enforce_file_format=True)
    assert not read_grid(tmp_path / "b.dcm").known


def at(number: int, **values: Any) -> Change:
    """Set elements of one slice only."""

    def change(index: int, dataset: Dataset) -> None:
        if index == number:
            for name, value in values.items():
                setattr(dataset, name, value)

    return change


def moved(number: int, offset: np.ndarray) -> Change:
    return at(number, ImagePositionPatient=list(ORIGIN + number * STEP * NORMAL + offset))


def tilted(index: int, dataset: Dataset) -> None:
    dataset.ImagePositionPatient = list(ORIGIN + index * (STEP * NORMAL + 0.6 * ALONG_COLUMN))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (at(2, SeriesInstanceUID=generate_uid()), "expected one series, got 2 .*Put each series into a folder"),
        (at(2, Rows=ROWS - 1), "expected one value of Rows, got 2"),
        (at(2, ImageOrientationPatient=[1, 0, 0, 0, 1, 0]), r"d\.dcm: expected the direction of"),
        (at(2, PixelSpacing=[0.8, 1.25]), r"d\.dcm: expected the spacing of"),
        (at(2, PixelSpacing=None), r"d\.dcm: expected PixelSpacing with 2 numbers, got None"),
        (at(2, ImagePositionPatient=None), r"d\.dcm: expected ImagePositionPatient with 3 numbers, got None"),
        (at(2, NumberOfFrames=3), r"d\.dcm: expected one slice per file, got a multi-frame file"),
        (at(0, ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "two perpendicular unit vectors"),
        (moved(2, -STEP * NORMAL), r"expected one slice per position, got a\.dcm and d\.dcm at the same one"),
        (moved(4, STEP * NORMAL), r"every 2\.5 mm, got a missing slice: 5 mm between c\.dcm and e\.dcm"),
        (moved(2, 0.8 * NORMAL), r"expected slices every 2\.5 mm, got uneven gaps"),
        (moved(2, 3 * ALONG_ROW), "got a sheared stack"),
        (tilted, r"got a sheared stack \(gantry tilt\). Convert the series to NIfTI with tilt correction"),
        (at(2, PhotometricInterpretation="MONOCHROME1"), r"d\.dcm: expected MONOCHROME2, got MONOCHROME1"),
        (at(2, PixelData=b"\0" * 20), r"d\.dcm: expected readable pixels, got an error"),
    ],
)
def test_what_is_not_one_complete_series_is_refused(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_series(tmp_path / "series", change)
    with pytest.raises(BadInputError, match=message) as caught:
        read_image(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_lost_slice_is_noticed(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    (folder / "d.dcm").unlink()
    (tmp_path / "series" / "c.dcm").rename(folder / "z.dcm")
    for read in (read_image, read_grid):
        with pytest.raises(BadInputError, match=r"series: expected slices every 2\.5 mm, got a missing slice"):
            read(folder)


def test_truncated_and_foreign_files_and_empty_folders_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    content = (folder / "d.dcm").read_bytes()
    for length in (0, 140, len(content) // 2, len(content) - 2):
        (folder / "d.dcm").write_bytes(content[:length])
        with pytest.raises(BadInputError, match=r"series.*expected"):
            read_image(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="empty: expected a folder with DICOM files, got none"):
        read_image(tmp_path / "empty")
    with pytest.raises(BadInputError, match=r"MR_truncated\.dcm: expected readable pixels"):
        read_image(get_testdata_file("MR_truncated.dcm", download=False))
