"""Every example runs, at toy size, in a process of its own."""

import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest


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


@pytest.mark.parametrize("name", ["monai_2d", "monai_3d", "pytorch"])
def test_loops_train_on_real_and_synthetic_pairs(repository, tmp_path, name):
    printed = run(repository, f"{name}.py", "--toy", tmp_path / "toy")
    epochs = re.findall(r"epoch \d: loss ([\d.]+)(?:, (\d+) of (\d+) pairs synthetic)?", printed)
    assert len(epochs) == 2
    assert all(0 < float(loss) < 10 for loss, _, _ in epochs)
    if name != "pytorch":
        synthetic, pairs = (sum(int(row[column]) for row in epochs) for column in (1, 2))
        assert 0 < synthetic < pairs
    assert len((tmp_path / "toy" / "synthetic" / "manifest.jsonl").read_text().splitlines()) in (4, 12)
