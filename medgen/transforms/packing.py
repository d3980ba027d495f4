"""Pairs loaded through the transforms of a pipeline and written into one flat file with an index at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from monai.transforms import Compose, LoadImaged
from monai.transforms.traits import RandomizableTrait
from tqdm import tqdm

from medgen.data.case import Case, Dataset
from medgen.data.dataset import load_case
from medgen.provenance import SampleRecord, atomic_path, sha256_array
from medgen.transforms.agreement import Facts, check_bank, label_channels, label_values, measure
from medgen.transforms.carriers import Carried, unwrap
from medgen.types import BadInputError

Preprocess = Callable[[dict[str, Any]], Mapping[Any, Any]] | Sequence[Callable[[Any], Any]]

_TAIL = 8  # bytes, the length of the index before them
_WHOLE = ("uint8", "int16", "uint16", "int32")


@dataclass(frozen=True)
class Packed:
    """Where an array lies in the packed file.

    Attributes:
        offset: Bytes before it.
        shape: Of the array.
        dtype: Name of the smallest type that holds it without loss, float32 being the largest.
        low: Lowest number in it.
        high: Highest.
        affine: Voxel index to mm, as rows; None where it has none.
        space: In which the affine leads.
        original_affine: Of the file, as rows; None where it has none.
        spatial_shape: Voxels of the file; None where it does not say.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    affine: list[list[float]] | None
    space: str
    original_affine: list[list[float]] | None
    spatial_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class BankItem:
    """One synthetic scan of a bank.

    Attributes:
        case: Its identifier.
        image_file: First file of the scan.
        label_file: Its label map; empty where the bank has none.
        made_from: Label map that it was made for, as the manifest calls it; empty where there was no file.
        made_from_sha256: Digest of that file.
        columns: What ``metadata.csv`` says of it.
        classes: Class values that its label shows after the transforms, background included.
        label_channels: Channels of the label; 0 where it has no axis of channels.
        facts: What the image shows of the transforms.
        image: Where the image lies.
        label: Where the label lies, or None.
    """

    case: str
    image_file: str
    label_file: str
    made_from: str
    made_from_sha256: str
    columns: dict[str, str]
    classes: tuple[int, ...]
    label_channels: int
    facts: Facts
    image: Packed
    label: Packed | None


class Prepare:
    """Loads a pair through the transforms of the pipeline, and checks what comes out.

    Args:
        dataset: The bank's folder.
        image_key: Key of the image.
        label_key: Key of the label map, or None.
        preprocess: As for :class:`~medgen.transforms.bank.SyntheticBank`.

    Raises:
        BadInputError: If a transform is random.
    """

    def __init__(self, dataset: Dataset, image_key: str, label_key: str | None, preprocess: Preprocess | None) -> None:
        self.dataset, self.image_key, self.label_key = dataset, image_key, label_key
        self.keys = [image_key] if label_key is None else [image_key, label_key]
        self.given = preprocess is not None
        if preprocess is None:
            preprocess = LoadImaged(self.keys, ensure_channel_first=True)
        self.transform = preprocess if callable(preprocess) else Compose(list(preprocess))
        random = next((each for each in _flat(self.transform) if isinstance(each, RandomizableTrait)), None)
        if random is not None:
            raise BadInputError(
                f"preprocess: expected deterministic transforms, as each scan of the bank goes through them once, got "
                f"{type(random).__name__}. Put random transforms after this one."
            )

    def __call__(self, case: Case) -> tuple[Carried, Carried | None]:
        """Load a pair.

        Args:
            case: One of the bank's cases.

        Returns:
            Image ``(C, H, W[, D])``, and label ``([C, ]H, W[, D])`` or None.

        Raises:
            BadInputError: If a transform fails, or what it gives is no such pair.
        """
        files = [str(path) for path in case.images]
        data: dict[str, Any] = {self.image_key: files[0] if len(files) == 1 else files}
        if self.label_key is not None:
            data[self.label_key] = str(case.label)
        try:
            made = self.transform(data)
            image, *rest = [unwrap(made[key], f"preprocess: {key} of {case.case}") for key in self.keys]
        except BadInputError:
            raise
        except Exception as error:
            raise BadInputError(
                f"preprocess: failed on {case.case}: {type(error).__name__}: {str(error).splitlines()[0]}. It is given "
                "the names of files, as the pipeline is: begin with the transform that loads them."
            ) from error
        label = rest[0] if rest else None
        dims = self.dataset.spatial_dims
        # TorchIO holds a flat picture as a volume of one slice.
        if image.array.ndim not in {dims + 1, 4}:
            raise BadInputError(
                f"preprocess: expected images of shape (C, {'H, W' if dims == 2 else 'H, W, D'}), got "
                f"{image.array.shape} of {case.case}. Put channels first."
            )
        if label is not None and label.array.shape[-(image.array.ndim - 1) :] != image.array.shape[1:]:
            raise BadInputError(
                f"preprocess: expected image and label of one shape, got {image.array.shape} and {label.array.shape} "
                f"of {case.case}. Apply it to both keys."
            )
        if not np.isfinite(image.array).all():
            raise BadInputError(f"preprocess: expected finite intensities, got NaN or infinite ones of {case.case}.")
        return image, label

    def probe(self, case: Case) -> list[str]:
        """Tell what a scan becomes, which must be the same when it is asked for again.

        Args:
            case: One of the bank's cases.

        Returns:
            Digest of each array, with its affine.

        Raises:
            BadInputError: If two runs differ.
        """
        first, second = (
            [sha256_array(part.array) + str(part.affine) for part in self(case) if part is not None] for _ in range(2)
        )
        if first != second:
            raise BadInputError(
                f"preprocess: expected the same result each time, got two that differ for {case.case}. Leave random "
                "transforms out of it."
            )
        return first


def _flat(transform: Any) -> Iterator[Any]:
    """The transforms of a chain, also of one within another; a chain itself counts as random in MONAI."""
    if type(transform) is Compose:  # those derived from it choose at random
        for each in transform.transforms:
            yield from _flat(each)
    else:
        yield transform


def pack(path: Path, pairs: Sequence[tuple[Case, SampleRecord]], prepare: Prepare) -> tuple[BankItem, ...]:
    """Write all pairs one after another, and the index of them at the end.

    Args:
        path: The file; it is whole or absent.
        pairs: Cases with their records.
        prepare: What they go through.

    Returns:
        The index.

    Raises:
        BadInputError: If a pair cannot be used, or differs from the others in channels, axes, orientation or spacing.
    """
    items: list[BankItem] = []
    name, common = str(prepare.dataset.root), None
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for case, record in tqdm(pairs, desc="pack bank", unit="scan", disable=len(pairs) < 100):
            item = _pack_one(file, case, record, prepare)
            items.append(item)
            if common is not None:
                check_bank(item.facts, case.case, common, name)
            if common is None or common.spacing is None:
                common = item.facts
            if item.label_channels != items[0].label_channels:
                raise BadInputError(
                    f"{name}: expected labels of one number of channels, got {item.label_channels} of {case.case} and "
                    f"{items[0].label_channels} of {items[0].case}. Make them alike in preprocess=."
                )
        index = json.dumps([asdict(item) for item in items]).encode()
        file.write(index + len(index).to_bytes(_TAIL, "little"))
    return tuple(items)


def _pack_one(file: BinaryIO, case: Case, record: SampleRecord, prepare: Prepare) -> BankItem:
    stored = load_case(case, prepare.dataset)
    image, label = prepare(case)
    facts = measure(image.array, image.affine)
    if not stored.grid.known:
        facts = replace(facts, spacing=None, orientation=None)
    channels = 0 if label is None else label_channels(label.array.shape, image.array.shape)
    root = prepare.dataset.root
    return BankItem(
        case=case.case,
        image_file=case.images[0].relative_to(root).as_posix(),
        label_file="" if label is None or case.label is None else case.label.relative_to(root).as_posix(),
        made_from=str(record.label.get("file") or ""),
        made_from_sha256=str(record.label.get("sha256") or ""),
        columns=dict(case.meta),
        classes=() if label is None else label_values(label.array, channels),
        label_channels=channels,
        facts=facts,
        image=_write(file, image),
        label=None if label is None else _write(file, label),
    )


def _write(file: BinaryIO, carried: Carried) -> Packed:
    file.write(bytes(-file.tell() % 8))  # numpy wants aligned addresses
    array = _smallest(carried.array)
    affine, original = (
        None if each is None else each.astype(float).tolist() for each in (carried.affine, carried.original_affine)
    )
    packed = Packed(
        offset=file.tell(),
        shape=array.shape,
        dtype=array.dtype.name,
        low=float(array.min()),
        high=float(array.max()),
        affine=affine,
        space=carried.space,
        original_affine=original,
        spatial_shape=carried.spatial_shape,
    )
    file.write(np.ascontiguousarray(array).tobytes())
    return packed


def _smallest(array: np.ndarray) -> np.ndarray:
    low, high = array.min(), array.max()
    for name in _WHOLE:
        limits = np.iinfo(name)
        if limits.min <= low and high <= limits.max and np.array_equal(whole := array.astype(name), array):
            return whole
    return array.astype(np.float32)


def read_index(path: Path) -> tuple[BankItem, ...] | None:
    """Read the index of a packed file.

    Args:
        path: The file.

    Returns:
        The index; None where there is none that can be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(-_TAIL, os.SEEK_END)
            length = int.from_bytes(file.read(_TAIL), "little")
            file.seek(-_TAIL - length, os.SEEK_END)
            return tuple(_item(values) for values in json.loads(file.read(length)))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _item(values: dict[str, Any]) -> BankItem:
    facts = {key: tuple(each) if isinstance(each, list) else each for key, each in values["facts"].items()}
    parts = {name: _packed(values[name]) for name in ("image", "label")}
    return BankItem(**{**values, **parts, "facts": Facts(**facts), "classes": tuple(values["classes"])})


def _packed(values: dict[str, Any] | None) -> Any:
    if values is None:
        return None
    shapes = {key: values[key] and tuple(values[key]) for key in ("shape", "spatial_shape")}
    return Packed(**{**values, **shapes})
