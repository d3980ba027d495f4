from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medgen.data.export import prepare_output, write_case, write_dataset_json, write_metadata
from medgen.provenance import SampleRecord, append_record, sha256_array, sha256_file
from medgen.types import Grid

CLASSES = {0: "background", 1: "head", 2: "tail"}
SIZES = {2: (12, 10), 3: (9, 8, 7)}
_RECORD = SampleRecord(
    case="",
    index=0,
    seed=0,
    model="none",
    model_hash="0",
    sampler="euler",
    sampler_spacing="default",
    num_inference_steps=1,
    guidance_scale=1.0,
    temperature=1.0,
    precision="fp32",
    max_memory_gb=None,
    label={"source": "generate"},
    batch=[],
    shape=[],
    spacing=[],
    model_shape=[],
    image_sha256="",
    label_sha256="",
    files={},
    runtime={},
)


def pair(seed: int, dims: int, channels: int = 1, classes: Sequence[int] = (1, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole intensities from about 100 to 400 on a label of two bars; the seed sets their place and the noise."""
    rng = np.random.default_rng(seed)
    size = SIZES[dims]
    label = np.zeros(size, dtype=np.int16)
    for value in classes:
        label[2 * value : 2 * value + 2, 1 + seed % 4 : 5 + seed % 4] = value
    image = 100 + 150 * label + rng.integers(0, 20, (channels, *size))
    return torch.from_numpy(image).float(), torch.from_numpy(label)


@pytest.fixture
def make_pair() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return pair


@pytest.fixture
def make_bank() -> Callable[..., Path]:
    """Writes a bank as `medgen synthesize` does, of pairs that need no model."""

    def make(
        folder: Path,
        *,
        count: int = 4,
        dims: int = 3,
        channels: int = 1,
        spacing: float = 1.0,
        made_from: Sequence[Path] = (),
        classes: Sequence[Sequence[int]] = ((1, 2),),
        columns: Sequence[Mapping[str, str]] = (),
        labelled: bool = True,
    ) -> Path:
        prepare_output(folder, {"model_hash": "0"})
        ending = ".png" if dims == 2 else ".nii.gz"
        affine = np.diag([spacing] * 3 + [1.0])
        rows = []
        for index in range(count):
            image, label = pair(1000 + index, dims, channels, classes[index % len(classes)])
            grid = Grid(tuple(label.shape), affine, known=dims == 3)
            case = f"synthetic_{index:05d}"
            paths = write_case(
                folder,
                case,
                image,
                label if labelled else None,
                grid,
                image_dtype="uint16" if dims == 2 else "int16",
            )
            record = replace(
                _RECORD,
                case=case,
                index=index,
                files={path.relative_to(folder).as_posix(): sha256_file(path) for path in paths.files},
                label_sha256=sha256_array(label.numpy()) if labelled else None,
            )
            if made_from:
                source = made_from[index % len(made_from)]
                record = replace(record, label={"source": "files", "file": source.name, "sha256": sha256_file(source)})
            append_record(folder / "manifest.jsonl", record)
            images = ";".join(path.relative_to(folder).as_posix() for path in paths.images)
            row = {"id": case, "file_name": images}
            row |= {"label": f"labelsTr/{case}{ending}"} if labelled else {}
            rows.append(row | (dict(columns[index % len(columns)]) if columns else {}))
        if columns or not labelled:
            write_metadata(folder, rows, class_names=None if labelled else CLASSES)
        if labelled:
            names = {index: f"MR{index}" for index in range(channels)}
            write_dataset_json(folder, class_names=CLASSES, channel_names=names, num_training=count, ending=ending)
        else:
            (folder / "labelsTr").rmdir()
        return folder

    return make


@pytest.fixture
def real_files(tmp_path: Path) -> list[dict[str, str]]:
    """Six labelled volumes as a pipeline lists them; intensities are those of the bank plus a part of a unit."""
    files = []
    for index in range(6):
        image, label = pair(index, 3)
        files.append({})
        for key, array in (("image", image[0].numpy() + 0.5), ("label", label.numpy().astype(np.uint8))):
            path = tmp_path / "real" / key / f"case_{index}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
            files[-1][key] = str(path)
    return files
