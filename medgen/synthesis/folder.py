"""The output folder of a run: opened once, continued where it was left, filled scan by scan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml

from medgen.data.dataset import Rejection
from medgen.data.export import file_ending, is_rgb, prepare_output, write_case
from medgen.data.io import ImageDtype
from medgen.filtering.folder import REJECTED as REJECTED_PAIRS
from medgen.generator import Generator
from medgen.provenance import (
    MANIFEST,
    SampleRecord,
    finalize_manifest,
    read_manifest,
    salvage_manifest,
    sha256_array,
    sha256_file,
    write_text,
)
from medgen.synthesis.papers import REJECTED, append_rejection
from medgen.synthesis.plan import SamplingSettings
from medgen.synthesis.sampling import SyntheticSample

ARGUMENTS = "synthesize.yaml"


def open_folder(
    output: Path,
    identity: dict[str, Any],
    arguments: dict[str, Any],
    rejected: Sequence[Rejection],
    *,
    overwrite: bool,
) -> bool:
    """Claim the folder; of a run to continue keep the scans whose files are whole.

    Args:
        output: The folder.
        identity: What tells this run from every other.
        arguments: What says it again, for ``synthesize.yaml``.
        rejected: Label maps that were left out.
        overwrite: Replace another run.

    Returns:
        Whether the run is new there.
    """
    new = prepare_output(output, identity, overwrite=overwrite) == "new"
    if not new:
        records = salvage_manifest(output / MANIFEST)
        whole = [record for record in records if is_whole(output, record)]
        if len(whole) < len(records):
            finalize_manifest(output / MANIFEST, whole)
    (output / REJECTED).unlink(missing_ok=True)
    for rejection in rejected:
        append_rejection(output, rejection)
    header = "# Of files and folders only the names are kept: give those anew, such as --model and --labels.\n"
    write_text(output / ARGUMENTS, header + yaml.safe_dump(arguments, sort_keys=False))
    return new


def read_done(output: Path) -> list[SampleRecord]:
    """Records of the scans that are in the folder so far.

    Args:
        output: The folder.

    Returns:
        Whole records; none where nothing is written yet.
    """
    return read_manifest(output / MANIFEST) if (output / MANIFEST).exists() else []


def read_made(output: Path) -> list[SampleRecord]:
    """Records of all scans that were made so far, those that gates rejected among them.

    Args:
        output: The folder.

    Returns:
        Whole records.
    """
    return [*read_done(output), *read_done(output / REJECTED_PAIRS)]


def is_whole(output: Path, record: SampleRecord) -> bool:
    """Whether the files of a record are there as they were written.

    Args:
        output: The folder.
        record: Of one of its scans.

    Returns:
        True if each has the digest of the record.
    """
    paths = {output / name: digest for name, digest in record.files.items()}
    return all(path.is_file() and sha256_file(path) == digest for path, digest in paths.items())


def write_sample(
    output: Path,
    generator: Generator,
    model: str,
    item: SyntheticSample,
    settings: SamplingSettings,
    runtime: dict[str, Any],
) -> SampleRecord:
    """Write one scan, and its label if it has one.

    Args:
        output: The folder.
        generator: The model.
        model: Its name.
        item: The scan.
        settings: How it was sampled.
        runtime: Of this process.

    Returns:
        Its record, made from what was written; not yet in the manifest.
    """
    config, scan = generator.config, item.spec.scan
    # What is made from a scan keeps the type of its files.
    dtype = config.image_dtype if scan is None else cast("ImageDtype", str(item.image.dtype).removeprefix("torch."))
    flat = scan is None or not scan.files[0].path.name.lower().endswith((".nii", ".nii.gz"))
    ending = file_ending(item.grid, dtype) if flat else ".nii.gz"
    paths = write_case(
        output,
        item.spec.case,
        item.image,
        item.label,
        item.grid,
        image_dtype=dtype,
        # Only a PNG holds three colors in one file.
        rgb=is_rgb(config.channel_names) and ending == ".png",
        ending=ending,
        edited=scan is not None,
    )
    files = {path.relative_to(output).as_posix(): sha256_file(path) for path in paths.files}
    return SampleRecord(
        case=item.spec.case,
        index=item.spec.index,
        seed=item.spec.seed,
        model=model,
        model_hash=generator.weights_hash,
        **{**asdict(settings), "guidance_interval": list(settings.guidance_interval)},
        label=item.label_record,
        conditions=item.conditions,
        network_evaluations=item.network_evaluations,
        batch=[
            {
                "case": spec.case,
                "index": spec.index,
                "seed": spec.seed,
                "file": spec.file and spec.file.shown,
                "sha256": spec.file and spec.file.sha256,
                "conditions": spec.conditions,
            }
            for spec in item.batch
        ],
        shape=list(item.grid.shape),
        spacing=list(item.grid.spacing),
        model_shape=list(item.model_shape),
        image_sha256=sha256_array(item.image.numpy().astype(np.dtype(dtype))),
        label_sha256=None if item.label is None else sha256_array(item.label.numpy()),
        files=files,
        runtime=runtime,
    )
