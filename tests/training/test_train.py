"""`medgen train` on small real files: whole runs, kills, several processes, and what the loop promises."""

import itertools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medgen.generator import Generator
from medgen.planning import write_plan
from medgen.training import train
from medgen.training.loop import learning_rate, sample_index
from medgen.types import BadInputError


def blob(shape, rng):
    """A bright ball in noise, and its label."""
    center = [length / 2 + rng.uniform(-2, 2) for length in shape]
    axes = np.meshgrid(*map(np.arange, shape), indexing="ij")
    label = sum((axis - middle) ** 2 for axis, middle in zip(axes, center, strict=True)) < 16
    return (rng.normal(100, 10, shape) + 80 * label).clip(1, 250), label.astype(np.uint8)


def make_folder(folder: Path, spatial_dims: int, count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    rows = ["id,image,label,split"]
    for index in range(count):
        shape = (16, 14, 12) if spatial_dims == 3 else (16, 16)
        image, label = blob(shape, rng)
        ending = "nii.gz" if spatial_dims == 3 else "png"
        for name, array in (("images", image), ("labels", label)):
            path = folder / name / f"case_{index}.{ending}"
            if spatial_dims == 3:
                nib.save(nib.Nifti1Image(array.astype(np.float32 if name == "images" else np.uint8), np.eye(4)), path)
            else:
                Image.fromarray(array.astype(np.uint8)).save(path)
        split = "train" if index < count - 2 else "val"
        rows.append(f"case_{index},images/case_{index}.{ending},labels/case_{index}.{ending},{split}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def losses(folder: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "logs" / f"{stage}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def launch(data: Path, output: Path, plan: Path, *, processes: int = 1) -> list[str]:
    arguments = ["train", "--data", str(data), "--output", str(output), "--config", str(plan), "--device", "cpu"]
    if processes == 1:
        return [sys.executable, "-m", "medgen", *arguments]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes)]
    return [
        *start,
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "medgen",
        *arguments,
    ]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_folder_becomes_a_model_with_logs_and_pictures(tmp_path, spatial_dims, tiny_plan):
    output = train(make_folder(tmp_path / "data", spatial_dims), tmp_path / "run", plan=tiny_plan(spatial_dims))
    generator = Generator.from_pretrained(output)
    assert generator.label_denoiser is not None
    assert generator.config.class_names == {0: "background", 1: "ball"}
    assert generator.config.constant_classes == (1,)
    for stage in ("autoencoder", "denoiser", "label"):
        assert [row["step"] for row in losses(output, stage)] == list(range(1, 9))
        assert (output / "samples" / f"{stage}_000008.png").stat().st_size > 1000
        assert list((output / "logs" / "tensorboard" / stage).glob("events*"))
    latents = generator.encode(torch.zeros(1, 1, *generator.config.size))
    assert latents.shape[1:] == generator.latent_shape(generator.config.size)


def test_latents_of_the_training_set_have_unit_variance(tmp_path, tiny_plan):
    output = train(make_folder(tmp_path / "data", 2), tmp_path / "run", plan=tiny_plan(2, label=None))
    files = sorted((output / "cache").glob("denoiser-*/*.safetensors"))
    train_rows = [load_file(file)["x"] for file in files if len(load_file(file)["x"]) == 2]
    latents = torch.cat([rows[:1] for rows in train_rows]).float().movedim(1, 0).flatten(1)
    torch.testing.assert_close(latents.std(1), torch.ones(2), rtol=0.02, atol=0)
    torch.testing.assert_close(latents.mean(1), torch.zeros(2), rtol=0, atol=0.02)


def test_a_killed_run_ends_with_the_same_losses_as_one_left_alone(tmp_path, tiny_plan):
    data = make_folder(tmp_path / "data", 2)
    plan = tmp_path / "plan.yaml"
    write_plan(tiny_plan(2, label=None), plan)
    subprocess.run(launch(data, tmp_path / "whole", plan), check=True, capture_output=True)
    for stage in (
        "autoencoder",
        "denoiser",
    ):  # killed once in each stage, past a checkpoint and off a checkpoint's step
        log = tmp_path / "killed" / "logs" / f"{stage}.jsonl"
        process = subprocess.Popen(
            launch(data, tmp_path / "killed", plan), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 4) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(launch(data, tmp_path / "killed", plan), check=True, capture_output=True)
    for stage in ("autoencoder", "denoiser"):
        assert losses(tmp_path / "killed", stage) == losses(tmp_path / "whole", stage)
    one, other = (Generator.from_pretrained(tmp_path / name) for name in ("whole", "killed"))
    assert one.weights_hash == other.weights_hash


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_kill_while_the_label_generator_is_added_leaves_a_model_that_loads(tmp_path, tiny_plan):
    data, output, plan = make_folder(tmp_path / "data", 2), tmp_path / "run", tmp_path / "plan.yaml"
    write_plan(tiny_plan(2, autoencoder=None, label={"steps": 400}, validate_every=2, checkpoint_every=1), plan)
    for _ in range(2):  # the second kill also hits a model that has a label generator already
        process = start(launch(data, output, plan))
        log, before = output / "logs" / "label.jsonl", -1
        while process.poll() is None:
            if before < 0 and log.exists():
                before = log.read_text().count("\n")
            time.sleep(0.002)
            if before >= 0 and log.read_text().count("\n") > before and list((output / "model").glob(".*.partial")):
                process.kill()  # in the middle of a save
                process.wait()
        assert process.returncode == -signal.SIGKILL
        assert Generator.from_pretrained(output / "model").denoiser is not None


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux limits the files of another process")
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(tmp_path, tiny_plan):
    data, output, plan = make_folder(tmp_path / "data", 2), tmp_path / "run", tmp_path / "plan.yaml"
    write_plan(tiny_plan(2, autoencoder=None, denoiser={"steps": 400}, label=None, validate_every=400), plan)
    process = subprocess.Popen(launch(data, output, plan), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = output / "checkpoints" / "denoiser" / "step_00000003.safetensors"
    while process.poll() is None and not first.exists():
        time.sleep(0.005)
    size = first.stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    message = process.communicate(timeout=120)[1].splitlines()[-1]
    assert process.returncode == 2
    assert re.match(
        r"medgen train: .*step_\d+\.safetensors: expected free disk space, got a full disk \(.*\)\. Free", message
    )
    left = sorted((output / "checkpoints" / "denoiser").iterdir())
    assert left
    assert all(path.name.startswith("step_") and load_file(path) for path in left)


def test_two_processes_learn_what_one_learns(tmp_path, tiny_plan):
    data = make_folder(tmp_path / "data", 2)
    plan = tmp_path / "plan.yaml"
    write_plan(tiny_plan(2, label=None), plan)
    subprocess.run(launch(data, tmp_path / "one", plan), check=True, capture_output=True)
    subprocess.run(launch(data, tmp_path / "two", plan, processes=2), check=True, capture_output=True)
    for stage, key in (("autoencoder", "l1"), ("denoiser", "loss")):
        one, two = ([row[key] for row in losses(tmp_path / name, stage)] for name in ("one", "two"))
        np.testing.assert_allclose(two, one, rtol=1e-3)


def test_every_epoch_visits_every_sample_once_in_a_new_order():
    epochs = [[sample_index(position, 7, 0) for position in range(first, first + 7)] for first in (0, 7)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]


def test_the_learning_rate_warms_up_and_falls_to_two_percent():
    rates = [learning_rate(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 50)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert all(a >= b for a, b in itertools.pairwise(rates[50:]))


def test_unusable_scans_are_named_or_skipped_and_listed(tmp_path, tiny_plan):
    data = make_folder(tmp_path / "data", 2)
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(data / "images" / "case_1.png")
    with pytest.raises(BadInputError, match=r"case_1\.png: expected .*"):
        train(data, tmp_path / "strict", plan=tiny_plan(2, label=None), max_steps=1)
    output = train(data, tmp_path / "run", plan=tiny_plan(2, label=None), max_steps=1, skip_bad=True)
    train(data, tmp_path / "run", plan=tiny_plan(2, label=None), max_steps=1, skip_bad=True)  # and once more, cached
    rows = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["case_1"]
    assert Generator.from_pretrained(output).config.training["training_cases"] == 3


def test_bad_validation_scans_alone_do_not_stop_a_run_that_skips_bad_ones(tmp_path, tiny_plan):
    data = make_folder(tmp_path / "data", 2)
    for case in (4, 5):  # all of the validation split
        Image.fromarray(np.full((16, 16), 9, np.uint8)).save(data / "images" / f"case_{case}.png")
    output = train(data, tmp_path / "run", plan=tiny_plan(2, label=None), max_steps=1, skip_bad=True)
    summary = Generator.from_pretrained(output).config.training
    assert (summary["training_cases"], summary["validation_cases"]) == (4, 0)
    rows = [json.loads(line) for line in (output / "rejected.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows] == ["case_4", "case_5"]
    for case in range(4):
        Image.fromarray(np.full((16, 16), 9, np.uint8)).save(data / "images" / f"case_{case}.png")
    with pytest.raises(BadInputError, match=r"expected at least one training case.*case_0\.png: expected"):
        train(data, tmp_path / "none", plan=tiny_plan(2, label=None), max_steps=1, skip_bad=True)


def test_a_dry_run_shows_the_split_of_labelled_scans_that_training_takes(tmp_path, capsys, tiny_plan):
    data = make_folder(tmp_path / "data", 2, count=14)
    rows = [row.split(",") for row in (data / "metadata.csv").read_text().splitlines()[1:]]
    # No split is given, every other scan has no label, and patients differ in their number of scans.
    patients = (0, 1, 0, 1, 0, 1, 0, 1, 2, 1, 3, 1, 4, 1)
    lines = [
        f"{case},{image},{'' if index % 2 else label},p{patients[index]}"
        for index, (case, image, label, _) in enumerate(rows)
    ]
    (data / "metadata.csv").write_text("\n".join(["id,image,label,group", *lines]) + "\n")
    plan, seen = tiny_plan(2, autoencoder=None, label=None), set()
    for seed in (0, 3):
        train(data, tmp_path / "dry", plan=plan, max_steps=1, seed=seed, dry_run=True)
        shown = re.search(r"(\d+) scans for training, (\d+) for validation", capsys.readouterr().out).groups()
        output = train(data, tmp_path / f"run_{seed}", plan=plan, max_steps=1, seed=seed)
        summary = Generator.from_pretrained(output).config.training
        assert (summary["training_cases"], summary["validation_cases"]) == tuple(map(int, shown))
        assert sum(map(int, shown)) == 7
        seen.add(shown)
    assert len(seen) == 1  # all commands hold out the same scans, whatever their seeds


def test_a_resumed_run_keeps_every_point_of_its_curves(tmp_path, tiny_plan):
    data, plan = make_folder(tmp_path / "data", 2), tiny_plan(2, label=None, autoencoder=None)
    train(data, tmp_path / "run", plan=plan)
    (tmp_path / "run" / "checkpoints" / "denoiser" / "step_00000008.safetensors").unlink()  # as if killed before it
    train(data, tmp_path / "run", plan=plan)
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "tensorboard" / "denoiser"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def test_a_plan_with_a_spacing_refuses_scans_that_state_none(tmp_path, tiny_plan):
    data = make_folder(tmp_path / "data", 2)
    with pytest.raises(BadInputError, match=r"case_0\.png: expected a scan that states its voxel size"):
        train(data, tmp_path / "run", plan=tiny_plan(2, label=None, spacing=(1.0, 1.0)), max_steps=1)
