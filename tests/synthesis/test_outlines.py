"""Label maps that steer by their outlines do what these do as edge maps, down to the smallest lesion, and are kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.segmentation import find_boundaries

from medgen.conditions.edge import EdgeSettings
from medgen.data.io import read_image, read_label, write_image, write_label
from medgen.generator import Generator
from medgen.synthesis import SampleSpec, SamplingSettings, SourceFile, iter_samples, synthesize
from medgen.synthesis.labels import prepare
from medgen.types import BadInputError, Grid

FAST = {"num_inference_steps": 2, "precision": "fp32", "device": "cpu", "batch_size": 2}


def _write(folder: Path, name: str, label: torch.Tensor) -> Path:
    """A label map; in 3D not in the model's orientation."""
    dims = label.ndim
    grid = Grid(tuple(label.shape), np.diag([-1.0, 1.0, 1.0, 1.0]) if dims == 3 else np.eye(4), known=dims == 3)
    ending = "png" if dims == 2 else "nii.gz"
    for kind in ("labels", "maps"):
        (folder / kind).mkdir(exist_ok=True)
    write_label(folder / "labels" / f"{name}.{ending}", label.to(torch.int16), grid)
    outlines = torch.from_numpy(find_boundaries(label.numpy(), connectivity=1, mode="inner"))
    full = 255 if dims == 2 else 1
    write_image(folder / "maps" / f"{name}.{ending}", (full * outlines[None]).float(), grid, dtype="uint8")
    return folder / "labels" / f"{name}.{ending}"


def blob_maps(folder: Path, dims: int) -> dict[str, Path]:
    """Label maps of one class, and their outlines by another library."""
    shape = (12, 10) if dims == 2 else (11, 9, 10)
    for index in range(2):
        label = torch.zeros(shape, dtype=torch.int16)
        label[(slice(2 + index, 8 + index), *[slice(2, 7)] * (dims - 1))] = 1
        _write(folder, f"case_{index}", label)
    return {"labels": folder / "labels", "edge_maps": folder / "maps"}


def voxels(folder: Path, name: str = "imagesTr") -> list[torch.Tensor]:
    read = read_image if name == "imagesTr" else read_label
    return [read(path)[0] for path in sorted((folder / name).iterdir())]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("conditions", [("edge",), ("mask", "edge", "view")])
@pytest.mark.parametrize("dims", [2, 3])
def test_outlines_are_the_edges_that_another_library_draws(tmp_path, make_generator, dims, conditions, guidance):
    make_generator(dims, conditions=conditions, label=False).save_pretrained(tmp_path / "model")
    maps, given = blob_maps(tmp_path, dims), {"model": str(tmp_path / "model"), "guidance_scale": guidance, **FAST}
    records = synthesize(tmp_path / "a", labels=maps["labels"], label_outlines=True, **given)
    synthesize(tmp_path / "b", edge_maps=maps["edge_maps"], label_source="none", **given)
    assert all(map(torch.equal, voxels(tmp_path / "a"), voxels(tmp_path / "b")))
    for made, file in zip(voxels(tmp_path / "a", "labelsTr"), sorted(maps["labels"].iterdir()), strict=True):
        assert torch.equal(made, read_label(file)[0])
    assert [record.conditions for record in records] == [{"label_outlines": True}] * 2
    assert "| Steered by | outlines of the label map (2) |" in (tmp_path / "a" / "README.md").read_text()
    if "mask" in conditions:
        synthesize(tmp_path / "c", labels=maps["labels"], **given)
        assert not torch.equal(voxels(tmp_path / "c")[0], voxels(tmp_path / "a")[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_the_smallest_lesion_steers(tmp_path: Path, make_generator: Callable[..., Generator], dims: int) -> None:
    make_generator(dims, conditions=("edge",), label=False).save_pretrained(tmp_path / "model")
    organ = torch.zeros((24,) * dims, dtype=torch.int16)
    organ[(slice(2, 22),) * dims] = 1
    lesion = organ.clone()
    lesion[(slice(11, 12),) * dims] = 2
    images = []
    for name, label in (("organ", organ), ("lesion", lesion)):
        (tmp_path / name).mkdir()
        _write(tmp_path / name, "case", label)
        labels = tmp_path / name / "labels"
        synthesize(tmp_path / name / "out", model=str(tmp_path / "model"), labels=labels, label_outlines=True, **FAST)
        images += voxels(tmp_path / name / "out")
    assert not torch.equal(*images)


def test_classes_that_touch_are_parted_and_the_rim_of_a_scan_is_none(tmp_path, make_generator):
    generator = make_generator(2, conditions=("edge",), label=False)
    label = torch.zeros(6, 20, dtype=torch.int16)  # padded to 8 x 20 voxels
    label[:, 4:9], label[:, 9:14] = 1, 2
    spec = SampleSpec("a", 0, 0, "files", SourceFile(_write(tmp_path, "case", label), "0"), outlines=True)
    item = prepare(spec, generator)
    assert item.edge is not None and item.placement.shape == (8, 20)
    rows = item.edge[0].any(1).nonzero()[:, 0]
    assert len(rows) == 6 and item.edge[0].sum(1).unique().tolist() == [0, 3]
    assert item.edge[0][rows[0]].nonzero()[:, 0].tolist() == [4, 9, 13]


def test_outlines_follow_deformed_maps_and_replay(tmp_path: Path, make_generator: Callable[..., Generator]) -> None:
    make_generator(2, conditions=("edge", "text"), label=False).save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "labels": blob_maps(tmp_path, 2)["labels"]}
    synthesize(tmp_path / "a", **given, label_outlines=True, label_source="deform", prompts="effusion", **FAST)
    deformed = voxels(tmp_path / "a", "labelsTr")
    assert not torch.equal(deformed[0], read_label(given["labels"] / "case_0.png")[0])
    (tmp_path / "again").mkdir()
    for index, label in enumerate(deformed):
        _write(tmp_path / "again", f"case_{index}", label)
    again = {"model": given["model"], "edge_maps": tmp_path / "again" / "maps", "label_source": "none"}
    synthesize(tmp_path / "b", **again, prompts="effusion", **FAST)
    synthesize(tmp_path / "c", **given, replay=tmp_path / "a" / "manifest.jsonl")
    for other in ("b", "c"):
        assert all(map(torch.equal, voxels(tmp_path / "a"), voxels(tmp_path / other)))


@pytest.mark.parametrize("dims", [2, 3])
def test_outlines_steer_how_a_scan_is_changed(tmp_path, make_generator, dims):
    make_generator(dims, conditions=("edge",), label=False).save_pretrained(tmp_path / "model")
    maps = blob_maps(tmp_path, dims)
    (tmp_path / "scans").mkdir()
    for file in maps["labels"].iterdir():
        label, grid = read_label(file)
        scan = torch.rand(1, *label.shape, generator=torch.Generator().manual_seed(0)) * 200
        write_image(tmp_path / "scans" / file.name, scan, grid, dtype="uint8")
    given = {"model": str(tmp_path / "model"), "sources": tmp_path / "scans", "strength": 0.7, **FAST}
    synthesize(tmp_path / "a", labels=maps["labels"], label_outlines=True, **given)
    synthesize(tmp_path / "b", edge_maps=maps["edge_maps"], **given)
    synthesize(tmp_path / "c", **given)
    assert all(map(torch.equal, voxels(tmp_path / "a"), voxels(tmp_path / "b")))
    assert not torch.equal(voxels(tmp_path / "a")[0], voxels(tmp_path / "c")[0])


def test_rows_of_a_table_with_a_label_map(tmp_path: Path, make_generator: Callable[..., Generator]) -> None:
    make_generator(2, conditions=("edge", "text"), label=False).save_pretrained(tmp_path / "model")
    maps, model = blob_maps(tmp_path, 2), str(tmp_path / "model")
    (tmp_path / "rows.csv").write_text("label,text\nlabels/case_0.png,effusion\n,effusion\n")
    records = synthesize(tmp_path / "a", model=model, conditions=tmp_path / "rows.csv", label_outlines=True, **FAST)
    assert ["label_outlines" in record.conditions for record in records] == [True, False]
    synthesize(tmp_path / "b", model=model, edge_maps=maps["edge_maps"], prompts="effusion", **FAST)
    assert torch.equal(voxels(tmp_path / "a")[0], voxels(tmp_path / "b")[0])
    (tmp_path / "rows.csv").write_text("label,edge_map\nlabels/case_0.png,maps/case_0.png\n")
    with pytest.raises(BadInputError, match="no edges but theirs, got other edges too"):
        synthesize(tmp_path / "c", model=model, conditions=tmp_path / "rows.csv", label_outlines=True, **FAST)


def test_what_has_no_outlines_is_refused(tmp_path: Path, make_generator: Callable[..., Generator]) -> None:
    make_generator(2, conditions=("mask", "edge"), label=False).save_pretrained(tmp_path / "model")
    make_generator(2, conditions=("mask",), label=False).save_pretrained(tmp_path / "masks")
    soft = make_generator(2, conditions=("edge",), label=False, edge=EdgeSettings(method="sobel"))
    soft.save_pretrained(tmp_path / "soft")
    maps, out = blob_maps(tmp_path, 2), tmp_path / "out"
    with pytest.raises(BadInputError, match="expected label maps from files, and no edges but theirs, got none"):
        synthesize(out, model=str(tmp_path / "model"), label_outlines=True, **FAST)
    with pytest.raises(BadInputError, match="got other edges too"):
        synthesize(out, model=str(tmp_path / "model"), **maps, label_outlines=True, **FAST)
    with pytest.raises(BadInputError, match=r"label_outlines: expected none.* steered by mask; not by edge"):
        synthesize(out, model=str(tmp_path / "masks"), labels=maps["labels"], label_outlines=True, **FAST)
    with pytest.raises(BadInputError, match="label_outlines: expected a model of Canny's edges, got sobel"):
        synthesize(out, model=str(tmp_path / "soft"), labels=maps["labels"], label_outlines=True, **FAST)
    file = SourceFile(maps["labels"] / "case_0.png", "0")
    spec = SampleSpec("a", 0, 0, "files", file, outlines=True)
    with pytest.raises(BadInputError, match="label_outlines: expected none"):
        list(iter_samples(Generator.from_pretrained(tmp_path / "masks"), [spec], SamplingSettings()))
    with pytest.raises(BadInputError, match="expected label maps from files"):
        SampleSpec("a", 0, 0, "generate", outlines=True)
