from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medgen.generator import Generator
from medgen.provenance import read_manifest
from medgen.synthesis import synthesize
from medgen.types import BadInputError

FAST = {"num_inference_steps": 3, "device": "cpu"}


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(nib.load(path).dataobj) for path in sorted(folder.glob("*Tr/*.nii.gz"))}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_replay_gives_the_same_voxels(
    model_3d: Path, tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), num_samples=5, batch_size=3, precision=precision, **FAST)
    synthesize(tmp_path / "b", model=str(model_3d), replay=tmp_path / "a" / "manifest.jsonl")
    first, again = images(tmp_path / "a"), images(tmp_path / "b")
    assert len(first) == 10
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert "5 of 5 equal the replayed manifest voxel for voxel" in capsys.readouterr().out


def test_one_line_of_a_manifest_can_be_replayed_alone(model_3d: Path, labels_3d: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), labels=labels_3d, num_samples=4, batch_size=4, **FAST)
    line = (tmp_path / "a" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[3]
    (tmp_path / "one.jsonl").write_text(line + "\n", encoding="utf-8")
    records = synthesize(tmp_path / "b", model=str(model_3d), labels=labels_3d, replay=tmp_path / "one.jsonl")
    assert [record.case for record in records] == ["synthetic_00003"]
    first, again = images(tmp_path / "a"), images(tmp_path / "b")
    assert len(again) == 2
    assert all(np.array_equal(first[name], again[name]) for name in again)


def test_deformed_labels_are_replayed_too_even_from_a_moved_folder(
    model_3d: Path, labels_3d: Path, tmp_path: Path
) -> None:
    for path in labels_3d.glob("case_[12]*"):
        path.unlink()
    array = np.zeros((24, 24, 20), dtype=np.uint8)
    array[6:12, 6:18, 5:15], array[12:18, 6:18, 5:15] = 1, 2
    nib.save(nib.Nifti1Image(array, np.eye(4)), labels_3d / "case_0.nii.gz")
    synthesize(tmp_path / "a", model=str(model_3d), labels=labels_3d, label_source="deform", num_samples=2, **FAST)
    moved = tmp_path / "elsewhere"
    shutil.move(labels_3d, moved)
    manifest = tmp_path / "a" / "manifest.jsonl"
    again = {"model": str(model_3d), "replay": manifest}
    with pytest.raises(BadInputError, match=r"expected the folder of its label maps \(case_0\.nii\.gz, .*--labels"):
        synthesize(tmp_path / "b", **again)
    with pytest.raises(BadInputError, match=r"case_0\.nii\.gz: expected the label map that .*, got no such file"):
        synthesize(tmp_path / "b", **again, labels=labels_3d)
    synthesize(tmp_path / "b", **again, labels=moved)
    first, again = images(tmp_path / "a"), images(tmp_path / "b")
    assert not np.array_equal(first["synthetic_00000.nii.gz"], array)
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_the_recorded_number_of_threads_is_restored_for_the_replay_only(model_3d: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        synthesize(tmp_path / "a", model=str(model_3d), num_samples=1, **FAST)
    finally:
        torch.set_num_threads(before)
    records = synthesize(tmp_path / "b", model=str(model_3d), replay=tmp_path / "a" / "manifest.jsonl")
    assert records[0].runtime["threads"] == 2
    assert torch.get_num_threads() == before


def test_a_changed_label_map_or_model_is_refused(
    model_3d: Path, labels_3d: Path, tmp_path: Path, make_generator: Callable[..., Generator]
) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), labels=labels_3d, **FAST)
    manifest = tmp_path / "a" / "manifest.jsonl"
    other = make_generator(3)
    with torch.no_grad():
        next(other.denoiser.parameters()).add_(0.1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        BadInputError, match=r"expected the model with SHA-256 .* Name the model that made the manifest"
    ):
        synthesize(tmp_path / "b", replay=manifest, labels=labels_3d, model=str(tmp_path / "other"))
    with pytest.raises(BadInputError, match=r"expected its model 'tiny-3d' by that name, got none .* with --model"):
        synthesize(tmp_path / "b", replay=manifest, labels=labels_3d)
    label = nib.load(labels_3d / "case_0.nii.gz")
    nib.save(nib.Nifti1Image(np.flip(label.dataobj, 0), label.affine), labels_3d / "case_0.nii.gz")
    with pytest.raises(BadInputError, match=r"case_0\.nii\.gz: expected the label map .* got another"):
        synthesize(tmp_path / "b", replay=manifest, labels=labels_3d, model=str(model_3d))
    assert not (tmp_path / "b").exists()


def test_a_manifest_of_another_version_is_one_clear_error(model_3d: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), num_samples=1, **FAST)
    line = (tmp_path / "a" / "manifest.jsonl").read_text(encoding="utf-8").replace('"file"', '"path"')
    (tmp_path / "old.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(BadInputError, match=r"old\.jsonl: expected 'file' in the record of synthetic_00000, got none"):
        synthesize(tmp_path / "b", model=str(model_3d), replay=tmp_path / "old.jsonl")


def test_a_replay_that_differs_says_so(model_3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), num_samples=2, **FAST)
    lines = (tmp_path / "a" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [
        {**json.loads(line), "image_sha256": "0" * 64} if at == 1 else json.loads(line) for at, line in enumerate(lines)
    ]
    for line in changed:
        line["runtime"]["versions"]["torch"] = "1.0"
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed), encoding="utf-8")
    synthesize(tmp_path / "b", model=str(model_3d), replay=tmp_path / "m.jsonl")
    said = capsys.readouterr().out
    assert "WARNING: only 1 of 2 equal the replayed manifest voxel for voxel; different: synthetic_00001" in said
    assert "'torch': '1.0'" in said
    assert "WARNING: only 1 of 2" in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")


def test_arguments_that_the_manifest_fixes_are_refused(model_3d: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), num_samples=1, **FAST)
    with pytest.raises(BadInputError, match="num_inference_steps: expected none beside replay"):
        synthesize(tmp_path / "b", replay=tmp_path / "a" / "manifest.jsonl", num_inference_steps=50)


def test_a_manifest_alone_downloads_nothing(model_3d: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = synthesize(tmp_path / "a", model=str(model_3d), num_samples=1, **FAST)[0]
    (tmp_path / "m.jsonl").write_text(
        json.dumps({**json.loads(record.to_json()), "model": "owner/name"}) + "\n", encoding="utf-8"
    )
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or model_3d)
    with pytest.raises(BadInputError, match=r"m\.jsonl: expected its model 'owner/name' to be named, .* Give --model"):
        synthesize(tmp_path / "b", replay=tmp_path / "m.jsonl")
    assert not asked
    synthesize(tmp_path / "b", replay=tmp_path / "m.jsonl", model="owner/name")
    assert asked == ["owner/name"]


def test_an_empty_or_mixed_manifest_is_refused(model_3d: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInputError, match=r"empty\.jsonl: expected at least one sample, got none"):
        synthesize(tmp_path / "b", replay=tmp_path / "empty.jsonl")
    synthesize(tmp_path / "a", model=str(model_3d), num_samples=1, **FAST)
    record = read_manifest(tmp_path / "a" / "manifest.jsonl")[0]
    lines = [record.to_json(), record.to_json().replace(record.model_hash, "f" * 64)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(BadInputError, match=r"mixed\.jsonl: expected samples of one model, got 2 different"):
        synthesize(tmp_path / "b", replay=tmp_path / "mixed.jsonl")


def test_a_replay_without_an_output_goes_beside_the_run(model_3d: Path, labels_3d: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "a", model=str(model_3d), labels=labels_3d, num_samples=1, num_inference_steps=2)
    records = synthesize(replay=tmp_path / "a" / "manifest.jsonl", model=str(model_3d), labels=labels_3d)
    assert (tmp_path / "a_replay" / "manifest.jsonl").exists()
    assert len(records) == 1


def test_no_output_and_nothing_to_replay_is_refused() -> None:
    with pytest.raises(BadInputError, match=r"output: expected a folder to write to, got none\. Give --output FOLDER"):
        synthesize()
