"""Where a sample came from: its record, the manifest of a run, hashes, and files that are whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from medgen.types import BadInputError

MANIFEST = "manifest.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DISTRIBUTIONS = ("medgen", "torch", "monai", "diffusers", "numpy")


@dataclass(frozen=True)
class SampleRecord:
    """All that is needed to make one synthetic sample again, voxel for voxel.

    Attributes:
        case: Identifier of the sample in its data set.
        index: Position in the run's plan.
        seed: Seed of every draw for this sample (noise, label).
        model: Name of the generator: embedded name, Hub id, or the name in the settings of a local one.
        model_hash: SHA-256 of its weights and settings.
        sampler: Name of the sampler.
        sampler_spacing: Name of its timestep spacing.
        num_inference_steps: Network steps of the sampler.
        guidance_scale: w of classifier-free guidance, of all conditions or by name; 1 is off.
        temperature: Factor on the noise that the image started from; 1 is as trained.
        precision: ``"fp32"`` or ``"bf16"``.
        max_memory_gb: Bound that the decoder worked under, or None.
        label: How the label arose: ``source`` (``files``, ``deform``, ``generate``, or ``none`` where it has no label),
            its ``file`` name and ``sha256``, the drawn ``deformation`` or ``attempt`` that was accepted.
        batch: The samples that went through the networks together (``case``, ``index``, ``seed``, ``file``,
            ``sha256``, ``conditions``), because a batch decides the rounding.
        shape: Voxels of the written scan.
        spacing: Its voxel edges in mm.
        model_shape: Voxels that the networks saw, padding included.
        image_sha256: Digest of the written intensities, see :func:`sha256_array`.
        label_sha256: Digest of the written label; None where it has none.
        files: Path within the output folder to SHA-256 of each written file.
        runtime: Device, processor, threads and library versions.
        synthetic: Always true; marks the sample wherever the record travels.
        conditions: What steered it besides its label, and only that: ``text``, ``edge`` or ``edge_map`` (``file`` and
            ``sha256`` of each file), ``attributes``; and ``source`` where it was made from a scan: its ``files``, the
            ``strength``, ``region`` and ``label`` before (``file`` and ``sha256``) where given, the ``voxels`` that
            could change, and the ``band`` of voxels around them that was blended.
        guidance_interval: Shares of the noise process between which guidance acted.
        guidance_rescale: Share by which it gave back the standard deviation that it added.
        network_evaluations: Passes of the denoiser; None in records from before they were counted.
        controls: How control branches acted, by condition, where not as trained.
        minority_scale: w of the guidance towards rare samples; 0 is off.
        gates: What the gates said of it, its `reasons` and `scores`; empty where none judged it.
    """

    case: str
    index: int
    seed: int
    model: str
    model_hash: str
    sampler: str
    sampler_spacing: str
    num_inference_steps: int
    guidance_scale: float | dict[str, float]
    temperature: float
    precision: str
    max_memory_gb: float | None
    label: dict[str, Any]
    batch: list[dict[str, Any]]
    shape: list[int]
    spacing: list[float]
    model_shape: list[int]
    image_sha256: str
    label_sha256: str | None
    files: dict[str, str]
    runtime: dict[str, Any]
    synthetic: bool = True
    conditions: dict[str, Any] = field(default_factory=dict)
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    guidance_rescale: float = 0.0
    network_evaluations: int | None = None
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    minority_scale: float = 0.0
    gates: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of JSON.

        Returns:
            The record without a line break.
        """
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SampleRecord:
        """Build a record from parsed JSON; keys that later stages added are left out, and what a record from before
        temperatures or conditions lacks is what held then.

        Args:
            values: Parsed line of a manifest.

        Returns:
            The record.

        Raises:
            BadInputError: If a key is missing.
        """
        values = {"temperature": 1.0, **values}  # records from before it could be set
        needed = [item for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING]
        missing = [item.name for item in needed if item.name not in values]
        if missing:
            raise BadInputError(f"expected a sample record, got one without {', '.join(missing)}")
        return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})


def append_record(path: Path, record: SampleRecord) -> None:
    """Add one line to a manifest; several processes may do so at once.

    Args:
        path: The manifest.
        record: Sample whose files are already in place.

    Raises:
        BadInputError: If the disk is full.
    """
    line = (record.to_json() + "\n").encode()
    with explain_full_disk(path):
        # One write on an O_APPEND descriptor lands whole at the end, whoever else is writing.
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if os.write(handle, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        finally:
            os.close(handle)


def require_accepted(folder: Path, records: Iterable[SampleRecord]) -> None:
    """Refuse pairs that gates rejected as something to learn from.

    Args:
        folder: Where they lie, for the message.
        records: What is known of each.

    Raises:
        BadInputError: If one has reasons for its rejection.
    """
    for record in records:
        if record.gates.get("reasons"):
            raise BadInputError(
                f"{folder}: expected pairs that the gates accepted, got {record.case}, which they rejected "
                f"({', '.join(record.gates['reasons'])}). Name the folder of accepted pairs."
            )


def read_manifest(path: Path) -> list[SampleRecord]:
    """Read a manifest; a last line that a killed process left unfinished does not count.

    Args:
        path: The manifest.

    Returns:
        The records in file order.

    Raises:
        BadInputError: If the file is missing or a finished line is not a record.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(
            f"{path}: expected a readable manifest, got {error}. Name the manifest.jsonl of a run."
        ) from error
    records = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n") or not line.strip():
            continue
        try:
            records.append(_parse(line))
        except BadInputError as error:
            raise BadInputError(f"{path}: line {number}: {error}. Restore the file or make the run again.") from error
    return records


def finalize_manifest(path: Path, records: Iterable[SampleRecord]) -> list[SampleRecord]:
    """Rewrite a manifest in the order of the plan, one line per case, in one step.

    Args:
        path: The manifest.
        records: Records to keep; of two with the same case the later one.

    Returns:
        The records as written.
    """
    last = {record.case: record for record in records}
    ordered = sorted(last.values(), key=lambda record: record.index)
    write_text(path, "".join(record.to_json() + "\n" for record in ordered))
    return ordered


def salvage_manifest(path: Path) -> list[SampleRecord]:
    """Read what is whole in the manifest of an interrupted run and drop the rest from the file.

    Args:
        path: The manifest; may be absent.

    Returns:
        The whole records.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            records.append(_parse(line))
        except BadInputError:
            continue  # torn by the interruption: the sample is simply made again
    return finalize_manifest(path, records)


def _parse(line: str) -> SampleRecord:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadInputError(f"expected JSON, got a line that is damaged or cut off ({error.msg})") from error
    if not isinstance(values, dict):
        raise BadInputError(f"expected a sample record, got {type(values).__name__}")
    return SampleRecord.from_dict(values)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes.

    Args:
        path: The file.

    Returns:
        64 hex digits.
    """
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_scan(path: Path) -> str:
    """Digest of a file, or of all files of a DICOM series.

    Args:
        path: File or folder.

    Returns:
        SHA-256 in hexadecimal.

    Raises:
        BadInputError: If there is nothing.
    """
    if path.is_dir():
        return hashlib.sha256("".join(sha256_file(part) for part in sorted(path.iterdir())).encode()).hexdigest()
    if not path.is_file():
        raise BadInputError(f"{path}: expected a file, got none. Add it, or take its case off the list.")
    return sha256_file(path)


def sha256_array(array: np.ndarray | torch.Tensor) -> str:
    """SHA-256 of an array's type, shape and values, independent of its memory layout.

    Args:
        array: Any array, for example an image ``(C, H, W[, D])`` in source units.

    Returns:
        64 hex digits.
    """
    values = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)
    little = values.dtype.newbyteorder("<")
    digest = hashlib.sha256(f"{little.str}{values.shape}".encode())
    digest.update(np.ascontiguousarray(values, dtype=little).tobytes())
    return digest.hexdigest()


def hide_folder(text: str, folder: str | Path) -> str:
    """Take a folder's place on this machine out of a text that goes into files which people share.

    Args:
        text: For example an error message that names a file of the folder.
        folder: The folder, as the text writes it.

    Returns:
        The text with paths from within the folder.
    """
    return text.replace(f"{folder}{os.sep}", "")


def runtime_info(device: torch.device) -> dict[str, Any]:
    """What besides the arguments decides the rounding of a run.

    Args:
        device: Device that the networks run on.

    Returns:
        Device, processor, threads and versions, as JSON values.
    """
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent.

    Args:
        path: Target; its folder exists.
        content: All bytes.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file so that it is whole or absent.

    Args:
        path: Target; its folder exists.
        content: The text; line breaks are kept as they are.
    """
    write_bytes(path, content.encode("utf-8"))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary name in the target's folder, renamed to the target on success and removed otherwise.

    Args:
        path: Target.

    Yields:
        Temporary path, hidden from those who list the folder.

    Raises:
        BadInputError: If the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with explain_full_disk(path):
            yield temporary
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())  # else a power cut could leave the new name on an empty file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk into one clear error.

    Args:
        path: File that is being written.

    Yields:
        Nothing.

    Raises:
        BadInputError: If the disk or the user's quota is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors writes in Rust, and gives the number in its text only.
        told = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        if number not in _FULL:
            raise
        raise BadInputError(
            f"{path}: expected free disk space, got a full disk ({os.strerror(number)}). "
            "Free some space or choose another --output, then run the same command again: finished work is kept."
        ) from error
