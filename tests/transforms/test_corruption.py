"""Corruptions as users call them: families, severities, units, metadata, draws."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import AdjustContrast, Compose, RandRicianNoise, Transform
from scipy import ndimage
from skimage.data import camera, immunohistochemistry, shepp_logan_phantom
from skimage.transform import resize

from medgen.transforms.corruption import Corruption, Corruptiond, RandCorruption, RandCorruptiond, families
from medgen.types import BadInputError

MODALITIES = ("mri", "ct", "xray", "ultrasound", "oct", "histology", "microscopy")
ALL = [(modality, name) for modality in MODALITIES for name in families(modality)]


def scan(modality: str) -> torch.Tensor:
    """A picture with the edges, textures and flat parts of a real one, ``(C, 64, 64)``."""
    if modality == "histology":
        return torch.from_numpy(immunohistochemistry()[:128:2, :128:2].transpose(2, 0, 1).astype(np.float32))
    source = shepp_logan_phantom() if modality in ("mri", "ct") else camera() / 255.0
    values = resize(source, (64, 64), anti_aliasing=True).astype(np.float32)
    return torch.from_numpy(values[None]) * 2000 - (1000 if modality == "ct" else 0)


def psnr(image: torch.Tensor, other: torch.Tensor) -> float:
    span = float(image.max() - image.min())
    return float(10 * torch.log10(span**2 / (image - other).square().mean()))


@pytest.mark.parametrize(("modality", "name"), ALL)
def test_each_severity_is_worse_than_the_one_before(modality: str, name: str) -> None:
    image = scan(modality)
    scores = [psnr(image, Corruption(name, severity, modality, seed=4)(image)) for severity in range(1, 6)]
    assert all(first > second + 0.3 for first, second in itertools.pairwise(scores)), scores
    assert scores[0] < 55


@pytest.mark.parametrize("name", families("mri"))
def test_volumes_too(name: str) -> None:
    flat = scan("mri")[0, ::2, ::2]
    volume = torch.stack([flat * factor for factor in np.hanning(26)[1:-1]], dim=-1)[None].float()
    scores = [psnr(volume, Corruption(name, severity, seed=1)(volume)) for severity in (1, 3, 5)]
    assert scores[0] > scores[1] > scores[2]


@pytest.mark.parametrize(("modality", "name"), [("mri", "motion"), ("mri", "noise"), ("ct", "low_dose")])
def test_strengths_are_relative_to_the_scan(modality: str, name: str) -> None:
    image = scan(modality)
    factor = 0.003 if modality == "mri" else 2.0
    corruption = Corruption(name, 3, modality, seed=2)
    torch.testing.assert_close(corruption(image * factor), corruption(image) * factor, rtol=1e-4, atol=1e-3 * factor)


def test_channels_of_gray_scans_are_scaled_one_by_one() -> None:
    one = scan("mri")
    both = torch.cat([one, one * 1000])
    after = Corruption("gibbs", 4)(both)
    torch.testing.assert_close(after[1] / 1000, after[0], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("modality", "name"), ALL)
def test_type_shape_affine_and_units_stay(modality: str, name: str) -> None:
    affine = np.diag([1.5, 1.5, 1.0, 1.0])
    image = MetaTensor(scan(modality), affine=affine, meta={"filename_or_obj": "scan.nii"})
    before = image.clone()
    after = Corruption(name, 1, modality)(image)
    assert isinstance(after, MetaTensor) and after.dtype == torch.float32 and after.shape == image.shape
    assert np.array_equal(after.affine, affine) and after.meta["filename_or_obj"] == "scan.nii"
    assert torch.equal(image, before)
    assert abs(float(after.mean() - image.mean())) < 0.1 * float(image.max() - image.min())


def test_blur_follows_the_voxels_of_a_metatensor() -> None:
    image = scan("mri") / 1000
    after = Corruption("blur", 5)(MetaTensor(image, affine=np.diag([3.0, 1.5, 1.0, 1.0])))
    expected = ndimage.gaussian_filter(image.numpy(), (0, 1.15, 2.3), mode="nearest")
    np.testing.assert_allclose(after.numpy(), expected, atol=0.03)
    assert np.abs(Corruption("blur", 5)(image).numpy() - expected).max() > 0.05


@pytest.mark.parametrize("name", ["low_dose", "compression"])
def test_slices_lie_across_the_body_however_the_axes_are_stored(name: str) -> None:
    """A volume that stores its superior-inferior axis first is the same volume."""
    flat = scan("ct")[0, ::2, ::2]
    volume = torch.stack([flat * factor for factor in (0.7, 0.8, 0.9, 1.0, 1.1)], dim=-1)[None]
    affine = np.diag([0.8, 0.8, 2.5, 1.0])
    corruption = Corruption(name, 3, "ct", seed=1)
    upright = corruption(MetaTensor(volume, affine=affine))
    for space in ("RAS", "LPS"):
        stored = MetaTensor(volume.permute(0, 3, 1, 2), affine=affine[:, [2, 0, 1, 3]], meta={"space": space})
        assert torch.equal(corruption(stored).as_tensor().permute(0, 2, 3, 1), upright.as_tensor())
    assert torch.equal(corruption(volume), upright.as_tensor())
    # Nothing tells a plain tensor's axes apart: the last is taken.
    assert not torch.allclose(corruption(volume.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), upright.as_tensor())


def test_arrays_give_arrays_and_integers_give_floats() -> None:
    image = scan("xray").numpy()
    after = Corruption("blur", 2, "xray")(image[:, ::-1])
    assert isinstance(after, np.ndarray) and after.dtype == np.float32
    assert Corruption("blur", 2, "xray")(image.astype(np.float64)).dtype == np.float64
    assert Corruption("blur", 2, "xray")(image.astype(np.uint16)).dtype == np.float32


def test_the_same_seed_gives_the_same_voxels_and_another_seed_others() -> None:
    image = scan("mri")
    first = Corruption("motion", severity=3, seed=7)(image)
    assert torch.equal(first, pickle.loads(pickle.dumps(Corruption("motion", severity=3, seed=7)))(image))
    assert not torch.equal(first, Corruption("motion", severity=3, seed=8)(image))


def test_noise_is_that_of_monai() -> None:
    image = scan("mri")
    image = image / np.percentile(image.numpy(), 99.5)
    rng = np.random.RandomState(5)
    expected = RandRicianNoise(prob=1.0, std=0.065, sample_std=False).set_random_state(state=rng)(image)
    torch.testing.assert_close(Corruption("noise", 3, seed=5)(image), expected.as_tensor())


def test_contrast_is_that_of_monai_either_way() -> None:
    image = scan("mri").clamp(max=1500)
    expected = [AdjustContrast(np.exp(sign * 0.37))(image).as_tensor() for sign in (-1, 1)]
    got = [Corruption("contrast", 3, seed=seed)(image) for seed in range(8)]
    matches = [[torch.allclose(one, other, rtol=1e-3, atol=0.5) for other in expected] for one in got]
    assert all(sum(row) == 1 for row in matches) and {row[0] for row in matches} == {True, False}


def test_dicom_codes_are_known() -> None:
    assert families("MR") == families("mri") and families("US") == families("ultrasound")


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"modality: expected one of mri, ct, xray, .*, got 'pet'"):
        families("pet")
    with pytest.raises(BadInputError, match=r"corruption of ct: expected one of low_dose, .*, got 'motion'"):
        Corruption("motion", 3, "ct")
    with pytest.raises(BadInputError, match="severity: expected a whole number from 1 to 5, got 6"):
        Corruption("motion", 6)
    with pytest.raises(BadInputError, match="at least one family"):
        RandCorruption(names=())
    for prob in (-0.1, 1.5):
        with pytest.raises(BadInputError, match=rf"prob: expected a chance in \[0, 1\], got {prob}"):
            RandCorruption(prob=prob)
        with pytest.raises(BadInputError, match="prob: expected a chance in"):
            RandCorruptiond("image", prob=prob)


def test_scans_that_cannot_be_corrupted_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"expected \(C, H, W\) or \(C, H, W, D\), got \(8, 8\)"):
        Corruption("blur")(torch.rand(8, 8))
    with pytest.raises(BadInputError, match=r"expected an array, .*got str"):
        Corruption("blur")("scan.nii")
    with pytest.raises(BadInputError, match="expected finite intensities"):
        Corruption("blur")(torch.full((1, 8, 8), torch.nan))
    with pytest.raises(BadInputError, match="got channel 1 with 0 to 0"):
        Corruption("blur")(torch.stack([torch.rand(8, 8), torch.zeros(8, 8)]))
    with pytest.raises(BadInputError, match="stain: expected red, green and blue, got 1 channels"):
        Corruption("stain", 3, "histology")(torch.rand(1, 8, 8))


def test_the_record_of_a_draw_gives_the_same_voxels() -> None:
    image = scan("mri")
    transform = RandCorruption(prob=1.0).set_random_state(seed=0)
    for _ in range(3):
        after = transform(image)
        assert transform.last is not None and torch.equal(after, transform.last(image))
        assert torch.equal(after, transform(image, randomize=False))


def test_draws_cover_families_and_severities_and_respect_the_probability() -> None:
    transform = RandCorruption("xray", severities=(2, 4), prob=0.5).set_random_state(seed=0)
    seen = []
    for _ in range(200):
        transform.randomize()
        seen.append(transform.last)
    done = [one for one in seen if one is not None]
    assert 70 < len(done) < 130
    assert {one.name for one in done} == set(families("xray")) and {one.severity for one in done} == {2, 4}
    transform.prob = 0.0
    image = scan("xray")
    assert transform(image) is image and transform.last is None


def test_all_keys_get_the_same_corruption_and_labels_none() -> None:
    image, label = scan("mri"), torch.ones(1, 64, 64, dtype=torch.int16)
    transform = Compose([RandCorruptiond(keys=["t1", "t2"], names=["motion"], prob=1.0)])
    transform.set_random_state(seed=3)
    sample = transform({"t1": image, "t2": image.clone(), "label": label})
    assert torch.equal(sample["t1"], sample["t2"]) and not torch.equal(sample["t1"], image)
    assert sample["label"] is label
    again = transform.set_random_state(seed=3)({"t1": image, "t2": image.clone(), "label": label})
    assert torch.equal(sample["t1"], again["t1"])


def test_a_corruption_is_a_transform_of_monai_with_a_version_for_dictionaries() -> None:
    image = scan("mri")
    corruption = Corruption("ghosting", 4, seed=2)
    assert isinstance(corruption, Transform)
    made = Compose([Corruptiond(["t1", "t2"], "ghosting", 4, seed=2)])({"t1": image, "t2": image, "label": image})
    assert torch.equal(made["t1"], Compose([corruption])(image)) and torch.equal(made["t2"], made["t1"])
    assert made["label"] is image
    with pytest.raises(BadInputError, match="corruption of mri: expected one of"):
        Corruptiond("t1", "stain")


def test_the_last_draw_of_a_sample_is_replayed() -> None:
    transform = RandCorruptiond("image", names=["motion"], prob=1.0).set_random_state(seed=0)
    first = transform({"image": scan("mri")})["image"]
    assert torch.equal(transform({"image": scan("mri")}, randomize=False)["image"], first)
    assert not torch.equal(transform({"image": scan("mri")})["image"], first)
    transform.last = None
    image = scan("mri")
    assert transform({"image": image}, randomize=False)["image"] is image


class Plain(torch.utils.data.Dataset):
    """A data set that knows nothing of MONAI's seeds."""

    def __init__(self, transform: RandCorruptiond) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform({"image": scan("mri")})["image"].sum()


def test_workers_of_a_plain_loader_draw_apart_in_each_epoch() -> None:
    data = Plain(RandCorruptiond("image", names=["noise"], prob=1.0).set_random_state(seed=0))
    loader = torch.utils.data.DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context="fork")
    torch.manual_seed(0)
    epochs = [[float(batch) for batch in loader] for _ in range(2)]
    assert len({*epochs[0], *epochs[1]}) == 16
    torch.manual_seed(0)
    assert [float(batch) for batch in loader] == epochs[0]


def test_workers_draw_anew_and_alike_in_each_run() -> None:
    def run() -> list[torch.Tensor]:
        transform = RandCorruptiond(keys="image", names=["noise"], prob=1.0).set_random_state(seed=1)
        data = Dataset([{"image": scan("mri")} for _ in range(4)], Compose([transform]))
        torch.manual_seed(0)
        return [batch["image"] for batch in DataLoader(data, batch_size=1, num_workers=2)]

    first, second = run(), run()
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len({float(one.sum()) for one in first}) == 4
