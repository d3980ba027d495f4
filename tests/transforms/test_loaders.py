"""Random transforms in loaders: workers, epochs, threads and caches; and in pipelines of TorchIO."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio as tio
from monai.data import CacheDataset, Dataset, MetaTensor, PersistentDataset, ThreadDataLoader
from monai.data import DataLoader as MonaiLoader
from monai.transforms import Compose, RandFlipd, RandGaussianNoise
from monai.utils import set_determinism
from torch.utils.data import DataLoader

from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Autoencoder, Denoiser
from medgen.transforms import (
    RandAugMixd,
    RandBidirectionalCopyPasted,
    RandCropMixd,
    RandCutMixd,
    RandDiffusionCompositd,
    RandDiffusionVariationBatchd,
    RandDiffusionVariationd,
    RandLesionInsertiond,
    RandMixUpd,
    RandSnapMixd,
    RandYOCOd,
)
from medgen.transforms.workers import SeededInWorkers

FAST: dict[str, Any] = {"prob": 1.0, "num_inference_steps": 1, "precision": "fp32"}
SCANS = ("image", "again")
ALL = (*SCANS, "label")
LIMIT = 300
LESION = torch.zeros(1, 9, 9, dtype=torch.uint8)
LESION[0, 4:6, 4:6] = 2

SAMPLE: dict[str, Callable[[Any], Any]] = {
    "variation": lambda model: RandDiffusionVariationd(SCANS, model, "label", **FAST),
    "composit": lambda model: RandDiffusionCompositd(SCANS, model, "label", cell_size=4, **FAST),
    "partners": lambda model: RandDiffusionCompositd(SCANS, synthetic_key=("made", "made"), prob=1.0, cell_size=4),
    "lesion": lambda model: RandLesionInsertiond(SCANS, "label", model, 2, [1], [LESION], band=1, margin=0, **FAST),
    "yoco": lambda model: RandYOCOd(SCANS, RandFlipd(ALL, spatial_axis=0, prob=0.5), "label"),
    "cropmix": lambda model: RandCropMixd(SCANS, "label", 3, "cutmix", scale=(0.3, 1.0)),
    "augmix": lambda model: RandAugMixd(SCANS, [RandGaussianNoise(prob=1.0, std=0.1)], "label"),
}
BATCH: dict[str, Callable[[Any], Any]] = {
    "variation batch": lambda model: RandDiffusionVariationBatchd(SCANS, model, "label", device="cpu", **FAST),
    "mixup": lambda model: RandMixUpd(SCANS, "label", 3),
    "cutmix": lambda model: RandCutMixd(SCANS, "label", 3),
    "snapmix": lambda model: RandSnapMixd(SCANS, "label", None, 3),
    "copy paste": lambda model: RandBidirectionalCopyPasted(SCANS, "label", 3, beta=0.4),
}
BUILD = SAMPLE | BATCH
OF_MODEL = ("variation", "composit", "lesion", "variation batch")


def generator(spatial_dims: int) -> Generator:
    """A real generator of a few thousand weights: untrained, but every weight takes part."""
    torch.manual_seed(0)
    denoiser = Denoiser(
        spatial_dims=spatial_dims,
        in_channels=2,
        channels=(8, 16),
        attention_levels=(False, False),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=4,
        mask_classes=3,
        mask_channels=4,
        mask_stride=2,
    )
    autoencoder = Autoencoder(spatial_dims=spatial_dims, in_channels=1, channels=(4, 8), latent_channels=2)
    for part in (autoencoder, denoiser):
        for weight in part.parameters():
            if not weight.any():  # new diffusion networks end in zeros, and would ignore their input
                torch.nn.init.normal_(weight, std=0.1)
    config = GeneratorConfig(
        name=f"tiny-{spatial_dims}d",
        spatial_dims=spatial_dims,
        channel_names={0: "channel"},
        class_names={0: "background", 1: "organ", 2: "lesion"},
        size=(8,) * spatial_dims,
        objective=Objective(),
        normalization=Normalization(),
        intensity=IntensityMap((0.002,), (-1.0,)),
        spacing=(1.0, 1.0, 1.0) if spatial_dims == 3 else None,
        orientation="RAS" if spatial_dims == 3 else None,
        latent_scale=(1.0, 1.0),
        latent_shift=(0.0, 0.0),
    )
    return Generator(config, denoiser, autoencoder=autoencoder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By its name a model travels to workers."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    generator(2).save_pretrained(folder)
    return folder


def sample(rows: int = 20) -> dict[str, torch.Tensor]:
    noise = torch.rand(1, rows, 16, generator=torch.Generator().manual_seed(0))
    label = torch.zeros(1, rows, 16, dtype=torch.uint8)
    label[0, 2:-2, 2:12] = 1
    image = 100 + 50 * noise + 400 * label.float()  # above LIMIT in the organ only
    return {"image": image, "again": image.clone(), "label": label, "made": image + 50}


def item(name: str, rows: int = 20) -> dict[str, torch.Tensor]:
    """What the transform takes: a sample, or a batch of two, the second a mirror image."""
    one = sample(rows)
    if name not in BATCH:
        return one
    return {key: torch.stack([value, value.flip(2)]) for key, value in one.items()}


def draws(loader: Any) -> list[bytes]:
    """What came of each item."""
    return [batch["image"].numpy().tobytes() + batch["label"].float().numpy().tobytes() for batch in loader]


@pytest.fixture
def undetermined() -> Iterator[None]:
    yield
    set_determinism(None)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", BUILD)
def test_workers_of_torch_and_epochs_draw_apart_and_as_its_seed_says(name: str, model: Path) -> None:
    def epochs(seed: int) -> list[list[bytes]]:
        pipeline = Compose([BUILD[name](model)]).set_random_state(3)
        torch.manual_seed(seed)
        loader = DataLoader(Dataset([item(name)] * 4, pipeline), batch_size=1, num_workers=2)
        return [draws(loader) for _ in range(2)]

    first, second = epochs(0)
    assert first[0::2] != first[1::2] and first != second
    assert [first, second] == epochs(0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", BUILD)
def test_loaders_of_monai_repeat_under_determinism(name: str, workers: int, model: Path, undetermined: None) -> None:
    data = CacheDataset([item(name)] * 4, Compose([BUILD[name](model)]), progress=False)

    def epochs() -> list[list[bytes]]:
        set_determinism(0)
        loader = MonaiLoader(data, batch_size=1, num_workers=workers)
        return [draws(loader) for _ in range(2)]

    first, second = epochs()
    assert first != second
    assert [first, second] == epochs()


@pytest.mark.parametrize("name", BUILD)
def test_caches_freeze_nothing(name: str, model: Path, tmp_path: Path) -> None:
    for data in (
        CacheDataset([item(name)], Compose([BUILD[name](model)]), progress=False),
        PersistentDataset([item(name)], Compose([BUILD[name](model)]), cache_dir=tmp_path),
    ):
        made = draws(data[0] for _ in range(4))
        assert len(set(made)) > 1
        data.transform.set_random_state(5)
        first = draws(data[0] for _ in range(2))
        data.transform.set_random_state(5)
        assert first == draws(data[0] for _ in range(2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", BUILD)
def test_threads_that_share_a_transform_keep_what_belongs_together(name: str, model: Path) -> None:
    items = [item(name, rows) for rows in (20, 24)] * (12 if name in OF_MODEL else 40)
    data = CacheDataset(items, Compose([BUILD[name](model)]), progress=False)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        made = list(ThreadDataLoader(data, batch_size=1, num_workers=3, use_thread_workers=True))
    finally:
        sys.setswitchinterval(interval)
    assert len(made) == len(items)
    for batch in made:
        image, again, label = (batch[key][0] for key in ALL)
        assert torch.equal(image, again)
        given = item(name, image.shape[-2])
        if name == "lesion":
            assert (label == 2).any() and (image != given["image"])[label == 2].all()
        elif name in ("variation", "composit", "partners", "augmix", "variation batch"):
            assert torch.equal(label, given["label"])
        elif name in ("cropmix", "snapmix"):  # the nearest neighbor has a quarter or more of the linear interpolation
            assert (image[label == 1] > 199).all() and (image[label == 0] < 451).all()
        elif name == "mixup":
            assert ((image[:, 0] - 125) / 400 - label[:, 1]).abs().max() < 0.07
        else:
            assert torch.equal(image > LIMIT, label == 1)


class Draw(SeededInWorkers):
    """Adds its draw to the others."""

    def __call__(self, data: Any) -> Any:
        return {**data, len(data): self.R.random_sample()}


class Items(torch.utils.data.Dataset):
    """Unlike MONAI's it makes no Compose of the transform, which would seed it by chance."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Any:
        return self.transform({})


def drawn(transform: Any, workers: int = 2, **more: Any) -> list[list[float]]:
    torch.manual_seed(0)
    loader = DataLoader(Items(transform), batch_size=1, num_workers=workers, collate_fn=list, **more)
    return [list(batch[0].values()) for batch in loader]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("seed", [None, 0])
def test_transforms_of_one_class_draw_apart(seed: int | None) -> None:
    made = []
    for _ in range(2):
        parts = [Draw(), Draw()]
        pipeline = Compose(parts)
        for part in parts:
            part.set_random_state(seed)
        made.append(np.array(drawn(pipeline)))
    assert made[0].shape == (6, 2) and len(np.unique(made[0])) == 12
    assert np.array_equal(*made)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_seed_that_is_given_in_the_worker_or_without_one_stands() -> None:
    given = drawn(Draw(), worker_init_fn=_seed_by_hand)
    expected = [np.random.RandomState(seed).random_sample(3).tolist() for seed in (7, 8)]
    assert [values[0] for values in given] == [value for pair in zip(*expected, strict=True) for value in pair]
    here = drawn(Draw().set_random_state(4), workers=0)
    assert [values[0] for values in here] == np.random.RandomState(4).random_sample(6).tolist()


def _seed_by_hand(worker: int) -> None:
    torch.utils.data.get_worker_info().dataset.transform.set_random_state(7 + worker)


AFFINE = np.array([[0.0, -1.0, 0, 11], [-1.0, 0, 0, 5], [0, 0, 1.0, -4], [0, 0, 0, 1]])
SOLID = torch.zeros(1, 9, 9, 9, dtype=torch.uint8)
SOLID[0, 4:6, 4:6, 4:6] = 2
OF_TORCHIO: dict[str, Callable[[Generator, float], Any]] = {
    "variation": lambda model, prob: RandDiffusionVariationd("image", model, "label", **FAST | {"prob": prob}),
    "composit": lambda model, prob: RandDiffusionCompositd(
        "image", model, "label", cell_size=4, **FAST | {"prob": prob}
    ),
    "partners": lambda model, prob: RandDiffusionCompositd("image", synthetic_key="made", cell_size=4, prob=prob),
    "lesion": lambda model, prob: RandLesionInsertiond(
        "image", "label", model, 2, [0, 1], [SOLID], **FAST | {"prob": prob}
    ),
    "yoco": lambda model, prob: RandYOCOd("image", RandFlipd(("image", "label"), prob=1.0), "label", prob),
    "cropmix": lambda model, prob: RandCropMixd("image", "label", 3, scale=(0.3, 1.0), prob=prob),
    "augmix": lambda model, prob: RandAugMixd("image", [RandGaussianNoise(prob=1.0)], "label", prob=prob),
}


@pytest.fixture(scope="module")
def solid() -> Generator:
    return generator(3)


@pytest.mark.parametrize("prob", [0.0, 1.0])
@pytest.mark.parametrize("name", OF_TORCHIO)
def test_a_subject_of_torchio_stays_one(name: str, prob: float, solid: Generator) -> None:
    image = torch.rand(1, 12, 16, 14, generator=torch.Generator().manual_seed(0)) * 800 + 100
    label = torch.zeros(1, 12, 16, 14, dtype=torch.uint8)
    label[0, 2:10, 2:10, 2:10] = 1
    subject = tio.Subject(
        image=tio.ScalarImage(tensor=image, affine=AFFINE, sequence="T1"),
        label=tio.LabelMap(tensor=label, affine=AFFINE),
        made=tio.ScalarImage(tensor=image * 0, affine=AFFINE),
        age=50,
    )
    subject = tio.Flip(2)(subject)
    before = {key: subject[key].data.clone() for key in ("image", "label")}
    transform = OF_TORCHIO[name](solid, prob)
    done = transform.set_random_state(1)(subject)
    assert isinstance(done, tio.Subject) and isinstance(done["image"], tio.ScalarImage)
    assert isinstance(done["label"], tio.LabelMap) and done.label is done["label"] and done["age"] == 50
    assert done["image"]["sequence"] == "T1" and len(done.history) == 1
    as_dictionary = {
        key: MetaTensor(subject[key].data, affine=subject[key].affine) for key in ("image", "label", "made")
    }
    expected = transform.set_random_state(1)(as_dictionary)
    for key in ("image", "label"):
        assert torch.equal(done[key].data, expected[key].as_tensor())
        assert np.array_equal(done[key].affine, subject[key].affine)
        assert torch.equal(subject[key].data, before[key])
    assert (prob == 1) != torch.equal(done["image"].data, before["image"])
    turned = tio.Compose([transform.set_random_state(1), tio.Flip(0)])(subject)
    assert torch.equal(turned["image"].data, done["image"].data.flip(1)) and len(turned.history) == 2
    assert len(subject.history) == 1


def test_flat_subjects_and_dictionaries_of_images_of_torchio_are_taken() -> None:
    image = tio.ScalarImage(tensor=torch.rand(1, 10, 12, 1))
    mix = RandCropMixd("image", scale=(0.3, 1.0)).set_random_state(0)
    done = mix(tio.Subject(image=image))
    flat = mix({"image": image.data[..., 0]}, randomize=False)
    assert done["image"].shape == (1, 10, 12, 1) and torch.equal(done["image"].data[..., 0], flat["image"])
    plain = mix({"image": image}, randomize=False)
    assert type(plain) is dict and torch.equal(plain["image"].data, done["image"].data)
