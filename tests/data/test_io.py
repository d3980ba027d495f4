"""Files, against nibabel, Pillow, pypng, tifffile and DICOM series that pydicom writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import png
import pytest
import tifffile
import torch
from PIL import Image

from medgen.data.io import read_grid, read_image, read_label, write_image, write_label
from medgen.types import BadInputError, Grid

OBLIQUE = np.array([[-0.9, 0.2, 0.3, 90.0], [0.25, 1.1, -0.6, -120], [0.1, 0.4, 2.9, 33], [0, 0, 0, 1]])
ORTHOGONAL = np.eye(4)
ORTHOGONAL[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] @ np.diag([0.8, 1.2, 3.0])
ORTHOGONAL[:3, 3] = OBLIQUE[:3, 3]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 40, shape).astype(np.float32)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = OBLIQUE) -> Path:
    nib.Nifti1Image(array, affine, dtype=array.dtype).to_filename(path)
    return path


def assert_same_grid(path: Path, grid: Grid) -> None:
    header = read_grid(path)
    assert header.shape == grid.shape and header.known == grid.known
    np.testing.assert_allclose(header.affine, grid.affine, atol=1e-6)


# --- NIfTI


@pytest.mark.parametrize(
    "affine", [OBLIQUE, ORTHOGONAL, np.diag([-1.0, -1, 2.5, 1])], ids=["sheared", "oblique", "LPS"]
)
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_nifti_keeps_voxels_and_affine(tmp_path: Path, affine: np.ndarray, ending: str) -> None:
    data = noise(5, 6, 7)
    image, grid = read_image(save_nifti(tmp_path / f"a{ending}", data, affine))
    np.testing.assert_array_equal(image.numpy(), data[None])
    np.testing.assert_allclose(grid.affine, affine, atol=1e-5)
    assert grid.known
    write_image(tmp_path / f"b{ending}", image, grid, dtype="float32")
    again = nib.load(tmp_path / f"b{ending}")
    np.testing.assert_array_equal(again.get_fdata(dtype=np.float32), data)
    np.testing.assert_allclose(again.affine, affine, atol=1e-5)
    assert again.header.get_xyzt_units()[0] == "mm"
    if affine is not OBLIQUE:  # a quaternion cannot hold shear
        qform, code = again.header.get_qform(coded=True)
        assert code == 1
        np.testing.assert_allclose(qform, affine, atol=1e-4)
    else:
        assert again.header["qform_code"] == 0
    assert_same_grid(tmp_path / f"b{ending}", grid)


def test_nifti_with_slope_units_and_big_endian_is_understood(tmp_path: Path) -> None:
    stored = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    header.set_data_shape(stored.shape)
    header.set_sform(np.diag([500.0, 500, 1000, 1]), code=1)
    header.set_xyzt_units("micron")
    header["scl_slope"], header["scl_inter"], header["vox_offset"], header["magic"] = 0.5, -3, 352, b"n+1"
    content = header.binaryblock + bytes(4) + stored.astype(">i2").tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii").get_fdata(), stored * 0.5 - 3)
    voxels, grid = read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(voxels[0].numpy(), stored * 0.5 - 3)
    assert grid.spacing == pytest.approx((0.5, 0.5, 1.0))


def test_last_nifti_axis_becomes_channels(tmp_path: Path) -> None:
    data = noise(4, 5, 6, 3)
    image, grid = read_image(save_nifti(tmp_path / "a.nii.gz", data))
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(data, -1, 0))
    assert grid.shape == (4, 5, 6)
    assert read_image(save_nifti(tmp_path / "b.nii.gz", data[..., :1]))[0].shape == (1, 4, 5, 6)
    image, grid = read_image(save_nifti(tmp_path / "c.nii.gz", data[:, :, :1]))
    assert image.shape == (3, 4, 5) and grid.shape == (4, 5)
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(data[:, :, 0], -1, 0))


def test_single_slice_nifti_is_2d_and_comes_back_with_its_affine(tmp_path: Path) -> None:
    data = noise(4, 5, 1)
    image, grid = read_image(save_nifti(tmp_path / "a.nii.gz", data, ORTHOGONAL))
    assert image.shape == (1, 4, 5) and grid.spatial_dims == 2
    assert grid.spacing == pytest.approx((0.8, 1.2))
    write_image(tmp_path / "b.nii.gz", image, grid, dtype="float32")
    again = nib.load(tmp_path / "b.nii.gz")
    np.testing.assert_array_equal(again.get_fdata(dtype=np.float32), data)
    np.testing.assert_allclose(again.affine, ORTHOGONAL, atol=1e-5)


def test_nifti_that_states_no_geometry_is_known_as_such_and_stays_so(tmp_path: Path) -> None:
    image, grid = read_image(save_nifti(tmp_path / "a.nii", noise(4, 5, 6), None))
    assert not grid.known
    write_image(tmp_path / "b.nii", image, grid, dtype="float32")
    again = read_grid(tmp_path / "b.nii")
    assert not again.known
    np.testing.assert_allclose(again.affine, grid.affine)


def test_only_qform_is_enough(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(4, 5, 6), ORTHOGONAL)
    image.set_sform(None, code=0)
    image.set_qform(ORTHOGONAL, code=1)
    image.to_filename(tmp_path / "a.nii")
    grid = read_grid(tmp_path / "a.nii")
    assert grid.known
    np.testing.assert_allclose(grid.affine, ORTHOGONAL, atol=1e-4)


def test_integer_types_round_and_clip(tmp_path: Path) -> None:
    grid = Grid((1, 2, 2), np.eye(4))
    image = torch.tensor([[[[-7.0, 1.4], [1.6, 70000.0]]]])
    for dtype, expected in {"uint8": [0, 1, 2, 255], "uint16": [0, 1, 2, 65535], "int16": [-7, 1, 2, 32767]}.items():
        write_image(tmp_path / "a.nii.gz", image, grid, dtype=dtype)
        stored = nib.load(tmp_path / "a.nii.gz")
        assert stored.get_data_dtype() == np.dtype(dtype)
        assert np.asarray(stored.dataobj).flatten().tolist() == expected


def test_same_voxels_give_the_same_file(tmp_path: Path) -> None:
    image, grid = torch.from_numpy(noise(1, 4, 5, 6)), Grid((4, 5, 6), OBLIQUE)
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.nii.gz", image, grid, dtype="int16", description="one text")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


# --- PNG and TIFF

TIFF_TYPES = ("uint8", "uint16", "int16", "float32")


def save_png(path: Path, array: np.ndarray, **options: Any) -> Path:
    height, width = array.shape[:2]
    with open(path, "wb") as handle:
        png.Writer(width, height, **options).write(handle, array.reshape(height, -1).tolist())
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_keeps_all_its_bits(tmp_path: Path, channels: int, dtype: str) -> None:
    top = np.iinfo(dtype).max
    data = np.random.default_rng(0).integers(0, top + 1, (7, 9, channels)).astype(dtype)
    data[0, 0], data[0, 1] = 0, top
    path = save_png(tmp_path / "a.png", data, greyscale=channels == 1, bitdepth=8 if dtype == "uint8" else 16)
    image, grid = read_image(path)
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(data, -1, 0))
    assert grid.shape == (7, 9) and not grid.known
    assert_same_grid(path, grid)
    write_image(tmp_path / "b.png", image, grid, dtype=dtype)
    width, height, rows, info = png.Reader(filename=str(tmp_path / "b.png")).read()
    assert (width, height, info["bitdepth"], info["planes"]) == (9, 7, 8 if dtype == "uint8" else 16, channels)
    np.testing.assert_array_equal(np.vstack([np.asarray(row) for row in rows]).reshape(data.shape), data)


def test_png_axes_are_rows_then_columns(tmp_path: Path) -> None:
    data = np.zeros((4, 6), np.uint8)
    data[1, 5] = 200
    Image.fromarray(data).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0][0, 1, 5] == 200


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits_keeps_its_numbers(tmp_path: Path, bits: int) -> None:
    data = np.random.default_rng(0).integers(0, 2**bits, (5, 11)).astype(np.uint8)
    path = save_png(tmp_path / "a.png", data, greyscale=True, bitdepth=bits)
    np.testing.assert_array_equal(read_label(path)[0].numpy(), data)


@pytest.mark.parametrize("bits", [2, 8])
def test_palette_png_gives_colors_as_image_and_indices_as_label(tmp_path: Path, bits: int) -> None:
    palette = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 8, 7)]
    data = np.random.default_rng(0).integers(0, 4, (5, 6)).astype(np.uint8)
    path = save_png(tmp_path / "a.png", data, palette=palette, bitdepth=bits)
    np.testing.assert_array_equal(read_image(path)[0].numpy(), np.moveaxis(np.array(palette)[data], -1, 0))
    np.testing.assert_array_equal(read_label(path)[0].numpy(), data)


@pytest.mark.parametrize(("mode", "depth"), [("RGBA", 8), ("LA", 8), ("RGBA", 16), ("LA", 16)])
def test_alpha_is_dropped_only_where_it_says_nothing(tmp_path: Path, mode: str, depth: int) -> None:
    top = 2**depth - 1
    planes = len(mode)
    data = np.random.default_rng(0).integers(0, top + 1, (5, 6, planes))
    data[..., -1] = top
    options = {"greyscale": mode == "LA", "alpha": True, "bitdepth": depth}
    image, _ = read_image(save_png(tmp_path / "a.png", data, **options))
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(data[..., :-1], -1, 0))
    data[2, 3, -1] = top - 1
    with pytest.raises(BadInputError, match=r"b\.png: expected no transparency, got an alpha channel in use"):
        read_image(save_png(tmp_path / "b.png", data, **options))


def test_transparent_colors_are_refused(tmp_path: Path) -> None:
    path = save_png(tmp_path / "a.png", np.zeros((3, 4), np.uint8), greyscale=True, transparent=0)
    with pytest.raises(BadInputError, match="expected an opaque picture, got a transparent color"):
        read_image(path)


@pytest.mark.parametrize(
    ("writer", "dtype", "channels"),
    [(codec, dtype, channels) for codec in ("none", "zlib") for dtype in TIFF_TYPES for channels in (1, 3)]
    # Pillow writes the codecs that tifffile lacks, for the pictures that it holds.
    + [("tiff_lzw", dtype, 1) for dtype in ("uint8", "uint16", "float32")]
    + [("tiff_lzw", "uint8", 3), ("packbits", "uint8", 1), ("tiff_jpeg", "uint8", 1)],
)
def test_tiff_keeps_all_its_bits(tmp_path: Path, writer: str, dtype: str, channels: int) -> None:
    data = (noise(6, 9, channels) * 100 % 250).astype(dtype)
    path = tmp_path / "a.tif"
    flat = data[..., 0] if channels == 1 else data
    if writer in ("none", "zlib"):
        photometric = "minisblack" if channels == 1 else "rgb"
        tifffile.imwrite(path, flat, compression=None if writer == "none" else writer, photometric=photometric)
    else:
        Image.fromarray(flat).save(path, compression=writer)
    if writer == "tiff_jpeg":
        data = np.asarray(Image.open(path))[..., None]  # lossy
    image, grid = read_image(path)
    np.testing.assert_array_equal(image.numpy(), np.moveaxis(data, -1, 0).astype(np.float32))
    assert_same_grid(path, grid)


def test_planar_tiff_and_extra_channels_are_read(tmp_path: Path) -> None:
    data = noise(4, 6, 9).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", data[:3], photometric="rgb", planarconfig="separate")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[0].numpy(), data[:3])
    tifffile.imwrite(tmp_path / "b.tif", np.moveaxis(data, 0, -1), photometric="minisblack", planarconfig="contig",
                     extrasamples=[0, 0, 0])  # fmt: skip
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif")[0].numpy(), data)


def test_tiffs_that_could_be_misread_are_refused(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 255, (3, 6, 9)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", data, photometric="minisblack")
    with pytest.raises(BadInputError, match=r"pages\.tif: expected one page, got 3"):
        read_image(tmp_path / "pages.tif")
    tifffile.imwrite(tmp_path / "white.tif", data[0], photometric="miniswhite")
    with pytest.raises(BadInputError, match=r"white\.tif: expected a gray.*got MINISWHITE"):
        read_image(tmp_path / "white.tif")
    rgba = np.moveaxis(np.concatenate([data, data[:1]]), 0, -1)
    tifffile.imwrite(tmp_path / "alpha.tif", rgba, photometric="rgb", extrasamples=["unassalpha"])
    with pytest.raises(BadInputError, match=r"alpha\.tif: expected no transparency"):
        read_image(tmp_path / "alpha.tif")


# --- Labels


def test_labels_come_back_as_they_were(tmp_path: Path) -> None:
    label = torch.randint(0, 300, (4, 5, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    grid = Grid((4, 5, 6), OBLIQUE)
    for top, dtype in ((4, "uint8"), (300, "uint16")):
        write_label(tmp_path / "a.nii.gz", label % top, grid)
        assert nib.load(tmp_path / "a.nii.gz").get_data_dtype() == np.dtype(dtype)
        again, read = read_label(tmp_path / "a.nii.gz")
        assert again.dtype == torch.int16 and torch.equal(again, label % top)
        np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-5)
        flat = Grid((4, 5), np.eye(4), known=False)
        write_label(tmp_path / "a.png", label[..., 0] % top, flat)
        assert torch.equal(read_label(tmp_path / "a.png")[0], label[..., 0] % top)
        mode = {"uint8": "L", "uint16": "I;16"}[dtype]
        assert Image.open(tmp_path / "a.png").mode == mode


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16, np.int64])
def test_whole_numbers_of_any_type_are_labels(tmp_path: Path, dtype: Any) -> None:
    data = np.arange(24).reshape(2, 3, 4)
    label, _ = read_label(save_nifti(tmp_path / "a.nii.gz", data.astype(dtype)))
    np.testing.assert_array_equal(label.numpy(), data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "expected integer class indices, got 0.5. Resample labels by nearest neighbor"),
        (np.nan, "expected integer class indices, got nan"),
        (-1, "expected classes from 0 to 32767, got -1 to 1"),
        (40000, "expected classes from 0 to 32767, got 0 to 40000"),
    ],
)
def test_values_that_are_no_class_are_refused(tmp_path: Path, value: float, message: str) -> None:
    data = np.zeros((3, 4, 5), np.float32)
    data[1, 1, 1], data[2, 2, 2] = 1, value
    with pytest.raises(BadInputError, match=rf"bad\.nii\.gz: {message}"):
        read_label(save_nifti(tmp_path / "bad.nii.gz", data))


def test_a_colored_label_map_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(tmp_path / "bad.png")
    with pytest.raises(BadInputError, match=r"bad\.png: expected a label map with one channel, got 3"):
        read_label(tmp_path / "bad.png")


# --- Bad files


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    data = noise(3, 4, 5)
    data[0, 0, :2] = value
    with pytest.raises(BadInputError, match=r"bad\.nii\.gz: expected finite intensities, got 2 NaN or infinite"):
        read_image(save_nifti(tmp_path / "bad.nii.gz", data))


def test_a_missing_file_and_an_unknown_ending_are_refused(tmp_path: Path) -> None:
    for read in (read_image, read_label, read_grid):
        with pytest.raises(BadInputError, match=r"none\.nii\.gz: expected a file, got nothing there"):
            read(tmp_path / "none.nii.gz")
        (tmp_path / "a.mha").write_bytes(b"x")
        with pytest.raises(BadInputError, match=r"a\.mha: expected a DICOM folder or a file that ends in .*got \.mha"):
            read(tmp_path / "a.mha")


def whole_files(folder: Path) -> dict[str, Path]:
    """One good file of each kind."""
    folder.mkdir(exist_ok=True)
    data = noise(9, 8, 7)
    flat = np.random.default_rng(0).integers(0, 60000, (12, 13, 3)).astype(np.uint16)
    files = {
        "gz": save_nifti(folder / "a.nii.gz", data),
        "nii": save_nifti(folder / "a.nii", data),
        "rgb16": save_png(folder / "rgb16.png", flat, greyscale=False, bitdepth=16),
        "gray16": save_png(folder / "gray16.png", flat[..., 0], greyscale=True, bitdepth=16),
        "rgb8": folder / "rgb8.png",
        "sparse8": folder / "sparse8.png",
        "tiff": folder / "a.tif",
    }
    # Compressed well, so that a wrong bit changes much of what follows: a decoder alone lets some of that pass.
    sparse = np.where(noise(96, 96, seed=1) > 180, noise(96, 96, seed=2) % 250, 0)
    Image.fromarray(sparse.astype(np.uint8)).save(files["sparse8"])
    Image.fromarray((flat // 256).astype(np.uint8)).save(files["rgb8"])
    tifffile.imwrite(files["tiff"], flat, photometric="rgb", compression="zlib")
    return files


@pytest.mark.parametrize("kind", ["gz", "nii", "rgb16", "gray16", "rgb8", "tiff"])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, kind: str) -> None:
    path = whole_files(tmp_path)[kind]
    content, whole = path.read_bytes(), read_image(path)[0]
    lengths = sorted({*range(0, min(420, len(content)), 41), len(content) // 2, *range(len(content) - 9, len(content))})
    for length in lengths:
        path.write_bytes(content[:length])
        try:
            image, _ = read_image(path)
        except BadInputError as error:
            assert path.name in str(error) and "truncated" in str(error) and "\n" not in str(error)
        else:
            # The last bytes of a PNG or TIFF may hold no pixels.
            assert kind not in ("gz", "nii") and torch.equal(image, whole), f"{length} of {len(content)} bytes"


@pytest.mark.parametrize("kind", ["gz", "nii", "rgb16", "gray16", "rgb8", "sparse8", "tiff"])
def test_a_damaged_byte_is_refused_or_harmless(tmp_path: Path, kind: str) -> None:
    path = whole_files(tmp_path)[kind]
    content, whole = path.read_bytes(), read_image(path)[0]
    for position in np.random.default_rng(1).integers(0, len(content), 300 if kind == "sparse8" else 60):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        try:
            image, _ = read_image(path)
        except BadInputError as error:
            assert path.name in str(error)
        else:
            # Plain NIfTI and TIFF carry no checksum: a changed value is read as what it says.
            assert kind in ("nii", "tiff") or torch.equal(image, whole), f"byte {position}"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "a.nii", "a.png", "a.tif", "a.dcm"):
        (tmp_path / name).write_bytes(b"this is no scan " * 100)
        for read in (read_image, read_grid):
            with pytest.raises(BadInputError, match=f"{name}: expected a"):
                read(tmp_path / name)


def test_an_affine_without_inverse_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(3, 4, 5), np.eye(4))
    image.header["srow_y"] = [1, 0, 0, 0]
    image.header["qform_code"] = 0
    (tmp_path / "bad.nii").write_bytes(image.to_bytes()[:280] + np.array(
        [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]], "<f4").tobytes() + image.to_bytes()[328:])  # fmt: skip
    with pytest.raises(BadInputError, match=r"bad\.nii: expected an invertible affine"):
        read_image(tmp_path / "bad.nii")


def test_colored_and_complex_niftis_are_refused(tmp_path: Path) -> None:
    colors = np.zeros((3, 4, 5), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.Nifti1Image(colors, np.eye(4)).to_filename(tmp_path / "rgb.nii")
    nib.Nifti1Image(np.zeros((3, 4, 5), np.complex64), np.eye(4)).to_filename(tmp_path / "complex.nii")
    for name in ("rgb", "complex"):
        with pytest.raises(BadInputError, match=f"{name}.nii: expected real voxels, got type"):
            read_image(tmp_path / f"{name}.nii")


# --- Writing


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        ("a.png", (1, 4, 5, 6), "uint8", "expected a 2D picture with 1 or 3 channels"),
        ("a.png", (2, 4, 5), "uint8", "expected a 2D picture with 1 or 3 channels"),
        ("a.png", (1, 4, 5), "float32", "expected a 2D picture.*uint8 or uint16.*got.*float32"),
        ("a.nii.gz", (2, 4, 5, 6), "int16", "expected one channel per NIfTI file, got 2"),
        ("a.jpg", (1, 4, 5), "uint8", "expected a name that ends in"),
        ("a.png", (1, 4, 5), "uint32", "expected dtype uint8, uint16, int16 or float32, got 'uint32'"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], dtype: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_image(tmp_path / name, torch.zeros(shape), Grid(shape[1:], np.eye(4)), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_images_that_are_not_finite_or_off_their_grid_are_not_written(tmp_path: Path) -> None:
    grid = Grid((2, 2), np.eye(4))
    with pytest.raises(ValueError, match=r"a\.png: expected finite intensities"):
        write_image(tmp_path / "a.png", torch.full((1, 2, 2), torch.nan), grid, dtype="uint8")
    with pytest.raises(ValueError, match=r"a\.png: expected an image \(C, \(2, 2\)\), got shape \(1, 2, 3\)"):
        write_image(tmp_path / "a.png", torch.zeros(1, 2, 3), grid, dtype="uint8")
    with pytest.raises(ValueError, match=r"a\.png: expected a label map \(2, 2\), got shape \(2, 3\)"):
        write_label(tmp_path / "a.png", torch.zeros(2, 3, dtype=torch.int16), grid)
    with pytest.raises(ValueError, match=r"a\.png: expected integer classes from 0 to 32767"):
        write_label(tmp_path / "a.png", torch.zeros(2, 2), grid)


MARK = "medgen synthetic, not a patient"


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_description_stays_in_the_header_of_a_nifti(tmp_path: Path, ending: str) -> None:
    grid = Grid((4, 5, 6), OBLIQUE)
    image, label = torch.from_numpy(noise(1, 4, 5, 6)), torch.ones(4, 5, 6, dtype=torch.int16)
    for name, text in (("mark", MARK), ("longest", "x" * 79), ("none", "")):
        path = tmp_path / f"{name}{ending}"
        write_image(path, image, grid, dtype="float32", description=text)
        assert nib.load(path).header["descrip"].item().decode() == text
        assert torch.equal(read_image(path)[0], image)
        write_label(path, label, grid, description=text)
        assert nib.load(path).header["descrip"].item().decode() == text
        assert torch.equal(read_label(path)[0], label)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_description_stays_in_the_text_of_a_png(tmp_path: Path, channels: int, dtype: Any) -> None:
    grid = Grid((7, 9), np.eye(4), known=False)
    image = torch.from_numpy(noise(channels, 7, 9)).clamp(0, 255).round()
    for name, text in (("mark", {"Description": MARK}), ("none", {})):
        path = tmp_path / f"{name}.png"
        write_image(path, image, grid, dtype=dtype, description=text.get("Description", ""))
        Image.open(path).verify()
        assert Image.open(path).text == text
        # pypng checks the checksum of every chunk, and that they come in a valid order.
        chunks = [kind for kind, _ in png.Reader(filename=str(path)).chunks()]
        assert chunks[0] == b"IHDR" and chunks[-1] == b"IEND" and chunks.count(b"tEXt") == len(text)
        assert torch.equal(read_image(path)[0], image)
    write_label(tmp_path / "label.png", torch.ones(7, 9, dtype=torch.int16), grid, description=MARK)
    assert Image.open(tmp_path / "label.png").text == {"Description": MARK}


@pytest.mark.parametrize("text", ["x" * 80, "größer", "two\nlines", "nul\0"])
def test_a_description_that_a_header_cannot_hold_is_refused(tmp_path: Path, text: str) -> None:
    grid = Grid((2, 2), np.eye(4))
    for name in ("a.png", "a.nii.gz"):
        with pytest.raises(ValueError, match=rf"{name}: expected a description of at most 79 printable ASCII"):
            write_image(tmp_path / name, torch.zeros(1, 2, 2), grid, dtype="uint8", description=text)
        with pytest.raises(ValueError, match=rf"{name}: expected a description of at most 79 printable ASCII"):
            write_label(tmp_path / name, torch.zeros(2, 2, dtype=torch.int16), grid, description=text)
    assert list(tmp_path.iterdir()) == []


# --- Real data


def test_real_niftis_read_as_nibabel_reads_them_and_come_back(tmp_path: Path, real_data: Path) -> None:
    folder = real_data / "hippocampus3d"
    files = sorted((folder / "images").glob("*.nii.gz"))[:6]
    if not files:
        pytest.skip(f"no hippocampus3d in {real_data}")
    for file in files:
        reference = nib.load(file)
        image, grid = read_image(file)
        np.testing.assert_array_equal(image[0].numpy(), reference.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(grid.affine, reference.affine)
        assert_same_grid(file, grid)
        label, label_grid = read_label(folder / "labels" / file.name)
        assert label.shape == image.shape[1:] and set(label.unique().tolist()) == {0, 1, 2}
        np.testing.assert_allclose(label_grid.affine, grid.affine)
        write_image(tmp_path / file.name, image, grid, dtype="float32")
        again, again_grid = read_image(tmp_path / file.name)
        assert torch.equal(again, image)
        np.testing.assert_allclose(again_grid.affine, grid.affine)


@pytest.mark.parametrize("name", ["cardiac_acdc", "nuclei_dsb2018"])
def test_real_pngs_read_as_pillow_reads_them_and_come_back(tmp_path: Path, real_data: Path, name: str) -> None:
    files = sorted((real_data / name / "images").glob("*.png"))
    if not files:
        pytest.skip(f"no {name} in {real_data}")
    for file in files[:: len(files) // 4]:
        image, grid = read_image(file)
        expected = np.asarray(Image.open(file))
        expected = expected[None] if expected.ndim == 2 else np.moveaxis(expected, -1, 0)
        np.testing.assert_array_equal(image.numpy(), expected)
        write_image(tmp_path / file.name, image, grid, dtype="uint8")
        assert torch.equal(read_image(tmp_path / file.name)[0], image)
        assert read_label(real_data / name / "labels" / file.name)[1].shape == grid.shape
