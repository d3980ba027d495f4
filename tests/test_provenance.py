from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen.provenance import (
    SampleRecord,
    append_record,
    atomic_path,
    finalize_manifest,
    read_manifest,
    runtime_info,
    salvage_manifest,
    sha256_array,
    sha256_file,
    write_bytes,
    write_text,
)
from medgen.types import BadInputError

needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full for a real full disk")


def record(index: int = 0, **changes: object) -> SampleRecord:
    plain = SampleRecord(
        case=f"synthetic_{index:05d}",
        index=index,
        seed=index + 100,
        model="hippocampus-mr-3d",
        model_hash="ab",
        sampler="dpm++2m",
        sampler_spacing="default",
        num_inference_steps=20,
        guidance_scale=2.0,
        temperature=0.9,
        precision="fp32",
        max_memory_gb=None,
        label={"source": "files", "path": "é/label.nii.gz", "sha256": "cd"},
        batch=[{"case": f"synthetic_{index:05d}", "index": index, "seed": index + 100, "label": None}],
        shape=[4, 5, 6],
        spacing=[1.0, 1.0, 2.5],
        model_shape=[8, 8, 8],
        image_sha256="ef",
        label_sha256="01",
        files={"imagesTr/a.nii.gz": "23"},
        runtime={"threads": 1},
    )
    return replace(plain, **changes)


def test_a_record_survives_the_manifest_and_is_marked_synthetic(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    append_record(path, record(0))
    append_record(path, record(1))
    assert read_manifest(path) == [record(0), record(1)]
    assert all(json.loads(line)["synthetic"] is True for line in path.read_text(encoding="utf-8").splitlines())


def test_an_unfinished_last_line_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    append_record(path, record(0))
    with path.open("a") as handle:
        handle.write(record(1).to_json()[:40])
    assert read_manifest(path) == [record(0)]


def test_salvage_drops_torn_lines_so_that_later_ones_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    append_record(path, record(1))
    with path.open("a") as handle:
        handle.write('{"case": "syn')
    assert salvage_manifest(path) == [record(1)]
    append_record(path, record(0))
    assert read_manifest(path) == [record(1), record(0)]


def test_a_damaged_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    append_record(path, record(0))
    with path.open("a") as handle:
        handle.write('{"case": "x"}\n')
    with pytest.raises(
        BadInputError, match=r"manifest\.jsonl: line 2: expected a sample record, got one without index"
    ):
        read_manifest(path)
    with pytest.raises(BadInputError, match=r"absent\.jsonl: expected a readable manifest"):
        read_manifest(tmp_path / "absent.jsonl")


def test_a_record_from_before_temperatures_was_drawn_at_one(tmp_path: Path) -> None:
    values = json.loads(record(0).to_json())
    del values["temperature"]
    assert SampleRecord.from_dict(values).temperature == 1.0


def test_what_steered_a_sample_survives_the_manifest_and_older_records_have_none(tmp_path: Path) -> None:
    steered = record(
        0,
        label={"source": "none"},
        label_sha256=None,
        guidance_scale={"mask": 1.5, "text": 5.0},
        guidance_interval=[0.1, 0.9],
        guidance_rescale=0.5,
        network_evaluations=60,
        conditions={"text": "Röntgen", "edge": [{"file": "a.png", "sha256": "ab"}], "attributes": {"age": "60"}},
    )
    append_record(tmp_path / "manifest.jsonl", steered)
    assert read_manifest(tmp_path / "manifest.jsonl") == [steered]
    values = json.loads(steered.to_json())
    for name in ("conditions", "guidance_interval", "guidance_rescale", "network_evaluations"):
        del values[name]
    older = SampleRecord.from_dict(values)
    assert (older.conditions, older.guidance_interval, older.guidance_rescale) == ({}, [0.0, 1.0], 0.0)
    assert older.network_evaluations is None


def test_the_final_manifest_is_ordered_with_one_line_a_case(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    newer = record(2, seed=7)
    finalize_manifest(path, [record(2), record(0), record(1), newer])
    assert read_manifest(path) == [record(0), record(1), newer]


def test_processes_that_append_at_once_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    program = (
        "import json, sys; from pathlib import Path; from medgen.provenance import SampleRecord, append_record\n"
        "values = json.loads(sys.argv[2])\n"
        "for i in range(int(sys.argv[3]), int(sys.argv[3]) + 50):\n"
        "    append_record(Path(sys.argv[1]), SampleRecord.from_dict(values | {'case': str(i), 'index': i}))\n"
    )
    line = record(0, batch=[{"case": "c" * 50}] * 100).to_json()
    workers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), line, str(start)], env=dict(os.environ))
        for start in (0, 50)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    assert sorted(item.index for item in read_manifest(path)) == list(range(100))


def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "label.nii.gz"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as temporary:
        assert temporary.name.startswith(".")
        temporary.write_text("half")
        raise RuntimeError("stop")
    assert [item.name for item in tmp_path.iterdir()] == ["label.nii.gz"]
    assert target.read_text() == "old"


def test_a_written_file_is_never_seen_half_done(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_bytes(path, b"old")
    with open(path, "rb") as reader:
        write_bytes(path, b"new content")
        assert reader.read() == b"old"  # the open file is another one: it was replaced, not written over
    assert path.read_bytes() == b"new content"
    assert len(list(tmp_path.iterdir())) == 1


@needs_full_device
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "image.nii.gz"
    with (
        pytest.raises(BadInputError, match=r"image\.nii\.gz: expected free disk space"),
        atomic_path(target) as temporary,
    ):
        temporary.write_bytes(b"part")
        Path("/dev/full").write_bytes(b"rest")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInputError, match="expected free disk space"):
        append_record(Path("/dev/full"), record(0))


def test_file_hash_is_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_array_hash_tells_type_shape_and_value_but_not_layout() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert sha256_array(array) == hashlib.sha256(b"<i2(2, 3)" + array.tobytes()).hexdigest()
    assert sha256_array(array) == sha256_array(np.asfortranarray(array)) == sha256_array(array.astype(">i2"))
    assert sha256_array(array) == sha256_array(torch.from_numpy(array))
    others = [array.reshape(3, 2), array.astype(np.int32), array + 1]
    assert len({sha256_array(item) for item in [array, *others]}) == 4


def test_runtime_names_what_decides_rounding() -> None:
    info = runtime_info(torch.device("cpu"))
    assert info["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    json.dumps(info)
