"""A folder of synthetic pairs as a training loop draws from it: checked once, packed into one memory-mapped file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from medgen.data.case import Case, Dataset
from medgen.data.dataset import read_dataset
from medgen.provenance import MANIFEST, SampleRecord, read_manifest, require_accepted, sha256_file
from medgen.transforms.carriers import Carried
from medgen.transforms.packing import BankItem, Packed, Prepare, Preprocess, pack, read_index
from medgen.types import BadInputError

_FORMAT = 2


class SyntheticBank:
    """Scans that ``medgen synthesize`` or ``medgen filter`` wrote, in the state that a training loop needs.

    Everything is checked at construction. All pairs then lie in one file that is memory-mapped, shared by the workers
    of a loader, and reopened where the bank is unpickled. Drawing from it needs no more memory than one pair.

    Args:
        folder: Output of ``medgen synthesize`` or ``medgen filter``, with its manifest.
        image_key: Key of the image in the dictionaries of the pipeline.
        label_key: Key of the label map; None for a bank of images alone.
        preprocess: What real scans go through before they may be replaced, from the loading of their files on: a
            callable on a dictionary, or a list of transforms. It gets the names of the files, ``{image_key: file or
            list of one file per channel, label_key: file}``, and gives arrays with channels first. It is applied once
            and must not be random. Where it gives arrays without an affine, nothing tells how their axes lie, so let
            it bring them into one order and size. By default scans are loaded as they are stored, by MONAI's
            ``LoadImaged`` with channels first.
        cache_dir: Folder that keeps the packed file for the next start. It is used again where the manifest, the files
            and what `preprocess` makes of the first, the middle and the last scan are the same. By default it lies in
            the folder for temporary files and goes with the bank.

    Attributes:
        folder: As given.
        items: One per scan, in the order of the manifest.
        class_names: Label value to name, as the folder declares them.
        preprocessed: Whether `preprocess` was given.

    Raises:
        BadInputError: If the folder is no such output or empty, or holds rejected pairs; the manifest is damaged; a
            file is missing or altered; scans differ, after `preprocess`, in channels, orientation or voxel size; a
            label has a value that is not declared; or `preprocess` is random or does not give what is expected.
    """

    folder: Path
    items: tuple[BankItem, ...]
    class_names: dict[int, str]
    preprocessed: bool

    def __init__(
        self,
        folder: str | Path,
        *,
        image_key: str = "image",
        label_key: str | None = "label",
        preprocess: Preprocess | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.preprocessed = preprocess is not None
        self._keys = (image_key, label_key)
        dataset, pairs = _read_folder(self.folder, labelled=label_key is not None)
        self.class_names = dataset.class_names
        prepare = Prepare(dataset, image_key, label_key, preprocess)
        probes = [digest for index in (0, len(pairs) // 2, -1) for digest in prepare.probe(pairs[index][0])]
        facts = [[record.files, record.label, case.meta] for case, record in pairs]
        identity = json.dumps([_FORMAT, self.folder.name, self.class_names, facts, probes], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()
        if cache_dir is None:
            home = Path(tempfile.mkdtemp(prefix="medgen_bank_"))
            weakref.finalize(self, _remove, home, os.getpid())
        else:
            home = Path(cache_dir)
            home.mkdir(parents=True, exist_ok=True)
        self._path = home / f"{digest[:32]}.bank"
        self._bytes: np.memmap | None = None
        items = read_index(self._path)
        self.items = pack(self._path, pairs, prepare) if items is None else items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Carried, Carried | None]:
        """Image and label of a scan, label None where the bank has none; their arrays are read-only views."""
        item = self.items[index]
        label = None if item.label is None else self._read(item.label, item.label_file)
        return self._read(item.image, item.image_file), label

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bytes": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SyntheticBank:
        return self  # nothing in it changes, and a copy would not keep the file alive

    @property
    def keys(self) -> tuple[str, str | None]:
        """Keys of image and label that it was made for."""
        return self._keys

    def _read(self, packed: Packed, file: str) -> Carried:
        if self._bytes is None:
            self._bytes = np.memmap(self._path, np.uint8, "r")
        array: np.ndarray = np.ndarray(packed.shape, packed.dtype, self._bytes, packed.offset)
        affine, original = (
            None if each is None else np.array(each) for each in (packed.affine, packed.original_affine)
        )
        return Carried(array, affine, str(self.folder / file), packed.space, original, packed.spatial_shape)


def _read_folder(folder: Path, *, labelled: bool) -> tuple[Dataset, list[tuple[Case, SampleRecord]]]:
    """The cases and their records, each file held to its digest."""
    if not (folder / MANIFEST).is_file():
        raise BadInputError(
            f"{folder}: expected a bank of synthetic scans with {MANIFEST}, got "
            f"{'none' if folder.exists() else 'no such folder'}. Name the output of `medgen synthesize` or "
            "`medgen filter`."
        )
    records = read_manifest(folder / MANIFEST)
    if not records:
        raise BadInputError(f"{folder / MANIFEST}: expected at least one scan, got an empty bank. Make some scans.")
    dataset = read_dataset(folder)
    cases = {case.case: case for case in dataset.cases}
    unknown = sorted(cases.keys() - {record.case for record in records})
    if unknown:
        raise BadInputError(
            f"{folder / MANIFEST}: expected a record of every scan, got none of {unknown[0]} ({len(unknown)} such). "
            "Restore the manifest, or remove these scans."
        )
    require_accepted(folder, records)
    for record in records:
        for name, digest in record.files.items():
            if not (folder / name).is_file():
                raise BadInputError(
                    f"{folder / name}: expected the file that {MANIFEST} lists for {record.case}, got none. Restore "
                    "it, or make the bank again."
                )
            if sha256_file(folder / name) != digest:
                raise BadInputError(
                    f"{folder / name}: expected the file that {MANIFEST} lists for {record.case} (SHA-256 "
                    f"{digest[:12]}…), got another. Restore it, or make the bank again."
                )
        if record.case not in cases:
            raise BadInputError(
                f"{folder}: expected a scan for each line of {MANIFEST}, got none for {record.case}. Restore its "
                "files, or make the bank again."
            )
        if labelled and cases[record.case].label is None:
            raise BadInputError(
                f"{folder}: expected a label map for every scan, got none for {record.case}. Pass label_key=None to "
                "replace images alone, or make a bank with labels."
            )
    return dataset, [(cases[record.case], record) for record in records]


def _remove(home: Path, owner: int) -> None:
    """A forked worker inherits this call, and must not take the file from the others."""
    if os.getpid() == owner:
        shutil.rmtree(home, ignore_errors=True)
