from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Autoencoder, Denoiser


def build_generator(spatial_dims: int, *, label: bool = True, channels: int = 1, **config: object) -> Generator:
    """A real generator of a few thousand weights: untrained, but every weight takes part."""
    torch.manual_seed(0)
    small = {
        "spatial_dims": spatial_dims,
        "channels": (8, 16),
        "attention_levels": (False, False),
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 4,
    }
    autoencoder = Autoencoder(spatial_dims=spatial_dims, in_channels=channels, channels=(4, 8), latent_channels=2)
    denoiser = Denoiser(in_channels=2, mask_classes=3, mask_channels=4, mask_stride=2, **small)
    label_denoiser = Denoiser(in_channels=3, mask_classes=1, mask_channels=4, mask_stride=2, **small) if label else None
    for network in (autoencoder, denoiser, label_denoiser):
        for weight in [] if network is None else network.parameters():
            if not weight.any():  # new diffusion networks end in zeros, and would ignore their input
                torch.nn.init.normal_(weight, std=0.1)
    values = {
        "name": f"tiny-{spatial_dims}d",
        "spatial_dims": spatial_dims,
        "channel_names": {0: "MR"} if channels == 1 else {0: "R", 1: "G", 2: "B"},
        "class_names": {0: "background", 1: "head", 2: "tail"},
        "size": (8,) * spatial_dims,
        "objective": Objective(),
        "normalization": Normalization(),
        "intensity": IntensityMap((0.002,) * channels, (-1.0,) * channels),  # 0..1000 in source units
        "image_dtype": "int16" if spatial_dims == 3 else "uint16",
        "spacing": (1.0, 1.0, 1.0) if spatial_dims == 3 else None,
        "orientation": "RAS" if spatial_dims == 3 else None,
        "latent_scale": (1.0, 1.0),
        "latent_shift": (0.0, 0.0),
        "label_objective": Objective() if label else None,
        "label_stride": 2 if label else 1,
        "guidance_scale": 1.5,
        "temperature": 0.9,
        "shapes": ((11, 9, 10), (8, 12, 7)) if spatial_dims == 3 else ((12, 10),),
        "constant_classes": (1,),
    }
    return Generator(GeneratorConfig(**{**values, **config}), denoiser, autoencoder, label_denoiser)


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    return build_generator


@pytest.fixture(scope="session")
def model_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-3d"
    build_generator(3).save_pretrained(folder)
    return folder


def label_array(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Two boxes that touch, somewhere inside."""
    array = np.zeros(shape, dtype=np.uint8)
    shift = seed % 2
    inner = tuple(slice(2 + shift, size - 3 + shift) for size in shape)
    array[inner] = 1
    array[(slice(size_half := shape[0] // 2, shape[0] - 3 + shift), *inner[1:])] = 2
    assert size_half > 0
    return array


@pytest.fixture
def labels_3d(tmp_path: Path) -> Path:
    """Three label maps; two share a grid, one is stored in another orientation and voxel size."""
    folder = tmp_path / "labels"
    folder.mkdir()
    affine = np.array([[1.0, 0, 0, -5], [0, 1, 0, 7], [0, 0, 1, 3], [0, 0, 0, 1]])
    lps = np.array([[-1.25, 0, 0, 20], [0, -1, 0, 11], [0, 0, 0.9, 3], [0, 0, 0, 1]])
    for index, (shape, matrix) in enumerate([((11, 9, 10), affine), ((11, 9, 10), affine), ((9, 12, 8), lps)]):
        nib.save(nib.Nifti1Image(label_array(shape, index), matrix), folder / f"case_{index}.nii.gz")
    return folder
