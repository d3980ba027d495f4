from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medgen.generator import Generator
from medgen.synthesis import LabelFile, find_labels, plan_samples
from medgen.types import BadInputError


def test_a_longer_plan_begins_with_the_shorter_one() -> None:
    assert plan_samples(20, seed=4)[:7] == plan_samples(7, seed=4)
    assert not {spec.seed for spec in plan_samples(20, seed=4)} & {spec.seed for spec in plan_samples(20, seed=5)}


def test_label_files_are_taken_in_turn_with_new_seeds() -> None:
    files = [LabelFile(Path("a"), "1"), LabelFile(Path("b"), "2")]
    plan = plan_samples(5, source="files", files=files)
    assert [spec.file.path.name for spec in plan if spec.file] == ["a", "b", "a", "b", "a"]
    assert len({spec.seed for spec in plan}) == 5


def test_source_and_files_must_go_together() -> None:
    with pytest.raises(BadInputError, match="'generate': expected no label files, got 1"):
        plan_samples(1, source="generate", files=[LabelFile(Path("a"), "1")])
    with pytest.raises(BadInputError, match="'files': expected label files, got 0"):
        plan_samples(1, source="files")


def write(folder: Path, shape: tuple[int, ...], spacing: tuple[float, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    array = np.zeros(shape, dtype=np.uint8)
    array[tuple(slice(2, size - 2) for size in shape)] = 1
    nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), folder / "a.nii.gz")
    return folder


def test_a_spacing_far_from_the_models_is_refused(make_generator: Callable[..., Generator], tmp_path: Path) -> None:
    config = make_generator(3).config
    with pytest.raises(BadInputError, match=r"a\.nii\.gz: expected voxels within a factor 2 of .* got 1 x 1 x 3 mm"):
        find_labels(write(tmp_path, (8, 8, 8), (1.0, 1.0, 3.0)), config)
    files, rejected = find_labels(write(tmp_path, (8, 8, 8), (1.9, 0.6, 1.0)), config)
    assert (len(files), rejected) == (1, [])


def test_a_spacing_is_compared_axis_by_axis_in_the_models_orientation(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    config = make_generator(3, orientation="RSA", spacing=(1.0, 4.0, 1.0)).config
    assert find_labels(write(tmp_path, (8, 8, 8), (1.0, 1.0, 4.0)), config)[0]


def test_other_dimensions_and_unknown_spacing_are_refused(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    array = np.zeros((16, 16), dtype=np.uint8)
    array[4:8, 4:8] = 1
    Image.fromarray(array).save(tmp_path / "a.png")
    with pytest.raises(BadInputError, match=r"a\.png: expected a 3D label map for the model 'tiny-3d', got 2D"):
        find_labels(tmp_path, make_generator(3).config)
    with pytest.raises(BadInputError, match=r"a\.png: expected a label map that states its voxel size"):
        find_labels(tmp_path, make_generator(2, spacing=(1.0, 1.0)).config)


def test_a_volume_that_does_not_say_how_it_lies_is_refused_where_the_model_has_an_orientation(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    array = np.zeros((8, 8, 8), dtype=np.uint8)
    array[2:6, 2:6, 2:6] = 1
    image = nib.Nifti1Image(array, None)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    with pytest.raises(BadInputError, match=r"a\.nii\.gz: expected a volume that states its orientation.* to RAS"):
        find_labels(tmp_path, make_generator(3, spacing=None).config)
    assert find_labels(tmp_path, make_generator(3, spacing=None, orientation=None).config)[0]


def test_a_folder_where_nothing_fits_is_an_error_even_when_skipping(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    write(tmp_path, (8, 8, 8), (9.0, 9.0, 9.0))
    with pytest.raises(BadInputError, match=r"expected label maps that fit the model, got none. First: .*a\.nii\.gz"):
        find_labels(tmp_path, make_generator(3).config, skip_bad=True)
