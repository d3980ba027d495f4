"""Label maps that steer by their outlines do what a picture of theirs does as the source of edges, and are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medgen.data.io import read_image, read_label, write_image, write_label
from medgen.generator import Generator
from medgen.synthesis import SampleSpec, SourceFile, synthesize
from medgen.synthesis.labels import prepare
from medgen.types import BadInputError, Grid

FAST = {"num_inference_steps": 2, "precision": "fp32", "device": "cpu", "batch_size": 2}


def blob_maps(folder: Path, dims: int) -> dict[str, Path]:
    """Label maps of one class, and the same as black and white pictures; in 3D not in the model's orientation."""
    shape, ending = ((12, 10), "png") if dims == 2 else ((11, 9, 10), "nii.gz")
    grid = Grid(shape, np.diag([-1.0, 1.0, 1.0, 1.0]) if dims == 3 else np.eye(4), known=dims == 3)
    for index in range(2):
        label = torch.zeros(shape, dtype=torch.int16)
        label[(slice(2 + index, 7 + index), *[slice(3, 7)] * (dims - 1))] = 1
        for name in ("labels", "pictures"):
            (folder / name).mkdir(exist_ok=True)
        write_label(folder / "labels" / f"case_{index}.{ending}", label, grid)
        write_image(folder / "pictures" / f"case_{index}.{ending}", 200.0 * label[None], grid, dtype="uint8")
    return {"labels": folder / "labels", "edges": folder / "pictures"}


def voxels(folder: Path, name: str) -> list[torch.Tensor]:
    read = read_image if name == "imagesTr" else read_label
    return [read(path)[0] for path in sorted((folder / name).iterdir())]


@pytest.mark.parametrize("conditions", [("edge",), ("mask", "edge", "view")])
@pytest.mark.parametrize("dims", [2, 3])
def test_outlines_are_the_edges_of_a_picture_of_the_label_map(tmp_path, make_generator, dims, conditions):
    make_generator(dims, conditions=conditions, label=False).save_pretrained(tmp_path / "model")
    maps, model = blob_maps(tmp_path, dims), str(tmp_path / "model")
    records = synthesize(tmp_path / "a", model=model, labels=maps["labels"], label_outlines=True, **FAST)
    synthesize(tmp_path / "b", model=model, edges=maps["edges"], label_source="none", **FAST)
    for mine, theirs in zip(voxels(tmp_path / "a", "imagesTr"), voxels(tmp_path / "b", "imagesTr"), strict=True):
        assert torch.equal(mine, theirs)
    for made, file in zip(voxels(tmp_path / "a", "labelsTr"), sorted(maps["labels"].iterdir()), strict=True):
        assert torch.equal(made, read_label(file)[0])
    assert [record.conditions for record in records] == [{"label_outlines": True}] * 2
    assert "label map (2), its outlines alone (2)" in (tmp_path / "a" / "README.md").read_text()
    if "mask" in conditions:
        synthesize(tmp_path / "c", model=model, labels=maps["labels"], **FAST)
        assert not torch.equal(voxels(tmp_path / "c", "imagesTr")[0], voxels(tmp_path / "a", "imagesTr")[0])


def test_classes_that_touch_are_parted(tmp_path: Path, make_generator: Callable[..., Generator]) -> None:
    label = np.zeros((24, 24, 12), dtype=np.uint8)
    label[6:12, 6:18, 3:9], label[12:18, 6:18, 3:9] = 1, 2
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "label.nii.gz")
    spec = SampleSpec("a", 0, 0, "files", SourceFile(tmp_path / "label.nii.gz", "0"), outlines=True)
    item = prepare(spec, make_generator(3, conditions=("edge",), label=False))
    assert item.edge is not None and item.edge.shape == (1, *item.placement.shape)
    edge = item.edge[0, :, :, 6]
    border = [bool(edge[first : first + 2, 9:15].any(0).all()) for first in (5, 11, 17)]
    assert border == [True, True, True]  # head from the ground, from the tail, tail from the ground
    assert not edge[8:10, 10:14].any() and not edge[:4].any() and not edge[20:].any()


def test_outlines_follow_deformed_maps_and_replay(tmp_path: Path, make_generator: Callable[..., Generator]) -> None:
    make_generator(2, conditions=("edge", "text"), label=False).save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "labels": blob_maps(tmp_path, 2)["labels"]}
    synthesize(tmp_path / "a", **given, label_outlines=True, label_source="deform", prompts="effusion", **FAST)
    deformed = voxels(tmp_path / "a", "labelsTr")
    assert not torch.equal(deformed[0], read_label(given["labels"] / "case_0.png")[0])
    again = {"model": given["model"], "edges": tmp_path / "deformed", "label_source": "none", "prompts": "effusion"}
    (tmp_path / "deformed").mkdir()
    for index, label in enumerate(deformed):
        grid = Grid(tuple(label.shape), np.eye(4), known=False)
        write_image(tmp_path / "deformed" / f"{index}.png", 255.0 * label[None], grid, dtype="uint8")
    synthesize(tmp_path / "b", **again, **FAST)
    synthesize(tmp_path / "c", **given, replay=tmp_path / "a" / "manifest.jsonl")
    for other in ("b", "c"):
        assert all(map(torch.equal, voxels(tmp_path / "a", "imagesTr"), voxels(tmp_path / other, "imagesTr")))


def test_what_has_no_outlines_is_refused(tmp_path: Path, make_generator: Callable[..., Generator]) -> None:
    make_generator(2, conditions=("mask", "edge"), label=False).save_pretrained(tmp_path / "model")
    make_generator(2, conditions=("mask",), label=False).save_pretrained(tmp_path / "masks")
    maps, out = blob_maps(tmp_path, 2), tmp_path / "out"
    with pytest.raises(BadInputError, match="expected label maps and no other edges, got 0 label maps"):
        synthesize(out, model=str(tmp_path / "model"), label_outlines=True, **FAST)
    with pytest.raises(BadInputError, match="got 2 label maps and 2 sources of edges"):
        synthesize(out, model=str(tmp_path / "model"), **maps, label_outlines=True, **FAST)
    with pytest.raises(BadInputError, match=r"labels: expected none.* steered by mask; not by edge"):
        synthesize(out, model=str(tmp_path / "masks"), labels=maps["labels"], label_outlines=True, **FAST)
    (tmp_path / "rows.csv").write_text("label\nlabels/case_0.png\n")
    with pytest.raises(BadInputError, match="label_outlines: expected none beside conditions"):
        synthesize(out, model=str(tmp_path / "model"), conditions=tmp_path / "rows.csv", label_outlines=True, **FAST)
    assert not out.exists()
