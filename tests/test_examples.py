"""Every example runs, at toy size, in a process of its own."""

import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

SPLITS = ("train", "train", "val", "test")


def run(repository, name, *arguments):
    command = [sys.executable, str(repository / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("dims", [2, 3])
def test_own_data_goes_all_the_way(repository, tmp_path, dims):
    output = tmp_path / "toy"
    run(repository, f"own_data_{dims}d.py", "--toy", "--output", output)
    ending = "png" if dims == 2 else "nii.gz"
    assert len(list((output / "synthetic" / "imagesTr").glob(f"*_0000.{ending}"))) == 4
    assert (output / "synthetic" / "contact_sheet.png").exists()
    assert (output / "report" / "report.json").exists()
    if dims == 3:
        scan = nib.load(next((output / "synthetic" / "imagesTr").glob("*.nii.gz")))
        assert scan.shape == (24, 24, 20)
        np.testing.assert_allclose(scan.affine, np.diag([2.0, 2.0, 2.0, 1.0]))


def test_the_parts_make_two_different_scans_of_one_label(repository, tmp_path):
    run(repository, "python_api.py", "--output", tmp_path, "--steps", 2)
    label, first, second = (nib.load(tmp_path / f"{name}.nii.gz").get_fdata() for name in ("label", "scan_0", "scan_1"))
    assert label.shape == first.shape == second.shape
    assert np.abs(first - second).mean() > 1


def test_own_conditions_steer_alone_together_and_by_a_table(repository, tmp_path):
    output = tmp_path / "toy"
    run(repository, "own_conditions.py", "--output", output, "--max_steps", 2)
    steered = {
        folder: [
            json.loads(line)["conditions"] for line in (output / folder / "manifest.jsonl").read_text().splitlines()
        ]
        for folder in ("by_text", "by_mask_and_stain", "by_table")
    }
    assert steered["by_text"] == [{"text": "a large dark disk"}] * 4
    assert steered["by_mask_and_stain"] == [{"attributes": {"stain": "dark"}}] * 12
    assert [sorted(row) for row in steered["by_table"]] == [["text"], ["attributes", "edge"], ["attributes"]]


def test_a_volume_is_changed_where_it_should_be_and_keeps_its_place(repository, tmp_path):
    printed = run(repository, "edit_3d.py", "--output", tmp_path, "--steps", 2)
    kept = [int(share) for share in re.findall(r": (\d+) % of the voxels", printed)]
    assert kept[0] < 20 and all(20 < share < 100 for share in kept[1:])
    source = nib.load(next((tmp_path / "source" / "imagesTr").glob("*.nii.gz")))
    label = next((tmp_path / "source" / "labelsTr").glob("*.nii.gz"))
    for name in ("look", "region", "anatomy"):
        image, after = (nib.load(tmp_path / f"{name}{ending}.nii.gz") for ending in ("", "_label"))
        np.testing.assert_array_equal(image.affine, source.affine)
        same = np.array_equal(after.dataobj, nib.load(label).dataobj)
        assert same == (name != "anatomy")
    assert Image.open(tmp_path / "edited.png").size[0] > 600


@pytest.mark.parametrize("name", ["monai_2d", "monai_3d", "pytorch"])
def test_loops_train_on_real_and_synthetic_pairs(repository, tmp_path, name):
    printed = run(repository, f"{name}.py", "--toy", tmp_path / "toy")
    epochs = re.findall(r"epoch \d: loss ([\d.]+), (\d+) of (\d+) pairs synthetic", printed)
    assert len(epochs) == 2
    assert all(0 < float(loss) < 10 for loss, _, _ in epochs)
    synthetic, pairs = (sum(int(row[column]) for row in epochs) for column in (1, 2))
    assert 0 < synthetic < pairs
    # Of 12 images 4 are for validation; of 4 volumes one is set aside.
    assert pairs == 2 * (8 if name == "monai_2d" else 3)
    data, bank = tmp_path / "toy" / "data", tmp_path / "toy" / "synthetic"
    assert len((bank / "manifest.jsonl").read_text().splitlines()) in (4, 12)
    rows = ["image,label,split"]
    for index, image in enumerate(sorted((data / "images").iterdir())[:4]):
        rows.append(f"images/{image.name},{f'labels/{image.name}' if index else ''},{SPLITS[index]}")
    (data / "metadata.csv").write_text("\n".join(rows) + "\n")
    printed = run(repository, f"{name}.py", "--data", data, "--bank", bank, "--epochs", 1)
    assert "of 1 pairs synthetic" in printed  # what has no label, is for validation or for testing stays out


def test_the_plain_loop_refuses_what_it_cannot_load_in_plain_words(repository, tmp_path):
    for name in ("t1", "t2", "label"):
        voxels = np.arange(64, dtype=np.uint8).reshape(4, 4, 4) % 2
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"{name}.nii.gz")
    (tmp_path / "metadata.csv").write_text("image,label\nt1.nii.gz;t2.nii.gz,label.nii.gz\n")
    command = [sys.executable, str(repository / "examples" / "pytorch.py"), "--data", tmp_path, "--bank", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected volumes of one channel, got" in done.stderr


def test_the_plain_loop_names_no_monai(repository):
    sources = [(repository / "examples" / name).read_text() for name in ("pytorch.py", "own_data_3d.py")]
    assert not any(re.search(r"^\s*(from|import) monai", source, re.MULTILINE) for source in sources)


def test_views_of_images_and_volumes_are_made_and_drawn(repository, tmp_path):
    printed = run(repository, "test_time_2d.py", "--toy", tmp_path / "toy", "--output", tmp_path / "views.png")
    before, after = map(float, re.search(r"([\d.]+) alone, ([\d.]+) with views", printed).groups())
    assert 0.2 < before < 1 and 0.2 < after < 1
    assert "26 evaluations an image" in printed and (tmp_path / "views.png").stat().st_size > 5000
    output = tmp_path / "predicted"
    options = ["--num_views", 2, "--mirror", 0, "--output", output]
    printed = run(repository, "test_time_3d.py", "--toy", tmp_path / "toy_3d", *options)
    assert "4 predictions, 16 evaluations, fallback: none" in printed and "affine kept: True" in printed
    scan = nib.load(next((tmp_path / "toy_3d" / "synthetic" / "imagesTr").glob("*.nii.gz")))
    for name in ("label", "entropy", "mutual_information"):
        assert nib.load(next(output.glob(f"*_{name}.nii.gz"))).shape == scan.shape
    assert Image.open(output / "views.png").size[0] > 600
