import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from medgen.data.case import Case, Dataset
from medgen.data.standard import read_scan
from medgen.evaluation import evaluate, utility
from medgen.evaluation.scans import Scans
from medgen.evaluation.split import Split
from medgen.evaluation.utility import measure_utility
from medgen.provenance import SampleRecord, sha256_array, sha256_file
from medgen.segmentation import fit_preparation, load_pairs, segmenter
from medgen.types import BadInputError

FLAT, DEEP = (32, 32), (32, 32, 32)
TRAIN, VAL = range(12), range(12, 18)
SPLIT = Split("as given", list(TRAIN), list(VAL))
Set = Callable[..., Scans]


def _draw(seed: int, shape: tuple[int, ...], shift: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball, its core brighter, on a textured ground; the label may lie beside it."""
    draw = np.random.default_rng(seed)
    center = np.array(shape) / 2 + draw.uniform(-4, 4, len(shape))
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(np.indices(shape), center, strict=True)))
    label = (distance < min(shape) / 4).astype(np.uint8) + (distance < min(shape) / 8)
    image = 60 + 60 * label + 10 * gaussian_filter(draw.standard_normal(shape), 0.8)
    return image.clip(0, 255).astype(np.uint8), np.roll(label, shift, axis=0)


def _write(path: Path, array: np.ndarray) -> Path:
    if array.ndim == 2:
        Image.fromarray(array).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), path.with_suffix(".nii.gz"))
    return path.with_suffix(".nii.gz")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Set:
    def build(seeds: range, shape: tuple[int, ...], *, shift: int = 0, labels: int = 1000, patient: int = 1) -> Scans:
        root = tmp_path_factory.mktemp("set")
        names = {0: "background", 1: "ball", 2: "core"}
        scans = Scans(Dataset(root, "plain", [], names, {0: "MR"}, "MR", len(shape)))
        for index, seed in enumerate(seeds):
            image, label = _draw(seed, shape, shift)
            files = [_write(root / f"{kind}{seed}", array) for kind, array in (("image", image), ("label", label))]
            group = f"p{index // patient}"
            case = Case(f"c{seed}", (files[0],), files[1] if index < labels else None, group=group)
            scans.cases.append(case)
            read = read_scan(case, scans.dataset)[1]
            scans.labels.append(None if read is None else sha256_array(read))
        scans.dataset.cases = list(scans.cases)
        return scans

    return build


@pytest.fixture(scope="module")
def real(make: Set) -> Scans:
    return make(range(18), FLAT, patient=2)


@pytest.fixture(scope="module")
def good(make: Set, real: Scans) -> tuple[Scans, dict]:
    synthetic = make(range(100, 110), FLAT)
    return synthetic, measure_utility(real, synthetic, SPLIT, steps=80)


def test_good_pairs_serve_as_well_as_real_ones(good: tuple[Scans, dict]) -> None:
    found = good[1]
    assert found["classes"] == ["ball", "core"]
    for values in (*found["dice"].values(), found["adherence"]):
        assert min(values) > 0.8
    for name, values in {**found["dice"], "adherence": found["adherence"]}.items():
        for value, (low, high) in zip(values, found["intervals"][name], strict=True):
            assert low <= value <= high
            assert high > low
    expected = {"real": 10, "synthetic": 10, "real_and_synthetic": 20, "validation": 6, "validation_patients": 3}
    assert found["n"] == {**expected, "adherence": 10}
    gains = found["differences"]["synthetic"]
    assert gains["values"] == pytest.approx([b - a for a, b in zip(*list(found["dice"].values())[:2], strict=True)])
    assert found["notes"] == []


def test_labels_beside_their_ball_show_in_adherence_and_in_what_is_learned(
    make: Set, real: Scans, good: tuple[Scans, dict]
) -> None:
    wrong = measure_utility(real, make(range(100, 110), FLAT, shift=8), SPLIT, steps=80)
    assert wrong["dice"]["real"] == good[1]["dice"]["real"]
    assert max(wrong["adherence"]) < 0.6 < min(good[1]["adherence"])
    assert max(wrong["dice"]["synthetic"]) < 0.6 < min(good[1]["dice"]["synthetic"])
    assert wrong["differences"]["synthetic"]["intervals"][0][1] < 0


def test_equal_seeds_give_equal_numbers_and_the_random_state_stays(real: Scans, good: tuple[Scans, dict]) -> None:
    before = torch.random.get_rng_state()
    first, again = (measure_utility(real, good[0], SPLIT, steps=3, seed=4) for _ in range(2))
    other = measure_utility(real, good[0], SPLIT, steps=3, seed=5)
    assert first == again
    assert first["dice"] != other["dice"]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_all_scans_are_learned_from_where_counts_may_differ(real: Scans, good: tuple[Scans, dict]) -> None:
    found = measure_utility(real, good[0], SPLIT, steps=1, equal_counts=False)
    assert [found["n"][name] for name in found["dice"]] == [12, 10, 22]


def test_volumes(make: Set) -> None:
    real, synthetic = make(range(18), DEEP), make(range(100, 106), DEEP)
    found = measure_utility(real, synthetic, SPLIT, steps=1)
    assert found["recipe"]["patch"] == [32, 32, 32]
    assert all(0 <= value <= 1 for values in (*found["dice"].values(), found["adherence"]) for value in values)
    preparation = fit_preparation([real.cases[row] for row in SPLIT.train], real.dataset, 0)
    learned, tested = (
        load_pairs([real.cases[row] for row in rows], real.dataset, preparation, "")
        for rows in (SPLIT.train, SPLIT.val)
    )
    network = segmenter.train_segmenter(
        learned, segmenter.Recipe(60, 2), preparation.patch, 3, 0, torch.device("cpu"), "real"
    )
    assert segmenter.score_segmenter(network, tested, preparation.patch, 2).mean(dim=0)[0] > 0.8


@pytest.mark.parametrize(
    ("shape", "patch"), [((200, 100), (128, 128)), ((20, 30), (32, 32)), ((150, 60, 20), (48, 32, 32))]
)
def test_large_scans_are_shrunk(make: Set, shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    scans = make(range(2), shape)
    preparation = fit_preparation(scans.cases, scans.dataset, 0)
    image, label = preparation(scans.cases[0], scans.dataset)
    assert preparation.patch == patch
    assert tuple(label.shape) == (patch if len(shape) == 2 else (96, 38, 13))
    assert image.shape == (1, *label.shape)
    given = read_scan(scans.cases[0], scans.dataset)[1]
    nearest = [((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(label.shape, shape, strict=True)]
    assert given is not None
    assert (label.numpy() == given.numpy()[np.ix_(*nearest)]).mean() > 0.999
    assert image.nbytes + label.nbytes <= 1.2 * preparation.bytes_per_scan


def test_scans_without_label_are_counted_and_too_few_are_refused(make: Set, real: Scans) -> None:
    found = measure_utility(real, make(range(100, 110), FLAT, labels=6), SPLIT, steps=1)
    assert found["without_label"] == {"training": 0, "validation": 0, "synthetic": 4}
    assert found["n"]["synthetic"] == found["n"]["real"] == 6
    with pytest.raises(BadInputError, match=r"at least 5 labelled synthetic scans.* got 4"):
        measure_utility(real, make(range(100, 110), FLAT, labels=4), SPLIT, steps=1)
    for name, split in (("training", Split("", [0, 1, 2, 3], list(VAL))), ("validation", Split("", list(TRAIN), [13]))):
        with pytest.raises(BadInputError, match=rf"at least 5 labelled {name} scans, got \d"):
            measure_utility(real, real, split, steps=1)


def test_label_maps_of_validation_scans_are_not_learned_from(make: Set, real: Scans) -> None:
    found = measure_utility(real, make(range(4, 14), FLAT), SPLIT, steps=1)
    assert (found["n"]["synthetic"], found["n"]["adherence"]) == (8, 10)
    assert found["notes"][0].startswith("2 synthetic scans were made from a validation scan or its label map")
    with pytest.raises(BadInputError, match=r"neither validation scans nor their label maps, got 2"):
        measure_utility(real, make(range(10, 18), FLAT), SPLIT, steps=1)


def test_edited_validation_scans_are_not_learned_from(make: Set, real: Scans) -> None:
    synthetic = make(range(100, 110), FLAT)
    origin = {"files": [{"file": "x", "sha256": sha256_file(real.cases[VAL[0]].images[0])}], "strength": 0.5}
    records = [
        {item.name: None for item in dataclasses.fields(SampleRecord)} | {"case": case.case, "conditions": conditions}
        for case, conditions in zip(synthetic.cases[:2], [{"source": origin}, {}], strict=True)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (synthetic.dataset.root / "manifest.jsonl").write_text(lines)
    found = measure_utility(real, synthetic, SPLIT, steps=1)
    assert found["n"]["synthetic"] == 9
    assert found["notes"] == [
        "1 synthetic scans were made from a validation scan or its label map; nothing learned from them."
    ]


def test_sets_that_cannot_be_compared_are_refused(make: Set, real: Scans) -> None:
    everything = list(range(18))
    with pytest.raises(BadInputError, match=r"expected a split of the real scans"):
        measure_utility(real, real, Split("none", everything, everything), steps=1)
    other = make(range(100, 106), FLAT)
    other.dataset.class_names = {0: "background", 1: "ball"}
    with pytest.raises(BadInputError, match=r"expected 2 classes .* got 1"):
        measure_utility(real, other, SPLIT, steps=1)


def test_classes_that_no_scan_shows_have_no_score() -> None:
    nan = float("nan")
    values, ends = utility._summarize(torch.tensor([[0.5, nan, 0.2], [0.7, nan, nan]]).double(), ["a", "b"], 0)
    assert values == pytest.approx([0.6, None, 0.2])
    assert ends == [pytest.approx([0.5, 0.7]), None, None]


def test_a_training_that_diverges_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(pair: segmenter.Pair, *_: object) -> segmenter.Pair:
        return torch.full((1, *FLAT), float("nan")), pair[1][None].long()

    monkeypatch.setattr(segmenter, "augment", broken)
    pairs = [(torch.rand(1, *FLAT).half(), torch.ones(FLAT, dtype=torch.uint8))]
    with pytest.raises(segmenter.DivergedError, match=r"expected a finite loss, got nan.*another seed"):
        segmenter.train_segmenter(pairs, segmenter.Recipe(1, 2), FLAT, 3, 0, torch.device("cpu"), "real")


def _folder(root: Path, seeds: range, split: str) -> Path:
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    lines = ["id,image,label,group,split"]
    for seed in seeds:
        for name, array in zip(("images", "labels"), _draw(seed, FLAT, 0), strict=True):
            _write(root / name / f"c{seed}", array)
        side = "" if not split else split if seed % 2 else "val"
        lines.append(f"c{seed},images/c{seed}.png,labels/c{seed}.png,p{seed},{side}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.parametrize("split", ["train", ""])
def test_the_report_has_utility_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    monkeypatch.setattr(utility, "STEPS", 1)
    real, synthetic = _folder(tmp_path / "real", range(12), split), _folder(tmp_path / "made", range(50, 56), "train")
    settings = {"image_size": 32, "num_pairs": 2, "device": "cpu"}
    report = evaluate(real, synthetic, tmp_path / "report", utility=True, **settings)
    reasons = [text for text in report["warnings"] if text.startswith("Utility: expected a split of the real scans")]
    page = (tmp_path / "report" / "index.html").read_text()
    if split:
        assert report["utility"]["n"]["real"] == 6
        assert not reasons and report["utility_missing"] is None
        assert "trained on both" in page
    else:
        assert report["utility"] is None
        assert len(reasons) == 1 and report["utility_missing"] == "refused"
        assert "could not be measured, and the warnings say why" in page


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (segmenter.DivergedError("no loss"), "diverged", "says nothing about the synthetic scans"),
        (RuntimeError("out of memory"), "failed", "the use for training failed, and the warnings say why"),
    ],
)
def test_a_segmenter_that_fails_does_not_cost_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(utility, "train_segmenter", fail)
    real, synthetic = _folder(tmp_path / "real", range(12), "train"), _folder(tmp_path / "made", range(50, 56), "train")
    settings = {"image_size": 32, "num_pairs": 2, "device": "cpu"}
    report = evaluate(real, synthetic, tmp_path / "report", utility=True, **settings)
    assert report["utility"] is None and report["utility_missing"] == kind
    assert f"Utility: {error}" in report["warnings"]
    assert words in (tmp_path / "report" / "index.html").read_text()
