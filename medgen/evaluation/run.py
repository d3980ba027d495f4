"""A folder of synthetic scans against a folder of real ones: every score, with what makes it readable, on one page."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from PIL import Image

from medgen.data.case import RGB, Dataset
from medgen.data.dataset import load_case, read_dataset
from medgen.evaluation import copies
from medgen.evaluation.cache import FeatureCache
from medgen.evaluation.caveats import caveats, differing_names, lift_shared, shared_names
from medgen.evaluation.diversity import diversity
from medgen.evaluation.radiomic import radiomic_distances, radiomic_shift
from medgen.evaluation.scans import Recipe, Region, Scans, measure
from medgen.evaluation.split import Split, split_real
from medgen.evaluation.utility import measure_utility
from medgen.metrics import build_extractor, published_name, stamp
from medgen.metrics.distances import NAMES
from medgen.metrics.protocols import PROTOCOLS
from medgen.metrics.statistics import score_features
from medgen.pictures import contact_sheet
from medgen.precision import resolve_device
from medgen.provenance import hide_folder, runtime_info, write_text
from medgen.report.page import write_report
from medgen.report.rows import all_warnings
from medgen.report.verdict import verdict
from medgen.seeding import draw
from medgen.segmentation import DivergedError
from medgen.threads import cores, single_threaded
from medgen.types import BadInputError

_SHOWN = 8  # scans on each contact sheet
_NEAREST = 5  # neighbors of precision, recall, density and coverage
_FILES = ("report.json", "index.html", "report.tex")
Protocol = Literal["frd-robust", "frd-v1", "frd-v0"]


def evaluate(
    real: Path,
    synthetic: Path,
    output: Path,
    *,
    extractor: Literal["efficientnet-lite0", "inception", "radimagenet", "medicalnet"] = "efficientnet-lite0",
    weights: Path | None = None,
    image_size: int | None = None,
    slices_per_plane: int = 8,
    protocols: list[Protocol] | None = None,
    region: Region = "whole",
    num_pairs: int = 200,
    utility: bool = False,
    cache: Path | None = None,
    workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Compare a folder of synthetic scans with a folder of real ones; write a page, a JSON file and a LaTeX table.

    Distances are taken between the synthetic scans and the real validation scans, and from those to the real training
    scans: the floor that a perfect generator would reach. Where the folder names no validation split, the scans that
    ``medgen train`` holds out stand for it. If those are fewer than 20, all real scans are taken
    together and floors come from random halves, patient by patient; the report then warns that a generator which was
    trained on this folder has seen them all, and looks better than it is. Copies are searched among the training scans,
    and apart from these among all others.

    What was computed of a scan is kept, so that a run that was stopped goes on from there. What is kept holds small
    pictures of the scans, and the page shows some real ones: publish neither where the real scans may not be.

    Args:
        real: Folder of real scans, in any layout that medgen reads.
        synthetic: Folder of synthetic scans, such as the output of ``medgen synthesize``.
        output: Folder for index.html, report.json and report.tex.
        extractor: Network that gives the features. All but the first need `weights`; with inception on 2D images the
            Fréchet distance is the FID.
        weights: Local weight file of the extractor; nothing is downloaded.
        image_size: Edge in pixels of the square that efficientnet-lite0 sees; larger is slower. By default 224 in 2D,
            128 for slices of volumes. Distances compare only at one size.
        slices_per_plane: Slices of each of the three planes that stand for a volume.
        protocols: Protocols of the Fréchet radiomic distance; by default frd-robust. Add frd-v1 or frd-v0 to compare
            with published values.
        region: Take radiomic features of the ``whole`` scan, or of the voxels of its ``label``.
        num_pairs: Random pairs of scans for each MS-SSIM.
        utility: Also train three small segmenters, on real, on synthetic and on both scans, and test them on the real
            validation scans; the first also tells whether synthetic scans show what their labels say. It takes minutes,
            a split of the real scans, and 5 labelled scans of each set; without these the report warns.
        cache: Folder that keeps what was computed of each scan, to be shared by several reports; it holds small
            pictures of the scans. By default it lies in the output folder.
        workers: Scans that are read and measured side by side; by default one per core.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        seed: Chooses subsets, pairs and the scans of the pictures.
        skip_bad: List scans that cannot be used in the report and go on.
        overwrite: Replace a report that the output folder already holds.

    Returns:
        What ``report.json`` holds.

    Raises:
        BadInputError: If a scan cannot be used, the sets differ in dimension or channels, a set has fewer than two
            scans, weights are missing, or the output folder cannot be made or already holds a report.
    """
    started = time.monotonic()
    output = Path(output)
    _check_output(output, overwrite=overwrite)
    chosen = list(dict.fromkeys(protocols or ["frd-robust"]))
    for name in chosen:
        if name not in PROTOCOLS:
            raise BadInputError(f"protocols: expected some of {', '.join(PROTOCOLS)}, got {name!r}.")
    counts = {"slices_per_plane": slices_per_plane, "num_pairs": num_pairs}
    for name, value in {**counts, "workers": workers, "image_size": image_size}.items():
        if value is not None and value < 1:
            raise BadInputError(f"{name}: expected at least 1, got {value}.")
    target = resolve_device(device)
    real_set, synthetic_set = read_dataset(real), read_dataset(synthetic)
    _require_comparable(real_set, synthetic_set)
    if image_size is not None and extractor != "efficientnet-lite0":
        raise BadInputError(f"image_size: expected none with {extractor}, which has one size only, got {image_size}.")
    network = _network(extractor, weights, real_set, slices_per_plane, image_size).to(target)
    recipe = Recipe(
        network=network,
        stamp=stamp(network),  # type: ignore[arg-type]
        device=target,
        protocols=tuple(chosen),
        region=region,
        cache=FeatureCache(Path(cache) if cache else output / "cache"),
        workers=workers or cores(),
    )
    names, naming = shared_names(real_set, synthetic_set), differing_names(real_set, synthetic_set)
    for dataset in (real_set, synthetic_set):
        dataset.class_names = {value: names[value] for value in dataset.class_names}
    with _made(output):
        scans = {
            "real": measure(real_set, recipe, "real", skip_bad=skip_bad),
            "synthetic": measure(synthetic_set, recipe, "synthetic", skip_bad=skip_bad),
        }
        split = split_real(scans["real"])
        with single_threaded():
            report, pictures = _report(scans["real"], scans["synthetic"], split, recipe, num_pairs, seed)
        report["warnings"] += naming
        if utility:
            _add_utility(report, scans["real"], scans["synthetic"], split, target, seed)
    report["extractor"] = {**recipe.stamp, "published_name": published_name("frechet", network)}  # type: ignore[arg-type]
    report["rejected"] = [
        {"set": name, "case": item.case, "reason": hide_folder(item.reason, dataset.root)}
        for name, dataset in (("real", real_set), ("synthetic", synthetic_set))
        for item in dataset.rejected
    ]
    report["runtime"] = runtime_info(target)
    report["runtime"]["versions"]["torchmetrics"] = metadata.version("torchmetrics")
    report["seconds"] = round(time.monotonic() - started, 1)
    write_report(report, pictures, output)
    # Last, because a folder with report.json is a finished report.
    write_text(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    print(verdict(report).headline)
    print(f"{len(all_warnings(report))} warning(s), {len(report['rejected'])} rejected scan(s)")
    print(f"report: {output / 'index.html'}")
    print(f"before you publish: the page shows real scans, and {recipe.cache.folder} holds small pictures of them")
    return report


def _add_utility(
    report: dict[str, Any], real: Scans, synthetic: Scans, split: Split, device: torch.device, seed: int
) -> None:
    """What the scans are worth for training, or why that is not known; what was measured before is not lost to it."""
    try:
        report["utility"] = measure_utility(real, synthetic, split, device=device, seed=seed)
        report["warnings"] += report["utility"]["notes"]
    except BadInputError as error:
        report["utility_missing"] = "refused"
        report["warnings"].append(str(error))
    except RuntimeError as error:
        report["utility_missing"] = "diverged" if isinstance(error, DivergedError) else "failed"
        report["warnings"].append(f"Utility: {error}")


def _report(
    real: Scans, synthetic: Scans, split: Split, recipe: Recipe, num_pairs: int, seed: int
) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """All that is computed of the measured scans, and the pictures of the page."""
    groups = real.groups
    reference: dict[str, Any] = {}
    if split.apart:
        reference = {
            "real_reference": real.features[split.train],
            "reference_groups": [groups[row] for row in split.train],
        }
    smallest = min(len(split.val), len(split.train), len(synthetic.cases))
    few = smallest <= _NEAREST
    scores = score_features(
        real.features[split.val],
        synthetic.features,
        distances=[name for name in NAMES if name != "prdc" or not few],
        nearest_k=_NEAREST,
        real_groups=[groups[row] for row in split.val],
        synthetic_groups=synthetic.groups if any(case.group for case in synthetic.cases) else None,
        seed=seed,
        **reference,
    )
    scores_as_json = {name: score.to_json() for name, score in scores.items()}
    warnings = [*lift_shared(scores_as_json), *caveats(real, synthetic, split)]
    if few:
        warnings.append(
            f"Precision, recall, density and coverage need more than {_NEAREST} scans a side, got {smallest}."
        )
    if (patients := len({groups[row] for row in split.train})) >= 2:
        memorization, search = copies.find(real, synthetic, split, seed)
        gallery = copies.gallery(memorization, search, real, synthetic, split)
    else:
        memorization, gallery = None, []
        warnings.append(f"Copies are not searched: that takes training scans of 2 patients, got {patients}.")
    report: dict[str, Any] = {
        "format": "medgen-report/3",
        "real": {**_describe(real), "split": split.words, "train": len(split.train), "val": len(split.val)},
        "synthetic": {**_describe(synthetic), "marked_synthetic": synthetic.dataset.synthetic},
        "spatial_dims": real.dataset.spatial_dims,
        "channels": len(real.dataset.channel_names),
        "rgb": real.dataset.channel_names == RGB,
        "extractor": {},
        "scores": scores_as_json,
        "frd": radiomic_distances(real, synthetic, split, recipe.region, seed),
        "radiomic_shift": radiomic_shift(real, synthetic, split, recipe.protocols[0], seed),
        "ms_ssim": diversity(real, synthetic, num_pairs, seed),
        "memorization": memorization,
        "utility": None,
        "utility_missing": None,
        "embedding": _embedding(real, synthetic, split, recipe.stamp["views"]),
        "warnings": warnings,
        "seed": seed,
    }
    with TemporaryDirectory() as folder:
        pictures = {
            "real": _sheet(real, draw(split.val, _SHOWN, seed), Path(folder) / "real.png"),
            "synthetic": _sheet(
                synthetic, draw(range(len(synthetic.cases)), _SHOWN, seed), Path(folder) / "synthetic.png"
            ),
        }
    for index, picture in enumerate(gallery):
        pictures[f"pair {index}"] = picture
    return report, pictures


def _network(
    name: str, weights: Path | None, dataset: Dataset, slices_per_plane: int, image_size: int | None
) -> torch.nn.Module:
    dims: Literal[2, 3] = 3 if dataset.spatial_dims == 3 else 2
    settings: dict[str, Any] = {}
    if dims == 3 and name != "medicalnet":
        settings["slices_per_plane"] = slices_per_plane
    if name == "efficientnet-lite0":
        settings |= {"rgb": dataset.channel_names == RGB, "image_size": image_size}
    return build_extractor(name, weights=weights, spatial_dims=dims, in_channels=len(dataset.channel_names), **settings)


def _describe(scans: Scans) -> dict[str, Any]:
    named = {case.group for case in scans.cases if case.group}
    # A group for every scan is only another name of the scan.
    known = all(case.group for case in scans.cases) and len(named) < len(scans.cases)
    return {
        "folder": scans.dataset.root.resolve().name,
        "scans": len(scans.cases),
        "patients": len(named) if known else None,
    }


def _sheet(scans: Scans, rows: Sequence[int], path: Path) -> Image.Image:
    samples = (load_case(scans.cases[row], scans.dataset) for row in rows)
    contact_sheet(samples, path, class_names=scans.dataset.class_names)
    with Image.open(path) as picture:
        return picture.convert("RGB")


def _embedding(real: Scans, synthetic: Scans, split: Split, views: Sequence[str]) -> dict[str, Any]:
    """Where all scans lie along the two main axes of the features of all views."""
    both = torch.cat([real.features, synthetic.features]).double().flatten(1)
    centered = both - both.mean(dim=0)
    # The axes come from the inner products of the scans: there are fewer of them than features.
    values, vectors = torch.linalg.eigh(centered @ centered.T)
    # The sign of an axis is arbitrary; one rule keeps the picture the same on every machine.
    axes = vectors[:, [-1, -2]]
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)))
    places = axes * values[[-1, -2]].clamp(min=0).sqrt()
    sets = {"real train": split.train, "real val": split.val} if split.apart else {"real": split.val}
    rows = {name: (real, chosen, 0) for name, chosen in sets.items()}
    rows["synthetic"] = (synthetic, list(range(len(synthetic.cases))), len(real.cases))
    return {
        "method": f"Two main axes (PCA) of the features of {len(views)} view(s)",
        "explained": (values[[-1, -2]] / values.sum()).tolist(),
        "points": {name: places[[first + row for row in chosen]].tolist() for name, (_, chosen, first) in rows.items()},
        "cases": {name: [scans.cases[row].case for row in chosen] for name, (scans, chosen, _) in rows.items()},
    }


def _check_output(output: Path, *, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output}: expected a folder for the report, got a file. Choose another output folder.")
    # A run that was stopped while it wrote leaves its cache and no report.json; it goes on.
    begun = (output / "cache").is_dir()
    for name in _FILES:
        if (output / name).exists() and not overwrite and (name == "report.json" or not begun):
            raise BadInputError(
                f"{output}: expected a folder without a report, got one with {name}. "
                "Choose another output folder, or pass --overwrite."
            )


@contextmanager
def _made(output: Path) -> Iterator[None]:
    """Make the folder before the work, which takes minutes; if that fails and left nothing in it, take it away."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(
            f"{output}: expected a folder that can be made, got: {error.strerror}. Choose another output folder."
        ) from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # what was measured is kept, and a folder that holds anything stays
            for folder in made:
                folder.rmdir()
        raise


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
