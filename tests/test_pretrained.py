"""The model that the package carries: whole, small, documented, and able to do its job."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

import medgen
from medgen.generator import Generator
from medgen.synthesis import SamplingSettings, iter_samples, plan_samples

FOLDER = Path(medgen.__file__).parent / "pretrained" / "hippocampus-mr-3d"


@pytest.fixture(scope="module")
def samples():
    generator = Generator.from_pretrained("hippocampus-mr-3d")
    settings = SamplingSettings(num_inference_steps=10)
    return generator, list(iter_samples(generator, plan_samples(2, seed=3), settings, batch_size=2))


def test_weights_are_safetensors_within_twenty_megabytes():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 20e6


def test_the_card_says_licence_source_use_and_limits():
    card = (FOLDER / "README.md").read_text()
    for word in ("CC BY-SA 4.0", "arXiv:1902.09063", "Intended use", "Limits", "Measured"):
        assert word in card


def test_it_draws_both_parts_of_a_hippocampus_of_a_plausible_volume(samples):
    _, drawn = samples
    for sample in drawn:
        volumes = [float((sample.label == value).sum()) / 1000 for value in (1, 2)]  # ml, at 1 mm voxels
        # In the training set both lie between 0.8 and 2.6 ml.
        assert all(0.6 < volume < 3.2 for volume in volumes)
        regions, _ = ndimage.label(sample.label.numpy() > 0)
        sizes = np.bincount(regions.ravel())[1:]
        assert max(sizes) > 0.97 * sum(sizes)
        assert sample.grid.spacing == pytest.approx((1, 1, 1))


def test_the_scan_follows_its_label(samples):
    _, drawn = samples
    for sample in drawn:
        inside = sample.image[0][sample.label > 0]
        rim = torch.from_numpy(ndimage.binary_dilation(sample.label.numpy() > 0, iterations=3)) & (sample.label == 0)
        # Gray matter beside white matter: darker than its surroundings and more even.
        assert inside.mean() < sample.image[0][rim].mean()
        assert inside.std() < sample.image[0][rim].std()


def test_different_seeds_give_different_labels_and_scans(samples):
    _, (first, second) = samples
    assert first.label.shape != second.label.shape or (first.label != second.label).float().mean() > 0.01
