from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medgen.conditions.attributes import SPACING, Attribute
from medgen.conditions.edge import EdgeSettings
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Autoencoder, Denoiser, TextEncoder

WORDS = ("chest", "x", "ray", "effusion", "no", "finding", "pa", "ap")
ALL = ("mask", "edge", "text", "view", "age", "code", SPACING)


def build_generator(
    spatial_dims: int, *, label: bool = True, channels: int = 1, conditions: Sequence[str] = ("mask",), **config: object
) -> Generator:
    """A real generator of a few thousand weights: untrained, but every weight takes part."""
    torch.manual_seed(0)
    attributes = {
        "view": Attribute("category", values=("AP", "PA")),
        "age": Attribute("number", mean=50.0, std=10.0),
        "code": Attribute("vector", width=3),  # such as an embedding of another network
        SPACING: Attribute("spacing", mean=1.0, width=spatial_dims),
    }
    attributes = {name: attribute for name, attribute in attributes.items() if name in conditions}
    small = {
        "spatial_dims": spatial_dims,
        "channels": (8, 16),
        "attention_levels": (False, False),
        "num_res_blocks": 1,
        "num_head_channels": 8,
        "norm_num_groups": 4,
    }
    autoencoder = Autoencoder(spatial_dims=spatial_dims, in_channels=channels, channels=(4, 8), latent_channels=2)
    steered = {
        "edges": "edge" in conditions,
        "text_length": 6 if "text" in conditions else 0,
        "text_width": 8 if "text" in conditions else 0,
        "attributes": {name: attribute.features for name, attribute in attributes.items()},
    }
    classes = 3 if "mask" in conditions else 0
    # Words are attended to on the lower level only.
    levels = {"attention_levels": (False, "text" in conditions)}
    network = {**small, **levels, **steered}
    denoiser = Denoiser(in_channels=2, mask_classes=classes, mask_channels=4, mask_stride=2, **network)
    label_denoiser = Denoiser(in_channels=3, mask_classes=1, mask_channels=4, mask_stride=2, **small) if label else None
    text_encoder = TextEncoder(WORDS, width=8, depth=1, heads=2, length=6) if "text" in conditions else None
    for part in (autoencoder, denoiser, label_denoiser):
        for weight in [] if part is None else part.parameters():
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
        "edge": EdgeSettings(smoothing=1.0) if "edge" in conditions else None,
        "attributes": attributes,
    }
    networks = {"autoencoder": autoencoder, "label_denoiser": label_denoiser, "text_encoder": text_encoder}
    return Generator(GeneratorConfig(**{**values, **config}), denoiser, **networks)


@pytest.fixture(scope="session")
def make_generator() -> Callable[..., Generator]:
    return build_generator


@pytest.fixture(scope="session")
def model_3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-3d"
    build_generator(3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2D model that listens to every kind of condition."""
    folder = tmp_path_factory.mktemp("models") / "tiny-all"
    build_generator(2, conditions=ALL).save_pretrained(folder)
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


SIDES = (12, 10)


def picture(folder: Path, name: str, array: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return folder / name


def scan_array(seed: int, shape: tuple[int, ...] = SIDES) -> np.ndarray:
    """A bright disk on a dark ground; the seed moves it."""
    axes = np.indices(shape)
    center = np.array([size / 2 for size in shape]) + (seed % 3) - 1
    distance = np.sqrt(((axes - center.reshape(-1, *[1] * len(shape))) ** 2).sum(0))
    return (40 + 160 * (distance < 3) + 3 * axes[0]).astype(np.uint8)


@pytest.fixture
def folders_2d(tmp_path: Path) -> dict[str, Path]:
    """Three label maps, scans and edge maps of the same names and size."""
    for index in range(3):
        name = f"case_{index}.png"
        picture(tmp_path / "labels", name, label_array(SIDES, index))
        picture(tmp_path / "scans", name, scan_array(index))
        picture(tmp_path / "maps", name, (255 * (scan_array(index) > 150)).astype(np.uint8))
    return {"labels": tmp_path / "labels", "edges": tmp_path / "scans", "edge_maps": tmp_path / "maps"}
