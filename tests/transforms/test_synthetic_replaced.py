from __future__ import annotations

import re
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torchio as tio
from monai.data import (
    CacheDataset,
    DataLoader,
    Dataset,
    MetaTensor,
    PersistentDataset,
    ThreadDataLoader,
    list_data_collate,
)
from monai.transforms import Compose, EnsureTyped, Flipd, LoadImaged, Orientationd, ScaleIntensityd, Spacingd
from monai.utils import set_determinism

from medgen.generator.scans import affine_of
from medgen.transforms import (
    Corruptiond,
    LowDosed,
    LowResolutiond,
    RandCorruptiond,
    RandLowDosed,
    RandLowResolutiond,
    RandSyntheticReplace,
    RandSyntheticReplaceD,
    RandSyntheticReplaced,
    RandSyntheticReplaceDict,
    SyntheticBank,
)
from medgen.types import BadInputError

KEYS = ("image", "label")
LOAD = [LoadImaged(KEYS, ensure_channel_first=True)]
# Voxel (0, 0, 0) tells pairs apart: real ones end in a half, see conftest.py.
REAL_PART = 0.5


@pytest.fixture
def bank(make_bank, tmp_path) -> SyntheticBank:
    return SyntheticBank(make_bank(tmp_path / "bank"))


@pytest.fixture
def samples(real_files) -> list[dict]:
    load = Compose(LOAD)
    return [load(files) for files in real_files]


def corner(image) -> float:
    return float(np.asarray(image).reshape(-1)[0])


def is_real(image) -> bool:
    return corner(image) % 1 == REAL_PART


def seen(loader) -> list[tuple]:
    """What tells which pairs a loader gave, in its order: two voxels of each image and one of each label."""
    return [
        (*image.reshape(-1)[[0, 7]].tolist(), *label.reshape(-1)[[0, 150]].tolist())
        for batch in loader
        for image, label in zip(batch["image"], batch["label"], strict=True)
    ]


def test_the_call_of_a_user_works_inside_compose(make_bank, real_files, tmp_path):
    folder = make_bank(tmp_path / "synthetic")
    train = Compose(
        [*LOAD, RandSyntheticReplaced(keys="image", label_key="label", bank=str(folder), prob=0.5), EnsureTyped(KEYS)]
    )
    train.set_random_state(0)
    drawn = [train(files)["image"] for files in real_files * 10]
    share = np.mean([not is_real(image) for image in drawn])
    # Four standard deviations of a share of 60 draws.
    assert abs(share - 0.5) < 4 * 0.5 / np.sqrt(60)
    assert RandSyntheticReplaceD is RandSyntheticReplaceDict is RandSyntheticReplaced


def test_a_pair_of_the_bank_takes_the_place_of_the_whole_pair(bank, samples):
    replaced = RandSyntheticReplaced("image", "label", bank, prob=1.0).set_random_state(3)
    drawn = set()
    for sample in samples * 5:
        before = {key: sample[key].clone() for key in KEYS}
        out = replaced({**sample, "age": 7})
        image = next(index for index, (own, _) in enumerate(bank) if np.array_equal(own.array, out["image"].numpy()))
        np.testing.assert_array_equal(out["label"].numpy(), bank[image][1].array)
        assert out["age"] == 7
        assert all(torch.equal(sample[key], before[key]) for key in KEYS)
        drawn.add(image)
    assert drawn == {0, 1, 2, 3}


def test_items_are_drawn_alike_and_as_often_as_asked(bank, samples):
    from scipy.stats import binomtest, chisquare

    replaced = RandSyntheticReplaced("image", "label", bank, prob=0.3).set_random_state(0)
    out = [corner(replaced(samples[0])["image"]) for _ in range(600)]
    synthetic = [value for value in out if value % 1 != REAL_PART]
    assert binomtest(len(synthetic), 600, 0.3).pvalue > 0.001
    corners = [corner(image.array) for image, _ in bank]
    assert len(set(corners)) == 4
    assert chisquare([synthetic.count(value) for value in corners]).pvalue > 0.001


def test_a_meta_tensor_keeps_its_kind_and_tells_where_it_is_from(make_bank, samples, tmp_path):
    folder = make_bank(tmp_path / "other", spacing=1.05)
    replaced = RandSyntheticReplaced("image", "label", folder, prob=1.0).set_random_state(0)
    out = replaced(samples[0])
    for key in KEYS:
        made, given = out[key], samples[0][key]
        assert isinstance(made, MetaTensor)
        assert (made.dtype, made.shape, made.device) == (given.dtype, given.shape, given.device)
        np.testing.assert_allclose(made.affine, nib.load(made.meta["filename_or_obj"]).affine)
        assert made.meta["synthetic"] is True
        assert Path(made.meta["filename_or_obj"]).is_relative_to(folder)
    stays = RandSyntheticReplaced("image", "label", folder, prob=0.0)(samples[0])
    assert stays["image"].meta["synthetic"] is False
    assert stays["image"].meta["filename_or_obj"] == samples[0]["image"].meta["filename_or_obj"]
    assert "synthetic" not in samples[0]["image"].meta
    assert torch.equal(stays["image"], samples[0]["image"])


def test_what_replaces_a_scan_tells_of_its_file_as_a_loaded_one_does(bank, samples, make_bank, tmp_path):
    made = RandSyntheticReplaced("image", "label", bank, prob=1.0)(samples[0])
    for key in KEYS:
        loaded = Compose(LOAD)({name: made[name].meta["filename_or_obj"] for name in KEYS})[key]
        for fact in ("original_affine", "spatial_shape", "affine", "space", "filename_or_obj"):
            np.testing.assert_array_equal(made[key].meta[fact], loaded.meta[fact])
        # An identity that a file states is not one for want of an affine.
        np.testing.assert_array_equal(affine_of(made[key]), np.eye(4))
    batch = list_data_collate([made, samples[0]])
    assert batch["image"].meta["original_affine"].shape == (2, 4, 4)
    assert batch["image"].meta["spatial_shape"].tolist() == [[9, 8, 7]] * 2
    prepare = [*LOAD, Orientationd(KEYS, "LPS", labels=None), SPACING]
    turned = SyntheticBank(make_bank(tmp_path / "turned"), preprocess=prepare)
    out = RandSyntheticReplaced("image", "label", turned, prob=1.0)(Compose(prepare[1:])(samples[0]))["image"]
    np.testing.assert_array_equal(out.meta["original_affine"], np.eye(4))
    np.testing.assert_array_equal(out.meta["spatial_shape"], (9, 8, 7))
    assert tuple(out.shape[1:]) != (9, 8, 7)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_arrays_and_tensors_give_their_own_kind_and_type(make_bank, samples, tmp_path, kind):
    def read(files):
        made = {key: np.asarray(nib.load(files[key]).dataobj)[None].astype(np.float64) for key in KEYS}
        return {"image": kind(made["image"]), "label": kind(made["label"].astype(np.int64)[0])}

    folder = make_bank(tmp_path / "arrays")
    replace = RandSyntheticReplace(folder, prob=1.0, preprocess=read).set_random_state(0)
    given = read({key: samples[0][key].meta["filename_or_obj"] for key in KEYS})
    image, label = replace(given["image"], given["label"])
    for made, own in ((image, given["image"]), (label, given["label"])):
        assert (type(made), made.dtype, made.shape) == (type(own), own.dtype, own.shape)
    assert not is_real(image)
    image[:] = 0  # the bank stays as it is
    assert corner(replace.bank[0][0].array) > 0


def test_images_alone_can_be_replaced(make_bank, samples, tmp_path):
    folder = make_bank(tmp_path / "bare", labelled=False)
    image = RandSyntheticReplace(folder, prob=1.0, labelled=False).set_random_state(0)(samples[0]["image"])
    assert not is_real(image)
    out = RandSyntheticReplaced("image", None, folder, prob=1.0)(samples[0])
    assert not is_real(out["image"])
    assert out["label"] is samples[0]["label"]


def test_draws_come_from_its_own_stream_alone(bank, samples):
    replaced = RandSyntheticReplaced("image", "label", bank)

    def draws():
        return [corner(replaced(samples[0])["image"]) for _ in range(20)]

    replaced.set_random_state(5)
    set_determinism(1)
    before = torch.get_rng_state()
    first = draws()
    assert torch.equal(torch.get_rng_state(), before)
    set_determinism(2)
    replaced.set_random_state(state=np.random.RandomState(5))
    assert draws() == first
    set_determinism(None)
    replaced.set_random_state(6)
    assert draws() != first
    image, label = replaced.inner(samples[0]["image"], samples[0]["label"])
    again = replaced.inner(samples[0]["image"], samples[0]["label"], randomize=False)
    assert torch.equal(image, again[0])
    assert torch.equal(label, again[1])


def test_caches_stop_before_it(bank, real_files, tmp_path):
    train = Compose([*LOAD, RandSyntheticReplaced("image", "label", bank)])
    for dataset in (
        CacheDataset(real_files, train, num_workers=0, progress=False),
        PersistentDataset(real_files, train, tmp_path / "cache", track_meta=True, weights_only=False),
    ):
        train.set_random_state(0)
        epochs = [[corner(dataset[index]["image"]) for index in range(len(dataset))] for _ in range(6)]
        assert len({tuple(epoch) for epoch in epochs}) > 1
        for column in zip(*epochs, strict=True):
            # Each case is now itself, now another, and comes back unharmed.
            assert any(value % 1 != REAL_PART for value in column)
            assert len({value for value in column if value % 1 == REAL_PART}) == 1


def test_a_store_that_drops_affines_is_named(bank, real_files, tmp_path):
    train = Compose([*LOAD, RandSyntheticReplaced("image", "label", bank)])
    dataset = PersistentDataset(real_files, train, cache_dir=tmp_path / "cache")
    dataset[0]
    with pytest.raises(RuntimeError) as raised:
        dataset[0]
    expected = "expected images that carry their affine, got Tensor.*PersistentDataset does with track_meta=True"
    assert re.search(expected, str(raised.value.__cause__))


def test_a_loader_in_threads_gives_whole_pairs(bank, real_files):
    train = Compose([*LOAD, RandSyntheticReplaced("image", "label", bank)])
    dataset = CacheDataset(real_files * 3, train, num_workers=0, progress=False)
    pairs = {tuple(image.array.reshape(-1)[[0, 7]].tolist()) for image, _ in bank}
    for workers in (0, 2):
        loader = ThreadDataLoader(dataset, batch_size=2, num_workers=workers, use_thread_workers=workers > 0)
        rows = seen(loader)
        assert len(rows) == len(dataset)
        synthetic = [row for row in rows if row[0] % 1 != REAL_PART]
        assert synthetic
        assert {row[:2] for row in synthetic} <= pairs


def run(dataset, seed: int, workers: int, context: str | None = None, epochs: int = 2) -> list[list[tuple]]:
    set_determinism(seed)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=context)
    rows = [seen(loader) for _ in range(epochs)]
    set_determinism(None)
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_gives_the_same_pairs_again_under_set_determinism(bank, real_files, workers):
    train = Compose([*LOAD, RandSyntheticReplaced("image", "label", bank)])
    dataset = CacheDataset(real_files * 2, train, num_workers=0, progress=False)
    context = "fork" if workers else None
    first, again, other = (run(dataset, seed, workers, context) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first[0] != first[1]
    if workers:
        assert run(dataset, 1, 0)[0] != first[0]  # as told: each worker has a stream of its own


def test_a_worker_that_is_spawned_reopens_the_bank_and_draws_as_a_forked_one(bank, real_files):
    dataset = Dataset(real_files, Compose([*LOAD, RandSyntheticReplaced("image", "label", bank)]))
    spawned, forked = (run(dataset, 1, 1, context, epochs=1) for context in ("spawn", "fork"))
    assert spawned == forked
    assert {row[0] % 1 == REAL_PART for row in spawned[0]} == {True, False}


class Plain(torch.utils.data.Dataset):
    """A data set that knows nothing of MONAI's seeds."""

    def __init__(self, samples, replace):
        self.samples, self.replace = samples, replace

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.as_tensor(corner(self.replace(**self.samples[0])[0]))


def test_workers_of_a_plain_loader_draw_apart_and_by_the_seed_of_torch(bank, samples):
    pair = {key: samples[0][key] for key in KEYS}
    dataset = Plain([pair], RandSyntheticReplace(bank).set_random_state(0))

    def epoch(seed):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(dataset, batch_size=20, num_workers=2, multiprocessing_context="fork")
        return [batch.tolist() for batch in loader]

    first = epoch(1)
    assert first[0] != first[1]
    assert epoch(1) == first
    assert epoch(2) != first


class Twice(torch.utils.data.Dataset):
    """Two banks, one after the other; tells which pairs each of them gave."""

    def __init__(self, sample, first, second):
        self.sample, self.replaced = sample, (first, second)

    def __len__(self):
        return 120

    def __getitem__(self, index):
        drawn = [replaced(self.sample)["image"].meta["synthetic"] for replaced in self.replaced]
        return torch.tensor([*drawn, all(drawn)])


def test_two_banks_draw_apart_in_the_workers_of_a_plain_loader(make_bank, samples, tmp_path):
    dataset = Twice(samples[0], *(RandSyntheticReplaced("image", "label", make_bank(tmp_path / name)) for name in "ab"))
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=20, num_workers=2, multiprocessing_context="fork")
    first, second, both = torch.cat(list(loader)).double().mean(0).tolist()
    # Four standard deviations of a share of 120 draws.
    assert abs(first - 0.5) < 0.18 and abs(second - 0.5) < 0.18 and abs(both - 0.25) < 0.16


def test_a_label_map_draws_only_what_was_made_from_it(make_bank, real_files, samples, tmp_path):
    sources = [Path(files["label"]) for files in real_files[:3]]
    folder = make_bank(tmp_path / "from", made_from=sources, count=7)
    replaced = RandSyntheticReplaced("image", "label", folder, prob=1.0, draw="label").set_random_state(0)
    bank = replaced.inner.bank
    for index in range(3):
        corners = {corner(image.array) for image, _ in list(bank)[index::3]}
        assert {corner(replaced(samples[index])["image"]) for _ in range(30)} == corners
    with pytest.warns(UserWarning, match="has no scan for label map case_4.nii.gz: such samples are never replaced"):
        assert is_real(replaced(samples[4])["image"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_real(replaced(samples[5])["image"])


def test_drawing_by_label_refuses_what_it_cannot_match(make_bank, bank, real_files, samples, tmp_path):
    with pytest.raises(BadInputError, match="expected scans made from label maps of real cases, got none"):
        RandSyntheticReplaced("image", "label", bank, draw="label")
    source = Path(real_files[0]["label"])
    folder = make_bank(tmp_path / "from", made_from=[source])
    nameless = {key: MetaTensor(samples[0][key].as_tensor(), affine=samples[0][key].affine) for key in KEYS}
    replaced = RandSyntheticReplaced("image", "label", folder, prob=1.0, draw="label")
    with pytest.raises(BadInputError, match="expected labels that name the file they come from"):
        replaced(nameless)
    voxels = np.asarray(nib.load(source).dataobj).copy()
    voxels[0, 0, 0] = 1
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), source)
    with pytest.raises(BadInputError, match=r"case_0.nii.gz: expected the label map that scans of .* were made from"):
        replaced(Compose(LOAD)(real_files[0]))
    with pytest.raises(BadInputError, match="expected labels to draw by label, got a bank without"):
        RandSyntheticReplace(make_bank(tmp_path / "bare", labelled=False), draw="label", labelled=False)


def test_a_class_draws_only_scans_that_show_the_same_classes(make_bank, make_pair, samples, tmp_path):
    folder = make_bank(tmp_path / "classes", classes=[(1,), (1, 2)])
    replaced = RandSyntheticReplaced("image", "label", folder, prob=1.0, draw="class").set_random_state(0)
    bank = list(replaced.inner.bank)
    for classes, own in (((1,), bank[0::2]), ((1, 2), bank[1::2])):
        image, label = make_pair(50, 3, 1, classes)
        sample = {"image": MetaTensor(image + REAL_PART), "label": MetaTensor(label[None])}
        drawn = {corner(replaced(sample)["image"]) for _ in range(30)}
        assert drawn == {corner(image.array) for image, _ in own}
    image, label = make_pair(50, 3, 1, (1, 3))
    with pytest.raises(BadInputError, match="expected label values 0, 1, 2 as in the bank, got 3 too"):
        replaced.inner(MetaTensor(image + REAL_PART), MetaTensor(label[None]), randomize=False)
    image, label = make_pair(50, 3, 1, (2,))
    with pytest.warns(UserWarning, match="has no scan for classes 0, 2: such samples are never replaced"):
        assert is_real(replaced({"image": MetaTensor(image + REAL_PART), "label": MetaTensor(label[None])})["image"])


def test_classes_are_looked_at_only_where_a_pair_is_replaced(make_bank, samples, tmp_path, monkeypatch):
    folder = make_bank(tmp_path / "classes", classes=[(1, 2)])
    replaced = RandSyntheticReplaced("image", "label", folder, prob=0.25, draw="class").set_random_state(0)
    replaced(samples[0])
    looks = []
    monkeypatch.setattr("medgen.transforms.synthetic_replace.label_values", lambda *_: looks.append(1) or (0, 1, 2))
    synthetic = sum(not is_real(replaced(samples[0])["image"]) for _ in range(60))
    assert 0 < len(looks) == synthetic < 60


@pytest.mark.parametrize("stored", ["1", "1.0"])
@pytest.mark.parametrize("value", ["1", 1, 1.0, torch.tensor(1), torch.tensor(1.0), np.int64(1), np.float32(1)])
def test_a_class_of_the_whole_image_draws_by_the_column_of_that_name(make_bank, samples, tmp_path, value, stored):
    folder = make_bank(tmp_path / "grades", columns=[{"grade": "0"}, {"grade": stored}], labelled=False)
    replaced = RandSyntheticReplaced("image", None, folder, prob=1.0, draw="class", class_key="grade")
    corners = {corner(image.array) for image, _ in list(replaced.inner.bank)[1::2]}
    sample = {"image": samples[0]["image"], "grade": value}
    assert {corner(replaced(sample)["image"]) for _ in range(30)} == corners


def test_a_class_that_the_bank_does_not_tell_is_refused(make_bank, samples, tmp_path):
    folder = make_bank(tmp_path / "grades", columns=[{"grade": "0"}, {"grade": ""}], labelled=False)
    with pytest.raises(BadInputError, match=r"expected a class of every scan in column 'grade'.*synthetic_00001"):
        RandSyntheticReplaced("image", None, folder, draw="class", class_key="grade")
    with pytest.raises(BadInputError, match="expected labels to draw by class"):
        RandSyntheticReplaced("image", None, folder, draw="class")
    with pytest.raises(BadInputError, match="expected draw='class' with it, got draw='any'"):
        RandSyntheticReplaced("image", None, folder, class_key="grade")
    replace = RandSyntheticReplace(
        make_bank(tmp_path / "all", columns=[{"grade": "0"}], labelled=False),
        prob=1.0,
        draw="class",
        class_column="grade",
        labelled=False,
    )
    with pytest.raises(BadInputError, match="grade: expected the class of the sample, got none"):
        replace(samples[0]["image"])


SPACING = Spacingd(KEYS, (0.7, 0.7, 0.7), mode=("bilinear", "nearest"))


def one_hot(sample):
    return {**sample, "label": torch.cat([sample["label"] == value for value in range(3)])}


def with_class(sample):
    return {**sample, "label": sample["label"] * 3}


def change(function):
    return lambda sample: {**sample, "image": function(sample["image"])}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            change(lambda image: torch.cat([image, image])),
            r"of 1 channel\(s\) and 3 further axes.*got 2",
        ),
        (change(lambda image: image[..., 0]), "3 further axes as in the bank, got 1 and 2"),
        (SPACING, r"expected voxels of 1 x 1 x 1 mm as in the bank, got 0.7 x 0.7 x 0.7 mm.*Spacingd"),
        (
            Orientationd(KEYS, "LPS", labels=None),
            "axes in the order RAS as in the bank, got LPS.*Orientationd",
        ),
        (Flipd(KEYS, 0), "expected axes in the order RAS as in the bank, got LAS"),
        (ScaleIntensityd("image"), r"expected intensities of channel 0 in a range like 10\d to 41\d of.*got 0"),
        (change(lambda image: (image - 250) * 5 + 250), "expected intensities of channel 0 in a range like"),
        (change(lambda image: (image - 250) / 5 + 250), "expected intensities of channel 0 in a range like"),
        (change(lambda image: image - 500), "expected intensities of channel 0 in a range like"),
        (change(lambda image: image.to(torch.int16)), None),
        (
            change(lambda image: image.to(torch.uint8)),
            r"images of a type that holds the 100 to 4\d\d of the bank, got torch.uint8, which ends at 0 and 255",
        ),
        (change(lambda image: image.bool()), r"of the bank, got torch.bool, which ends at 0 and 1"),
        (one_hot, r"expected labels of 1 channel\(s\) as in the bank, got 3"),
        (with_class, "expected label values 0, 1, 2 as in the bank, got 3, 6 too"),
        (change(lambda image: image.as_tensor()), "expected images that carry their affine, got Tensor"),
        (change(lambda image: image.numpy()), "expected images that carry their affine, got ndarray"),
    ],
)
def test_a_sample_in_another_state_than_the_bank_is_refused(bank, samples, state, message):
    replaced = RandSyntheticReplaced("image", "label", bank, prob=0.0)
    if message is None:
        replaced(state(samples[0]))
        return
    with pytest.raises(BadInputError, match=message) as raised:
        replaced(state(samples[0]))
    assert "preprocess=" in str(raised.value)


def test_the_same_transforms_in_the_bank_make_the_sample_fit(make_bank, real_files, tmp_path):
    prepare = [*LOAD, Orientationd(KEYS, "LPS", labels=None), SPACING, ScaleIntensityd("image")]
    folder = make_bank(tmp_path / "bank")
    train = Compose([*prepare, RandSyntheticReplaced("image", "label", folder, prob=1.0, preprocess=prepare)])
    out = train(real_files[0])
    assert out["image"].meta["synthetic"] is True
    assert (out["image"].min(), out["image"].max()) == (0, 1)
    np.testing.assert_allclose(out["image"].pixdim, 0.7)
    with pytest.raises(BadInputError, match="expected images of a floating type as in the bank, got whole numbers"):
        RandSyntheticReplace(train.transforms[-1].inner.bank)(out["image"].to(torch.int16), out["label"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (change(lambda image: torch.cat([image, image])), r"of 1 channel\(s\) and 3 further axes.*got 2"),
        (SPACING, "expected voxels of 1 x 1 x 1 mm as in the bank, got 0.7 x 0.7 x 0.7 mm"),
        (Flipd(KEYS, 0), "expected axes in the order RAS as in the bank, got LAS"),
        (change(lambda image: image.to(torch.uint8)), "images of a type that holds the 100 to"),
        (lambda sample: {**sample, "label": sample["label"].bool()}, "labels of a type that holds the 0 to 2 of"),
        (one_hot, r"expected labels of 1 channel\(s\) as in the bank, got 3"),
        (change(lambda image: image.as_tensor()), "expected images that carry their affine, got Tensor"),
        (lambda sample: {**sample, "label": "label.nii.gz"}, "label: expected an array.*got str"),
    ],
)
def test_later_samples_are_held_to_the_bank_too(bank, samples, state, message):
    replaced = RandSyntheticReplaced("image", "label", bank, prob=0.0)
    for sample in samples[:2]:
        replaced(sample)
    with pytest.raises(BadInputError, match=message):
        replaced(state(samples[2]))
    replaced(samples[3])


def test_a_later_sample_of_another_class_is_refused_where_it_would_be_replaced(bank, samples):
    replaced = RandSyntheticReplaced("image", "label", bank, prob=1.0)
    for sample in samples[:2]:
        replaced(sample)
    with pytest.raises(BadInputError, match="expected label values 0, 1, 2 as in the bank, got 3, 6 too"):
        replaced(with_class(samples[2]))
    replaced(samples[3])


def test_a_type_that_would_wrap_the_numbers_of_the_bank_is_refused_also_of_arrays(make_bank, tmp_path):
    def read(files):
        return {key: np.asarray(nib.load(files[key]).dataobj)[None] for key in KEYS}

    bank = SyntheticBank(make_bank(tmp_path / "bank"), preprocess=read)
    replace = RandSyntheticReplace(bank, prob=1.0).set_random_state(0)
    image, label = (part.array for part in bank[0])
    for dtype in (np.uint16, np.float32, np.float16):
        made, _ = replace(image.astype(dtype), label)
        assert made.dtype == dtype and any(np.array_equal(made, own.array) for own, _ in bank)
    for dtype in (np.uint8, np.int8):
        with pytest.raises(BadInputError, match="expected images of a type that holds the 100 to 4"):
            replace(image.clip(0, 100).astype(dtype), label)


def test_a_bank_of_other_classes_than_the_users_is_refused(make_bank, bank, tmp_path):
    names = {0: "background", 1: "head", 2: "tail"}
    RandSyntheticReplaced("image", "label", bank, class_names=names)
    RandSyntheticReplaced("image", "label", bank, class_names={**names, 2: "class_2"})
    for others in ({0: "background", 1: "head"}, {0: "background", 1: "tail", 2: "head"}, {**names, 3: "lesion"}):
        with pytest.raises(
            BadInputError, match=r"\(class_names\), got one of 0 \(background\), 1 \(head\), 2 \(tail\)"
        ):
            RandSyntheticReplaced("image", "label", bank, class_names=others)
    bare = make_bank(tmp_path / "bare", labelled=False)
    with pytest.raises(BadInputError, match="class_names: expected none for a bank without labels"):
        RandSyntheticReplaced("image", None, bare, class_names=names)


def test_an_empty_first_slice_is_not_what_the_bank_is_held_to(bank, samples):
    replaced = RandSyntheticReplaced("image", "label", bank, prob=0.0)
    replaced({"image": torch.zeros_like(samples[0]["image"]), "label": samples[0]["label"]})
    with pytest.raises(BadInputError, match="expected intensities"):
        replaced(ScaleIntensityd("image")(samples[0]))


def test_samples_without_a_key_fail_or_stay(bank, samples):
    image = {"image": samples[0]["image"]}
    with pytest.raises(KeyError, match="expected image, label, got no label"):
        RandSyntheticReplaced("image", "label", bank)(image)
    kept = RandSyntheticReplaced("image", "label", bank, prob=1.0, allow_missing_keys=True)(image)
    assert kept["image"] is image["image"]


def test_arguments_that_cannot_be_meant_are_refused(make_bank, bank, samples, tmp_path):
    with pytest.raises(BadInputError, match="expected the key of one image, got t1, t2"):
        RandSyntheticReplaced(("t1", "t2"), "label", bank)
    with pytest.raises(BadInputError, match=r"expected a bank made for the keys \('scan', 'label'\)"):
        RandSyntheticReplaced("scan", "label", bank)
    with pytest.raises(BadInputError, match=r"prob: expected a chance in \[0, 1\], got 1\.5"):
        RandSyntheticReplace(bank, prob=1.5)
    with pytest.raises(BadInputError, match="expected one of any, label, class, got 'both'"):
        RandSyntheticReplace(bank, draw="both")
    with pytest.raises(BadInputError, match="expected them where the bank is made"):
        RandSyntheticReplaced("image", "label", bank, preprocess=LOAD)
    with pytest.raises(BadInputError, match=r"expected a label map with each image.*got none"):
        RandSyntheticReplace(bank)(samples[0]["image"])


def test_a_subject_of_torchio_goes_through(make_bank, real_files, tmp_path):
    folder = make_bank(tmp_path / "bank")
    prepare = tio.Compose([tio.Resample(0.8), tio.RescaleIntensity((0, 1))])

    def load(files):
        return prepare(tio.Subject(image=tio.ScalarImage(files["image"]), label=tio.LabelMap(files["label"])))

    replaced = RandSyntheticReplaced("image", "label", folder, preprocess=load).set_random_state(0)
    train = tio.Compose([prepare, replaced, tio.RandomFlip(axes=0, flip_probability=1)])
    subjects = [
        tio.Subject(image=tio.ScalarImage(files["image"]), label=tio.LabelMap(files["label"]), age=3)
        for files in real_files
    ]
    dataset = tio.SubjectsDataset(subjects * 4, transform=train)
    bank = [image.array[:, ::-1] for image, _ in replaced.inner.bank]
    fresh = RandSyntheticReplaced("image", "label", replaced.inner.bank, prob=1.0)(prepare(subjects[0]))
    assert fresh.image is fresh["image"]
    synthetic = 0
    for subject in dataset:
        assert isinstance(subject, tio.Subject)
        assert isinstance(subject["label"], tio.LabelMap)
        np.testing.assert_allclose(subject.spacing, 0.8)
        synthetic += any(np.array_equal(subject["image"].data.numpy(), array) for array in bank)
    assert 0 < synthetic < len(dataset)
    batches = list(tio.SubjectsLoader(dataset, batch_size=4))
    assert batches[0]["image"]["data"].shape[0] == 4


@pytest.mark.parametrize(
    "transform",
    [
        lambda folder: RandSyntheticReplaced("image", "label", folder, prob=1.0, preprocess=load_subject),
        lambda folder: RandSyntheticReplaced("image", "label", folder, prob=0.0, preprocess=load_subject),
        lambda folder: RandCorruptiond("image", prob=1.0),
        lambda folder: RandCorruptiond("image", prob=0.0),
        lambda folder: Corruptiond("image", "low_dose", 4, "ct"),
        lambda folder: RandLowResolutiond("image", "high"),
        lambda folder: RandLowResolutiond("image", "high", prob=0.0),
        lambda folder: LowResolutiond("image", "high", 3),
        lambda folder: RandLowDosed("image", "high"),
        lambda folder: LowDosed("image", "high", 0.1),
    ],
)
def test_each_dictionary_transform_takes_a_subject(make_bank, real_files, tmp_path, transform):
    made = transform(make_bank(tmp_path / "bank"))
    subject = load_subject(real_files[0])
    before = {key: subject[key].data.clone() for key in KEYS}
    after = tio.Compose([made, tio.Flip(axes=0)])(subject)
    assert isinstance(after, tio.Subject) and isinstance(after["label"], tio.LabelMap)
    assert len(after.applied_transforms) == 1 and not subject.applied_transforms
    assert after.spatial_shape == subject.spatial_shape and after.image is after["image"]
    np.testing.assert_allclose(after["image"].affine, tio.Flip(axes=0)(subject)["image"].affine)
    changed = not torch.equal(after["image"].data.flip(1), before["image"].to(after["image"].data))
    assert changed == (getattr(made, "prob", 1.0) > 0)
    if "high" in after:
        assert torch.equal(after["high"].data.flip(1), before["image"])
    assert all(torch.equal(subject[key].data, before[key]) for key in KEYS)


def load_subject(files):
    return tio.Subject(image=tio.ScalarImage(files["image"]), label=tio.LabelMap(files["label"]))
