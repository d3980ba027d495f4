"""``medgen predict``: a folder of scans in, segmentations and their uncertainty out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.data import MetaTensor
from tqdm import tqdm

from medgen.data.dataset import check_same_grid, read_dataset
from medgen.data.geometry import from_model, place, to_model
from medgen.data.intensity import Normalization
from medgen.data.io import read_image, write_image, write_label
from medgen.generator import Generator
from medgen.pictures import contact_sheet
from medgen.precision import Precision, resolve_device
from medgen.provenance import runtime_info, sha256_scan, write_text
from medgen.synthesis.inputs import SCAN_ENDINGS, list_cases
from medgen.test_time.aggregate import Combination, Weighting
from medgen.test_time.augment import NULL_TEXT, GenerativeTTA, Prediction
from medgen.test_time.programs import Program, load_program
from medgen.test_time.segmenter import Output, Segmenter
from medgen.types import BadInputError, Grid, Sample

RECORDS = "predictions.jsonl"
_SETTINGS = "predictions.json"
_SHOWN = 12  # scans in the picture
_DECLARED = ("dataset.json", "metadata.csv", "metadata.jsonl", "images")
Intensities = Literal["file", "unit", "zscore"]
Region = Literal["uncertainty", "everywhere", "blocks", "hybrid"]  # without words, to which nothing could attend


def predict(
    model: str,
    segmenter: Path,
    input: Path,
    output: Path,
    *,
    intensities: Intensities = "file",
    orientation: str | None = None,
    patch_size: list[int] | None = None,
    segmenter_output: Output = "logits",
    num_views: int = 10,
    mask: Region = "uncertainty",
    strength: float = 0.3,
    randomness: float = 0.5,
    detail: float = 0.0,
    num_inference_steps: int = 5,
    method: str = "edit_friendly",
    condition_on_prediction: bool = False,
    guidance_scale: float = 1.0,
    geometric: bool | tuple[int, ...] = (),
    rotation: float = 10.0,
    scaling: float = 0.1,
    intensity_views: bool = False,
    combination: Combination = "mean",
    weighting: Weighting = "equal",
    outlier_dice: float = 0.5,
    patience: int = 0,
    max_evaluations: int | None = None,
    max_seconds: float | None = None,
    check_familiarity: bool = True,
    view_batch: int = 4,
    window: list[int] | None = None,
    slice_axis: int = -1,
    max_memory_gb: float | None = None,
    scaled_window: tuple[float, float] | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Segment scans with generative test-time augmentation: what a generator makes of each is segmented too.

    Writes a label map for each scan on its own grid, its values those of the segmenter's channels; maps of entropy (all
    uncertainty, in nats) and of mutual information (what of it is between the views); for each scan a line in
    predictions.jsonl with volumes, how much they and the label maps vary, and what it took; and pictures to look at.

    The segmenter gets the scan on the grid of its file, in the units that you say. A MONAI bundle does its own
    preprocessing; predictions come back to the grid of the file. Scans that the generator does not know get geometric
    views, and their line says so.

    Args:
        model: Generator: folder of a model or run, embedded name such as hippocampus-mr-3d, or Hub id.
        segmenter: TorchScript file (.ts, .pt), program of torch.export (.pt2), or folder of a MONAI bundle.
        input: Folder of scans, one file each or one per channel (``CASE_0000``), or a data set, all of whose scans are
            taken.
        output: Folder for the predictions.
        intensities: What the segmenter takes: those of the ``file``; ``unit``, the scan's percentiles 0.5 and 99.5 at 0
            and 1; or ``zscore``, its mean at 0 and its standard deviation 1. A bundle does this itself.
        orientation: Axis codes such as RAS that volumes are turned to for the segmenter; by default they stay.
        patch_size: Voxels per axis of a sliding window, for scans that are larger than the segmenter takes.
        segmenter_output: What it gives: ``logits``, ``probabilities``, or ``sigmoid`` for one class.
        num_views: Generative views of each scan.
        mask: Where views may differ: ``uncertainty`` of the segmenter, ``everywhere``, ``blocks`` or ``hybrid``.
        strength: Share in (0, 1] of the noise process that is gone.
        randomness: 0 goes the same way back, 1 draws all noise anew.
        detail: Share of the scan's own detail that views keep: 1 adds what the generator changes to the scan, 0 shows
            what it makes of it.
        num_inference_steps: Steps within the strength.
        method: How a scan goes into noise: edit_friendly, o_belm, edict, fixed_point, ddim or dpm++.
        condition_on_prediction: Whether the prediction for the scan steers the generator, which has the same classes.
        guidance_scale: How strictly; 1 makes one pass a step, others two.
        geometric: Axes of the array, from 0, along which scan and views are mirrored, such as [0]; true is all, false
            leaves views unturned too. Name those alone along which the segmenter has seen mirror images in training: a
            segmenter of left and right organs takes one for the other in a mirror.
        rotation: Largest turn of a view about each axis, in degrees.
        scaling: Largest logarithm of the scale of a view.
        intensity_views: Whether views also get other gamma, contrast, brightness and noise.
        combination: ``mean`` of probabilities, ``logit`` mean or ``vote``.
        weighting: ``equal``, or by ``confidence``.
        outlier_dice: Views that agree less with the others than this share of their own agreement do not count.
        patience: Stop after so many views that leave the consensus as it is; 0 makes all.
        max_evaluations: Most denoiser rows for a scan.
        max_seconds: Most time for a scan; results then depend on the machine.
        check_familiarity: Whether scans that the generator does not know get geometric views instead.
        view_batch: Views that go through the networks together.
        window: Latent voxels per axis of the windows that the generator's denoiser sees of a large scan.
        slice_axis: Axis along which volumes are cut for a 2D generator, from 0 or, negative, from the end.
        max_memory_gb: Bound for what decoding a view adds to the memory in use.
        scaled_window: For a bundle whose preprocessing scales intensities, and a generator with a fixed window (CT):
            what the two ends of that window have become.
        precision: Of the generator: ``fp32``, ``bf16``, or ``auto``.
        device: ``auto``, ``cpu``, ``cuda`` or another torch device.
        seed: Of noise, blocks and poses.
        overwrite: Replace predictions of other settings that the folder holds.

    Returns:
        The lines of predictions.jsonl.

    Raises:
        BadInputError: If a file cannot be used, or the generator, the segmenter and the scans do not go together.
    """
    chosen = resolve_device(device)
    program = load_program(Path(segmenter), chosen)
    if program.preprocessing is not None and (intensities != "file" or orientation or patch_size):
        raise BadInputError(
            "intensities, orientation and patch_size: expected none for a MONAI bundle, which says them itself. Leave "
            "them out."
        )
    generator = Generator.from_pretrained(model, device=chosen)
    cases, output = _find_scans(Path(input), len(generator.config.channel_names)), Path(output)
    if program.sigmoid and segmenter_output == "logits":
        raise BadInputError(
            f"{segmenter}: expected exclusive classes, got a bundle whose postprocessing is a sigmoid. For one class "
            "say segmenter_output='sigmoid'; classes that overlap are not supported."
        )
    if mask not in get_args(Region) or method == NULL_TEXT:
        raise BadInputError(
            f"mask and method: expected a mask of {', '.join(get_args(Region))} and another method than {NULL_TEXT!r}, "
            f"got {mask!r} and {method!r}. For what wants a text for each scan use medgen.test_time.GenerativeTTA in "
            "Python."
        )
    if (scaled_window is not None) and program.preprocessing is None:
        raise BadInputError(
            "scaled_window: expected none, because the generator gets the units of the file. Leave it out."
        )
    inferer = program.inferer
    if patch_size is not None:
        from monai.inferers import SlidingWindowInferer

        batch = 1 if program.one_at_a_time else 4
        inferer = SlidingWindowInferer(tuple(patch_size), sw_batch_size=batch, overlap=0.5, mode="gaussian")
    options: dict[str, Any] = {
        "num_views": num_views,
        "mask": mask,
        "strength": strength,
        "randomness": randomness,
        "detail": detail,
        "condition_on_prediction": condition_on_prediction,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "method": method,
        "geometric": geometric,
        "rotation": rotation,
        "scaling": scaling,
        "intensity": intensity_views,
        "combination": combination,
        "weighting": weighting,
        "outlier_dice": outlier_dice,
        "patience": patience,
        "max_evaluations": max_evaluations,
        "max_seconds": max_seconds,
        "check_familiarity": check_familiarity,
        "view_batch": view_batch,
        "window": window,
        "slice_axis": slice_axis,
        "max_memory_gb": max_memory_gb,
        "scaled_window": scaled_window,
        "precision": precision,
        "seed": seed,
    }
    # Before anything is read or written.
    tried = Segmenter(program.network, output=segmenter_output, inferer=inferer, device=chosen)
    GenerativeTTA(tried, generator, **options)
    settings = {
        **options,
        "segmenter_output": segmenter_output,
        "intensities": intensities,
        "orientation": orientation,
        "patch_size": patch_size,
    }
    identity = _claim(output, [generator.weights_hash, program.digest, settings], overwrite=overwrite)
    done = {line["case"]: line for line in _read_lines(output / RECORDS)}
    _write_lines(output / RECORDS, done.values())  # without a line that was cut off
    for part in ("labels", "uncertainty"):
        (output / part).mkdir(exist_ok=True)
    for case, paths in tqdm(cases.items(), desc="predict", unit="scan"):
        digest = hashlib.sha256("".join(map(sha256_scan, paths)).encode()).hexdigest()
        earlier = done.get(case)
        if earlier and earlier["sha256"] == digest and all((output / name).is_file() for name in earlier["files"]):
            continue
        made, grid = _segment(paths, program, tried, generator, intensities, orientation, options)
        files = _write(output, case, paths, made, grid)
        line = {"case": case, "sha256": digest, "files": files, **_describe(made, grid)}
        with (output / RECORDS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        done[case] = line
    lines = [done[case] for case in cases]
    _write_lines(output / RECORDS, lines)
    runtime = runtime_info(chosen)
    summary = {"identity": identity, "model": generator.config.name, **settings, "runtime": runtime}
    write_text(output / _SETTINGS, json.dumps(summary, indent=2) + "\n")
    contact_sheet(
        _shown([(cases[line["case"]], line) for line in lines[:_SHOWN]], output),
        output / "predictions.png",
        title=f"{len(lines)} predictions; beside each scan its entropy",
    )
    print(_summary(lines, output))
    return lines


def _summary(lines: Sequence[dict[str, Any]], output: Path) -> str:
    """What came of all scans, and what of that was not as asked for."""
    said = [f"{len(lines)} prediction{'s' if len(lines) != 1 else ''} in {output}"]
    for name, what in (("fallback", "by geometric views alone"), ("stopped", "by fewer views")):
        reasons = [line[name] for line in lines if line[name]]
        if reasons:
            more = ", among other reasons" if len(set(reasons)) > 1 else ""
            said.append(f"  {len(reasons)} of them {what}: {reasons[0]}{more}")
    return "\n".join(said)


def _find_scans(folder: Path, channels: int) -> dict[str, list[Path]]:
    """Files of each scan of a folder or a data set."""
    if any((folder / name).exists() for name in _DECLARED):
        return {case.case: list(case.images) for case in read_dataset(folder).cases}
    return list_cases(folder, "scans", SCAN_ENDINGS, channels=channels)


def _read(paths: Sequence[Path]) -> tuple[torch.Tensor, Grid]:
    parts = [read_image(path) for path in paths]
    for path, (_, grid) in zip(paths[1:], parts[1:], strict=True):
        check_same_grid(path, grid, paths[0], parts[0][1])
    return torch.cat([image.float() for image, _ in parts]), parts[0][1]


def _segment(
    paths: Sequence[Path],
    program: Program,
    segmenter: Segmenter,
    generator: Generator,
    intensities: Intensities,
    orientation: str | None,
    options: dict[str, Any],
) -> tuple[Prediction, Grid]:
    """Prediction on the grid of the file."""
    own, grid = _read(paths)
    if program.preprocessing is not None:
        files = str(paths[0]) if len(paths) == 1 else [str(path) for path in paths]
        ready = program.preprocessing({"image": files})["image"]
        if not isinstance(ready, MetaTensor):
            raise BadInputError(
                f"{paths[0]}: expected a MetaTensor from the bundle's preprocessing, got {type(ready).__name__}, which "
                "does not say where its voxels lie. Leave EnsureTyped(track_meta=False) out."
            )
        made = GenerativeTTA(segmenter, generator, **options)(ready)
        like = MetaTensor(own, affine=torch.from_numpy(grid.affine))
        return _back(made, lambda values, mode: _resample(values, ready.affine, like, mode)), grid
    placement = place(grid, orientation=orientation)
    image = to_model(own, placement, mode="linear", padding="constant")
    change = _intensities(image, intensities, paths[0])
    # The generator gets the units of the file, by its own normalization; the segmenter its own.
    inferer = segmenter.inferer or (lambda inputs, network: network(inputs))
    adapted = Segmenter(
        lambda inputs: inferer(change(inputs), segmenter.network), output=segmenter.output, device=segmenter.device
    )
    scan = MetaTensor(image, affine=torch.from_numpy(placement.grid.affine)) if grid.known else image
    made = GenerativeTTA(adapted, generator, **options)(scan)
    return _back(made, lambda values, mode: from_model(values, placement, mode=mode)), grid


def _resample(values: torch.Tensor, affine: torch.Tensor, like: MetaTensor, mode: str) -> torch.Tensor:
    """A map ``(*spatial)`` on the voxels of a scan."""
    from monai.transforms import ResampleToMatch

    # What the bundle has cut away is background, of which nothing is known.
    move = ResampleToMatch(mode="nearest" if mode == "nearest" else "bilinear", padding_mode="zeros")
    return move(MetaTensor(values[None].float(), affine=affine), like).as_tensor()[0].to(values.dtype)


def _back(made: Prediction, move: Callable[[torch.Tensor, Any], torch.Tensor]) -> Prediction:
    """The maps that are written, on another grid."""
    return replace(
        made,
        label=move(made.label, "nearest"),
        entropy=move(made.entropy, "linear"),
        mutual_information=move(made.mutual_information, "linear"),
    )


def _intensities(image: torch.Tensor, kind: Intensities, path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """From the units of the file to those of the segmenter; the same for all views of a scan."""
    if kind == "file":
        return lambda inputs: inputs
    if kind == "unit":
        fitted = Normalization().fit(image, source=path)
        scale, shift = (
            torch.tensor(values).view(1, -1, *[1] * (image.ndim - 1)) for values in (fitted.scale, fitted.shift)
        )
        return lambda inputs: ((inputs * scale.to(inputs) + shift.to(inputs) + 1) / 2).clamp(0, 1)
    axes = tuple(range(1, image.ndim))
    mean, std = (part(axes, keepdim=True)[None] for part in (image.double().mean, image.double().std))
    return lambda inputs: (inputs - mean.to(inputs)) / std.to(inputs).clamp(min=1e-8)


def _write(output: Path, case: str, paths: Sequence[Path], made: Prediction, grid: Grid) -> list[str]:
    ending = ".png" if paths[0].suffix.lower() == ".png" and grid.spatial_dims == 2 else ".nii.gz"
    names = [f"labels/{case}{ending}"]
    (output / names[0]).parent.mkdir(parents=True, exist_ok=True)
    write_label(output / names[0], made.label, grid, description="medgen predict")
    for name in ("entropy", "mutual_information"):
        file = f"uncertainty/{case}_{name}.nii.gz"
        (output / file).parent.mkdir(parents=True, exist_ok=True)
        write_image(output / file, getattr(made, name)[None], grid, dtype="float32", description="medgen predict, nats")
        names.append(file)
    return names


def _describe(made: Prediction, grid: Grid) -> dict[str, Any]:
    voxel = float(np.prod(grid.spacing)) if grid.known else 1.0
    volumes = [float((made.label == k).sum()) * voxel for k in range(1, len(made.probability))]

    def listed(values: torch.Tensor) -> list[float | None]:
        return [None if value != value else round(value, 6) for value in values.tolist()]

    return {
        "volumes": volumes,
        "unit": ("mm3" if grid.spatial_dims == 3 else "mm2") if grid.known else "voxels",
        "volume_cv": listed(made.volume_cv),
        "pairwise_dice": listed(made.pairwise_dice),
        "mean_entropy": float(made.entropy.mean()),
        "views": made.views,
        "dropped": made.dropped,
        "evaluations": made.evaluations,
        "segmentations": made.segmentations,
        "seconds": round(made.seconds, 3),
        "fallback": made.fallback,
        "stopped": made.stopped,
        "familiarity": made.familiarity,
    }


def _claim(output: Path, parts: list[Any], *, overwrite: bool) -> str:
    """Refuse to add to predictions of other settings; a run that has finished no scan leaves none."""
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    try:
        output.mkdir(parents=True, exist_ok=True)
        mark = output / "identity"
        found = mark.read_text().strip() if mark.is_file() else identity
    except OSError as error:
        raise BadInputError(f"{output}: expected a folder to write to, got: {error}. Choose another.") from error
    if found != identity:
        if not overwrite and _read_lines(output / RECORDS):
            raise BadInputError(
                f"{output}: expected a folder without predictions of another model, segmenter or settings, got some. "
                "Choose another output folder, or pass --overwrite."
            )
        (output / RECORDS).unlink(missing_ok=True)
    write_text(mark, identity + "\n")
    return identity


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of an earlier run; the last may have been cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _shown(rows: Sequence[tuple[list[Path], dict[str, Any]]], output: Path) -> Iterator[Sample]:
    for paths, line in rows:
        (image, grid), (label_file, entropy_file, _) = _read(paths), line["files"]
        label = read_image(output / label_file)[0][0].to(torch.int16)
        yield Sample(line["case"], grid, image, label)
        yield Sample(f"{line['case']}: entropy", grid, read_image(output / entropy_file)[0], label)
