"""How real synthetic scans look, and how diverse they are, each beside the same figure for real scans."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from medgen.data.case import RGB, VAL_SPLITS, Case, Dataset
from medgen.data.dataset import load_case, load_cases, read_dataset, split_cases
from medgen.data.geometry import place, to_model
from medgen.data.intensity import Normalization
from medgen.metrics import EfficientNetLite0Features, frechet_distance_from_features, ms_ssim, num_scales
from medgen.precision import resolve_device
from medgen.provenance import hide_folder, runtime_info, sha256_array, write_text
from medgen.report import draw_report
from medgen.seeding import stream
from medgen.types import BadInputError, Sample

_SHOWN = 8  # scans per row of the picture
_HALVES = "random halves, patient by patient"
_FEW = 20  # scans below which even the floor says little


@dataclass(frozen=True, eq=False)
class _Scans:
    """The scans of one set that could be read, without their voxels: features ``(N, V, D)`` and what pairing needs."""

    dataset: Dataset
    cases: list[Case]
    features: torch.Tensor
    shapes: list[tuple[int, ...]]
    labels: list[str | None]

    def where(self, names: set[str]) -> list[int]:
        return [index for index, case in enumerate(self.cases) if case.case in names]


def evaluate(
    real: Path,
    synthetic: Path,
    output: Path,
    *,
    extractor: Literal["efficientnet-lite0"] = "efficientnet-lite0",
    image_size: int | None = None,
    slices_per_plane: int = 8,
    num_subsets: int = 10,
    num_pairs: int = 200,
    device: str = "auto",
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compare a folder of synthetic scans with a folder of real ones; write ``report.json`` and ``report.png``.

    Fréchet distances are taken between the synthetic, the real validation and the real training scans, always with the
    same number of scans on both sides; training to validation is the floor that a perfect generator would reach.
    Where the folder names no validation split, the scans that ``medgen train`` with this seed holds out stand for it.
    If those are fewer than 20, the real scans are instead halved at random, patient by patient, and the report warns:
    a generator that was trained on this folder has learned from "validation" scans too, and looks better than it is.
    Diversity is the mean MS-SSIM of random pairs (higher is less diverse). Intensities of each scan are normalized by
    its percentiles first.

    Args:
        real: Folder of real scans, in any layout that :func:`medgen.data.dataset.read_dataset` knows.
        synthetic: Folder of synthetic scans, such as the output of ``medgen synthesize``.
        output: Folder for the report.
        extractor: Network that gives the features.
        image_size: Edge in pixels of the square that each picture is stretched to; larger is slower. None: 224 in 2D,
            128 for slices of volumes. Distances compare only at one size.
        slices_per_plane: Slices of each of the three planes that stand for a volume.
        num_subsets: Random subsets of equal size that the median and range of a distance are taken over.
        num_pairs: Random pairs of scans for each MS-SSIM.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        seed: Chooses subsets, pairs and the scans of the picture. Without a validation split it is to be the seed of
            the training, as it also finds the scans that were held out there.
        skip_bad: List scans that cannot be used in the report and go on.
        overwrite: Replace a report that the output folder already holds.

    Returns:
        What ``report.json`` holds.

    Raises:
        BadInputError: If a scan cannot be used, the sets differ in dimension or channels, a set has fewer than two
            scans, or the output folder cannot be made or already holds a report.
    """
    output = Path(output)
    _check_output(output, overwrite=overwrite)
    if extractor != EfficientNetLite0Features.name:
        raise BadInputError(f"extractor: expected efficientnet-lite0, got {extractor!r}.")
    counts = {"slices_per_plane": slices_per_plane, "num_subsets": num_subsets, "num_pairs": num_pairs}
    for name, value in (counts if image_size is None else {**counts, "image_size": image_size}).items():
        if value < 1:
            raise BadInputError(f"{name}: expected at least 1, got {value}.")
    target = resolve_device(device)
    real_set, synthetic_set = read_dataset(real), read_dataset(synthetic)
    _require_comparable(real_set, synthetic_set)
    _make_output(output)
    channels = len(real_set.channel_names)
    network = EfficientNetLite0Features(
        spatial_dims=3 if real_set.spatial_dims == 3 else 2,
        in_channels=channels,
        rgb=real_set.channel_names == RGB,
        image_size=image_size,
        slices_per_plane=slices_per_plane,
    ).to(target)
    real_scans = _extract(real_set, network, target, "real", skip_bad=skip_bad)
    synthetic_scans = _extract(synthetic_set, network, target, "synthetic", skip_bad=skip_bad)
    split, folds = _folds(real_scans, num_subsets, seed)
    frechet = _frechet(real_scans, synthetic_scans, folds, network.views, seed)
    diversity = _diversity(real_scans, synthetic_scans, num_pairs, seed)
    runtime = runtime_info(target)
    runtime["versions"]["torchmetrics"] = metadata.version("torchmetrics")
    report: dict[str, Any] = {
        "format": "medgen-report/1",
        "real": {
            "folder": Path(real).resolve().name,
            "scans": len(real_scans.cases),
            "split": split,
            "train": len(folds[0][0]),
            "val": len(folds[0][1]),
        },
        "synthetic": {
            "folder": Path(synthetic).resolve().name,
            "scans": len(synthetic_scans.cases),
            "marked_synthetic": synthetic_set.synthetic,
        },
        "spatial_dims": real_set.spatial_dims,
        "channels": channels,
        "extractor": {
            "name": network.name,
            "weights_sha256": network.weights_hash,
            "num_features": network.num_features,
            "views": list(network.views),
            "preprocessing": {
                "scan": "volumes of known orientation in RAS order; percentiles 0.5 and 99.5 of each scan to 0 and 1, "
                + ("colors together" if network.rgb else "channel by channel"),
                **network.preprocessing,
            },
        },
        "frechet_distance": frechet,
        "ms_ssim": diversity,
        "warnings": _warnings(frechet, split, synthetic_set, network.num_features),
        "rejected": [
            {"set": name, "case": item.case, "reason": hide_folder(item.reason, dataset.root)}
            for name, dataset in (("real", real_set), ("synthetic", synthetic_set))
            for item in dataset.rejected
        ],
        "seed": seed,
        "runtime": runtime,
    }
    val = folds[0][1]
    shown = [
        [_for_display(scans.cases[index], scans.dataset) for index in _draw(rows, _SHOWN, seed)]
        for scans, rows in ((real_scans, val), (synthetic_scans, range(len(synthetic_scans.cases))))
    ]
    draw_report(report, shown[0], shown[1], output / "report.png")
    # Last, because a folder with report.json is a finished report.
    write_text(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return report


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: expected a folder for the report, got a file. Choose another output folder.")
    for name in ("report.json", "report.png"):
        if (output / name).exists() and not overwrite:
            raise BadInputError(
                f"{output}: expected a folder without a report, got one with {name}. "
                "Choose another output folder, or pass --overwrite."
            )


def _make_output(output: Path) -> None:
    """Make the folder before the work, which takes minutes, and not after it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(
            f"{output}: expected a folder that can be made, got: {error.strerror}. Choose another output folder."
        ) from error


def _require_comparable(real: Dataset, synthetic: Dataset) -> None:
    if real.spatial_dims != synthetic.spatial_dims:
        raise BadInputError(
            f"{synthetic.root}: expected {real.spatial_dims}D scans as in {real.root}, got {synthetic.spatial_dims}D. "
            "Compare sets of one dimension."
        )
    if len(real.channel_names) != len(synthetic.channel_names):
        raise BadInputError(
            f"{synthetic.root}: expected {len(real.channel_names)} channel(s) as in {real.root}, "
            f"got {len(synthetic.channel_names)}. Compare sets of the same channels."
        )


def _prepare(case: Case, sample: Sample, dataset: Dataset) -> torch.Tensor:
    """Scan as the metrics and the picture see it: ``(C, *spatial)`` in [0, 1], volumes in RAS order."""
    if sample.image is None:
        raise BadInputError(f"{dataset.root}: expected an image for case {sample.case}, got none.")
    image = to_model(sample.image, place(sample.grid), mode="linear", padding="constant")
    intensity = Normalization(per_channel=dataset.channel_names != RGB).fit(image, source=case.images[0])
    return (intensity.forward(image) + 1) / 2


def _for_display(case: Case, dataset: Dataset) -> Sample:
    sample = load_case(case, dataset)
    return replace(sample, grid=place(sample.grid).grid, image=_prepare(case, sample, dataset), label=None)


def _extract(
    dataset: Dataset, network: EfficientNetLite0Features, device: torch.device, name: str, *, skip_bad: bool
) -> _Scans:
    """One pass over a folder; memory holds one scan at a time, and the features of all."""
    by_name = {case.case: case for case in dataset.cases}
    cases, features, shapes, labels = [], [], [], []
    prepared: dict[str, torch.Tensor] = {}
    samples = load_cases(
        dataset,
        dataset.cases,
        skip_bad=skip_bad,
        check=lambda case, sample: prepared.update({case.case: _prepare(case, sample, dataset)}),
    )
    for sample in tqdm(samples, desc=f"features of {name} scans", total=len(dataset.cases), unit="scan"):
        image = prepared.pop(sample.case)
        features.append(network(image[None].to(device))[0].cpu())
        cases.append(by_name[sample.case])
        shapes.append(tuple(image.shape[1:]))
        labels.append(None if sample.label is None else sha256_array(sample.label))
    if len(cases) < 2:
        raise BadInputError(f"{dataset.root}: expected at least 2 usable {name} scans, got {len(cases)}. Add scans.")
    return _Scans(dataset, cases, torch.stack(features), shapes, labels)


def _folds(real: _Scans, num_subsets: int, seed: int) -> tuple[str, list[tuple[list[int], list[int]]]]:
    """Rows ``(train, val)`` for each subset: the given split, else the one of training if it holds out enough scans,
    else a new random half of the patients each time.
    """
    if any(case.split in VAL_SPLITS for case in real.dataset.cases):
        train, val = split_cases(real.dataset)
        fold = (real.where({case.case for case in train}), real.where({case.case for case in val}))
        name, folds = "train and val as given", [fold] * num_subsets
    elif (held_out := _training_fold(real, seed)) is not None:
        name, folds = f"val as medgen train holds it out with seed {seed}", [held_out] * num_subsets
    else:
        name, folds = _HALVES, []
        for subset in range(num_subsets):
            groups: dict[str, list[int]] = {}
            for index, case in enumerate(real.cases):
                groups.setdefault(case.group or case.case, []).append(index)
            halves: tuple[list[int], list[int]] = ([], [])
            keys = list(groups)
            for position in torch.randperm(len(keys), generator=stream(seed, "halves", subset)).tolist():
                min(halves, key=len).extend(groups[keys[position]])
            folds.append(halves)
    smallest = min(min(len(train), len(val)) for train, val in folds)
    if smallest < 2:
        raise BadInputError(
            f"{real.dataset.root}: expected at least 2 scans on each side of the real split, got {smallest}. "
            "Add scans or change the split."
        )
    return name, folds


def _training_fold(real: _Scans, seed: int) -> tuple[list[int], list[int]] | None:
    """Rows ``(train, val)`` as training with this seed splits a folder; None where they are too few to compare."""
    labelled = [case for case in real.dataset.cases if case.label is not None]
    try:
        train, val = split_cases(replace(real.dataset, cases=labelled), seed=seed)
    except BadInputError:  # a part would be empty, so nothing was trained on this folder
        return None
    fold = (real.where({case.case for case in train}), real.where({case.case for case in val}))
    return fold if min(map(len, fold)) >= _FEW else None


def _draw(rows: Sequence[int], count: int, *key: int | str) -> list[int]:
    """`count` of the rows, without replacement, in an order of their own."""
    return [rows[index] for index in torch.randperm(len(rows), generator=stream(*key, "draw")).tolist()[:count]]


def _frechet(
    real: _Scans, synthetic: _Scans, folds: list[tuple[list[int], list[int]]], views: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """The three distances at equal n, over the subsets."""
    everything = list(range(len(synthetic.cases)))
    n = min([len(everything), *(len(side) for fold in folds for side in fold)])
    names = ("floor", "synthetic_to_val", "synthetic_to_train")
    values: dict[str, list[list[float]]] = {name: [] for name in names}
    for subset, (train_rows, val_rows) in enumerate(tqdm(folds, desc="Fréchet distances", unit="subset")):
        train = real.features[_draw(train_rows, n, seed, subset, "train")]
        val = real.features[_draw(val_rows, n, seed, subset, "val")]
        made = synthetic.features[_draw(everything, n, seed, subset, "synthetic")]
        for name, (x, y) in zip(names, ((train, val), (made, val), (made, train)), strict=True):
            values[name].append(
                [frechet_distance_from_features(x[:, view], y[:, view]).item() for view in range(len(views))]
            )
    result: dict[str, Any] = {"n": n, "d": real.features.shape[-1], "subsets": len(folds)}
    for name in names:
        means = [statistics.fmean(by_view) for by_view in values[name]]
        result[name] = {
            "median": statistics.median(means),
            "range": [min(means), max(means)],
            "views": {
                view: statistics.median(by_view[index] for by_view in values[name]) for index, view in enumerate(views)
            },
        }
    floor = result["floor"]["median"]
    result["ratio_to_floor"] = result["synthetic_to_val"]["median"] / floor if floor > 0 else None
    return result


def _diversity(real: _Scans, synthetic: _Scans, num_pairs: int, seed: int) -> dict[str, Any]:
    """Mean MS-SSIM of random pairs: among real scans, among synthetic ones, and among those of one label map."""
    shape = [min(axis) for axis in zip(*real.shapes, *synthetic.shapes, strict=True)]
    scales = num_scales(shape)
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(synthetic.labels):
        if label is not None:
            groups.setdefault(label, []).append(index)
    shared = [rows for rows in groups.values() if len(rows) > 1]
    result: dict[str, Any] = {
        "scales": scales,
        "method": "central box that both scans of a pair have, intensities in [0, 1]; higher is less diverse",
        "real": _similarity(real, [list(range(len(real.cases)))], scales, num_pairs, seed, "real"),
        "synthetic": _similarity(synthetic, [list(range(len(synthetic.cases)))], scales, num_pairs, seed, "synthetic"),
        "synthetic_one_label": None,
    }
    if shared:
        one_label = _similarity(synthetic, shared, scales, num_pairs, seed, "one label")
        result["synthetic_one_label"] = {**one_label, "labels": len(shared)}
    for name in ("synthetic", "synthetic_one_label"):
        if result[name]:
            result[name]["minus_real"] = result[name]["mean"] - result["real"]["mean"]
    return result


def _similarity(
    scans: _Scans, groups: list[list[int]], scales: int, num_pairs: int, seed: int, name: str
) -> dict[str, Any]:
    """MS-SSIM of random pairs, both scans from one group, the groups in turn."""
    pairs: dict[tuple[int, int], None] = {}
    most = sum(len(rows) * (len(rows) - 1) // 2 for rows in groups)
    turn = 0
    while len(pairs) < min(num_pairs, most):
        first, second = sorted(_draw(groups[turn % len(groups)], 2, seed, name, turn))
        pairs[first, second] = None
        turn += 1
    values = []
    for pair in tqdm(pairs, desc=f"MS-SSIM, {name}", unit="pair"):
        cases = [scans.cases[index] for index in pair]
        x, y = (_prepare(case, load_case(case, scans.dataset), scans.dataset) for case in cases)
        box = [min(sizes) for sizes in zip(x.shape[1:], y.shape[1:], strict=True)]
        values.append(ms_ssim(_center(x, box)[None], _center(y, box)[None], scales=scales).item())
    return {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "pairs": len(values)}


def _center(image: torch.Tensor, box: list[int]) -> torch.Tensor:
    for axis, size in enumerate(box, start=1):
        image = image.narrow(axis, (image.shape[axis] - size) // 2, size)
    return image


def _warnings(frechet: dict[str, Any], split: str, synthetic: Dataset, num_features: int) -> list[str]:
    n = frechet["n"]
    found = []
    if n < num_features:
        found.append(
            f"n = {n} scans a side is less than d = {num_features} features: the distances are mostly bias. "
            "Read them beside the floor of the same n, and never beside values of another n."
        )
    if n < _FEW:
        found.append(f"Only {n} scans a side: differences of less than a few times the range are chance.")
    if split == _HALVES:
        found.append(
            "The real folder names no validation split and is too small to set one aside: its halves are random. A "
            "generator that was trained on this folder has learned from scans of both, and looks better than it is. "
            "List scans that it has not seen in val.txt, and the others in train.txt."
        )
    if not synthetic.synthetic:
        name = synthetic.root.resolve().name
        found.append(f"{name} does not mark itself as synthetic. Check that the folders are not swapped.")
    return found
