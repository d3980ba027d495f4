"""Radiomic features: time beside PyRadiomics and pictologics, alternating in one run, and what a second core adds.

    OMP_NUM_THREADS=1 python benchmarks/radiomics_speed.py

PyRadiomics comes with the extra `oracle`; pictologics is `python -m pip install pictologics==0.9.0` on Python 3.12 or
later. An engine that is not installed is left out.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from common import cores, data_folder, save, table, verdict
from jsonargparse import auto_cli
from PIL import Image
from scipy import ndimage

from medgen.metrics.protocols import PROTOCOLS
from medgen.radiomics import Parameters, extract
from medgen.radiomics.filters import derive

LEAST_PYRADIOMICS, LEAST_CORES = 10.0, 1.8
MOST_SECONDS = 0.045  # of a 256² image
# Classes that pictologics has too; its GLDM is called NGLDM.
SHARED = ("firstorder", "glcm", "gldm", "glrlm", "glszm", "ngtdm")
FAMILIES = ["glcm", "glrlm", "glszm", "ngtdm", "ngldm"]


def installed(package: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def alternate(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, after one that warms up, called in turn.

    Args:
        calls: What to time, by name.
        repeats: How often each.

    Returns:
        Seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def volume(edge: int, seed: int) -> np.ndarray:
    """A volume of smooth noise in whole gray values."""
    made = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(edge,) * 3), 1.5)
    return np.round((made - made.min()) / np.ptp(made) * 255)


def ball(shape: tuple[int, ...], voxels: int) -> np.ndarray:
    """The voxels closest to the middle."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    radius = np.sqrt(sum(axis**2 for axis in axes))
    return (radius < np.sort(radius, axis=None)[voxels]).astype(np.uint8)


def pictologics_call(images: list[np.ndarray], mask: np.ndarray) -> Callable[[], object]:
    """The shared classes of every image by pictologics, discretized by the same width."""
    from pictologics.features.intensity import calculate_intensity_features
    from pictologics.features.texture import calculate_all_texture_features
    from pictologics.preprocessing import discretise_image

    region = mask if mask.ndim == 3 else mask[..., None]

    def call() -> None:
        for image in images:
            picture = image if image.ndim == 3 else image[..., None]
            values = picture[region > 0]
            calculate_intensity_features(values)
            lowest = float(values.min() - values.min() % 5)
            levels = discretise_image(picture, method="FBS", roi_mask=region, bin_width=5.0, min_val=lowest)
            calculate_all_texture_features(levels, region, int(levels[region > 0].max()), families=FAMILIES)

    return call


def medgen_call(images: list[np.ndarray], mask: np.ndarray) -> Callable[[], object]:
    """The shared classes of every image by medgen."""
    names = dict.fromkeys(SHARED, ())
    parameters = Parameters(feature_classes={**names, "glcm": _without_mcc()}, settings={"binWidth": 5})

    def call() -> None:
        for image in images:
            extract(image, mask, parameters=parameters)

    return call


def _without_mcc() -> tuple[str, ...]:
    return tuple(name for name in Parameters().features_of("glcm") if name != "MCC")


def main(images: int = 5, repeats: int = 5, seed: int = 0) -> None:
    """Time the engines.

    Args:
        images: X-rays of 256² that are extracted in every repeat.
        repeats: Alternations.
        seed: Of the volume.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        raise SystemExit("OMP_NUM_THREADS: expected 1, as one core is compared with one core. Set it.")
    files = sorted((data_folder("cxr_text") / "images").glob("*.png"))[:images]
    scans = [np.asarray(Image.open(file), dtype=np.float64) for file in files]
    block = volume(64, seed)
    rows, found = [], {}
    engines = ["medgen", *(["pyradiomics"] if installed("pyradiomics-bhklab") or installed("pyradiomics") else [])]
    for name, arrays, dims, spacing in (
        ("frd-v1 features, 256² X-rays", scans, 2, (1.0, 1.0)),
        ("frd-v1 features, 64³ volume at 2 mm", [block], 3, (2.0, 2.0, 2.0)),
    ):
        protocol = PROTOCOLS["frd-v1"]
        calls = {
            engine: partial(_extract_all, arrays, protocol.parameters(dims), spacing, engine) for engine in engines
        }
        seconds = {engine: value / len(arrays) for engine, value in alternate(calls, repeats).items()}
        ratio = seconds["pyradiomics"] / seconds["medgen"] if "pyradiomics" in seconds else None
        found[name] = {"seconds": seconds, "ratio": ratio}
        goal = ratio is not None and ratio >= LEAST_PYRADIOMICS
        rows.append([name, seconds["medgen"], seconds.get("pyradiomics"), ratio, verdict(goal)])
    if installed("pictologics"):
        crop = np.ascontiguousarray(scans[0])
        for name, image, mask, spacing in (
            ("shared classes, 256² and 4 wavelets, 44k pixels", crop, ball(crop.shape, 44_000), (1.0, 1.0)),
            ("shared classes, 64³ and 8 wavelets, 92k voxels", block, ball(block.shape, 92_000), (1.0,) * 3),
        ):
            scaled = (image - image.mean()) / image.std() * 100
            bands = [scaled, *(band for _, band in derive(scaled, mask > 0, spacing, "Wavelet", {}))]
            bands = [np.ascontiguousarray(band) for band in bands]
            calls = {"medgen": medgen_call(bands, mask), "pictologics": pictologics_call(bands, mask)}
            seconds = alternate(calls, repeats)
            ratio = seconds["pictologics"] / seconds["medgen"]
            found[name] = {"seconds": seconds, "ratio": ratio}
            rows.append([name, seconds["medgen"], seconds["pictologics"], ratio, verdict(ratio >= 1)])
    many = scans * max(1, 16 // len(scans))
    parameters = PROTOCOLS["frd-v1"].parameters(2)
    calls = {str(workers): partial(_in_threads, many, parameters, workers) for workers in (1, 2)}
    seconds = alternate(calls, repeats)
    gain = seconds["1"] / seconds["2"]
    found["two cores"] = {"seconds": {f"{key} thread(s)": value for key, value in seconds.items()}, "ratio": gain}
    name = f"{len(many)} X-rays, two threads against one"
    rows.append([name, seconds["2"], seconds["1"], gain, verdict(gain >= LEAST_CORES)])
    table(["what", "medgen s", "other s", "times", ""], rows)
    save(
        "radiomics_speed",
        what="seconds per image or set, medians of alternating calls on one core, decoded arrays to features",
        n={"images": len(scans), "repeats": repeats, "cores": cores()},
        seeds=[seed],
        engines={name: installed(name) for name in ("pyradiomics-bhklab", "pictologics", "numba")},
        measured=found,
        goals={"pyradiomics": LEAST_PYRADIOMICS, "pictologics": 1.0, "two_cores": LEAST_CORES, "seconds": MOST_SECONDS},
    )


def _extract_all(arrays: list[np.ndarray], parameters: Parameters, spacing: tuple[float, ...], engine: str) -> None:
    for array in arrays:
        extract(array, None, spacing=spacing, parameters=parameters, engine=engine)  # type: ignore[arg-type]


def _in_threads(arrays: list[np.ndarray], parameters: Parameters, workers: int) -> None:
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda array: extract(array, None, parameters=parameters), arrays))


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
