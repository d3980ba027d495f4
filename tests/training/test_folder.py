"""Run folders: what may be continued in them, what is refused, and what a kill or a dry run leaves."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medgen import cli
from medgen.data.dataset import read_dataset, split_cases
from medgen.generator import Generator
from medgen.planning import Plan, read_plan, write_plan
from medgen.planning.cost import cache_bytes
from medgen.training import train
from medgen.training.autoencoder import AutoencoderStage
from medgen.training.denoiser import DenoiserStage
from medgen.types import BadInputError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for index in range(4):
        label = np.zeros((16, 16), np.uint8)
        label[4:12, 4 + index : 12] = 1
        Image.fromarray(rng.integers(50, 100, (16, 16)).astype(np.uint8) + 80 * label).save(
            folder / "images" / f"case_{index}.png"
        )
        Image.fromarray(label).save(folder / "labels" / f"case_{index}.png")
    (folder / "val.txt").write_text("case_3\n")
    return folder


@pytest.fixture
def tiny(tiny_plan) -> Callable[..., Plan]:
    """Four steps a stage, and no discriminator."""
    autoencoder = {"steps": 4, "adversarial_weight": 0.0, "feature_weight": 0.0}
    short = {"autoencoder": autoencoder, "denoiser": {"steps": 4}, "label": {"steps": 4}}

    def build(**changes) -> Plan:
        both = {
            key: {**short.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()
        }
        return tiny_plan(2, **{**short, "validate_every": 2, "checkpoint_every": 2, **both})

    return build


@pytest.fixture
def begin(tiny) -> Callable[..., Path]:
    """The first stage of a run."""

    def start(data: Path, output: Path, plan: Plan | None = None, **arguments) -> Path:
        return train(data, output, plan=plan or tiny(), stages=("autoencoder",), device="cpu", **arguments)

    return start


@pytest.mark.parametrize(
    ("changes", "arguments", "difference"),
    [
        ({"denoiser": {"batch_size": 4}}, {}, "plan.denoiser.batch_size is 4, was 2"),
        ({"denoiser": {"condition_dropout": 0.3}}, {}, "plan.denoiser.condition_dropout is 0.3, was 0.15"),
        ({}, {"seed": 1}, "seed is 1, was 0"),
        ({"precision": "bf16"}, {}, "precision is bf16, was fp32"),
        ({}, {"max_steps": 3}, "max_steps is 3, was None"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_with_what_differs(
    changes, arguments, difference, data, tmp_path, tiny, begin
):
    run = begin(data, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(BadInputError, match=re.escape(f"got another: {difference}. Choose another --output")):
        begin(data, run, tiny(**changes), **arguments)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("name", ["images", "labels"])
def test_changed_scans_are_refused_by_name(name, data, tmp_path, begin):
    run = begin(data, tmp_path / "run")
    path = data / name / "case_1.png"
    array = np.array(Image.open(path))
    array[0, 0] = 1
    Image.fromarray(array).save(path)
    with pytest.raises(BadInputError, match=r"got another: training scan case_1 has changed\. Choose"):
        begin(data, run)


def test_scans_that_come_or_move_to_the_validation_are_another_run(data, tmp_path, begin):
    run = begin(data, tmp_path / "run")
    (data / "val.txt").write_text("case_2\ncase_3\n")
    with pytest.raises(BadInputError, match=r"training scan case_2 is gone; validation scan case_2 is new"):
        begin(data, run)


def test_the_same_files_elsewhere_are_the_same_run(data, tmp_path, begin):
    run = begin(data, tmp_path / "run")
    shutil.copytree(data, tmp_path / "copy")
    begin(tmp_path / "copy", run)


def test_an_edit_of_the_plan_in_the_folder_of_a_run_is_not_followed_silently(data, tmp_path, tiny, begin):
    run = begin(data, tmp_path / "run")
    write_plan(tiny(denoiser={"learning_rate": 1.0}), run / "plan.yaml")
    with pytest.raises(BadInputError, match=r"plan\.denoiser\.learning_rate is 1\.0, was 0\.001"):
        begin(data, run, read_plan(run / "plan.yaml"))


def test_what_only_changes_pace_and_memory_goes_on_and_is_written_down(data, tmp_path, tiny, begin):
    run = begin(data, tmp_path / "run")
    saving = dataclasses.replace(tiny(denoiser={"gradient_checkpointing": True}), checkpoint_every=1, validate_every=1)
    train(data, run, plan=saving, device="cpu", stages=("autoencoder", "denoiser"))
    assert read_plan(run / "plan.yaml") == saving
    assert (run / "checkpoints" / "denoiser" / "step_00000003.safetensors").is_file()


def test_synthesis_settings_may_be_changed_after_training_and_reach_the_model(data, tmp_path, tiny):
    stages = ("autoencoder", "denoiser")
    run = train(data, tmp_path / "run", plan=tiny(), device="cpu", stages=stages)
    before = Generator.from_pretrained(run / "model")
    assert (before.config.guidance_scale, before.config.temperature) == (1.5, 0.9)
    train(data, run, plan=tiny(denoiser={"temperature": 1.0, "guidance_scale": 2.0}), device="cpu", stages=stages)
    after = Generator.from_pretrained(run / "model")
    assert (after.config.guidance_scale, after.config.temperature) == (2.0, 1.0)
    assert after.weights_hash != before.weights_hash
    for one, other in zip(before.denoiser.parameters(), after.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_from_before_a_setting_was_there_goes_on(data, tmp_path, begin):
    run = begin(data, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["plan"]["denoiser"]["guidance_scale"] = 1.5
    assert record["plan"]["denoiser"].pop("elastic") == 0.0
    (run / "run.json").write_text(json.dumps(record))
    begin(data, run)
    record["plan"]["denoiser"]["elastic"] = 0.05
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(BadInputError, match=r"plan\.denoiser\.elastic is 0\.0, was 0\.05"):
        begin(data, run)


def test_a_dry_run_writes_the_plan_that_the_real_run_follows_after_an_edit(data, tmp_path, capsys, tiny):
    output = tmp_path / "new" / "run"
    train(data, output, plan=tiny(), device="cpu", dry_run=True)
    assert [path.name for path in output.iterdir()] == ["plan.yaml"]
    assert f"written to {output / 'plan.yaml'}" in capsys.readouterr().out
    edited = dataclasses.replace(tiny(), name="edited")
    write_plan(edited, output / "plan.yaml")
    train(data, output, device="cpu", stages=("autoencoder",))
    assert read_plan(output / "plan.yaml") == edited
    assert json.loads((output / "run.json").read_text())["plan"]["name"] == "edited"


def test_a_dry_run_in_the_folder_of_a_run_leaves_its_plan(data, tmp_path, tiny, begin):
    run = begin(data, tmp_path / "run")
    train(data, run, plan=tiny(denoiser={"steps": 99}), device="cpu", dry_run=True)
    assert read_plan(run / "plan.yaml") == tiny()


def test_a_trial_leaves_the_whole_plan_to_start_over_with(data, tmp_path, tiny, begin):
    run = begin(data, tmp_path / "run", max_steps=1)
    assert read_plan(run / "plan.yaml") == tiny()
    assert [path.name for path in (run / "checkpoints" / "autoencoder").iterdir()] == ["step_00000001.safetensors"]
    with pytest.raises(BadInputError, match="max_steps is None, was 1"):
        begin(data, run)


def test_data_that_stopped_a_run_before_its_first_step_may_be_mended(data, tmp_path, tiny, begin):
    path = data / "images" / "case_1.png"
    good = path.read_bytes()
    path.write_bytes(good[:40])
    with pytest.raises(BadInputError, match=r"case_1\.png"):
        begin(data, tmp_path / "run")
    path.write_bytes(good)
    begin(data, tmp_path / "run", tiny(denoiser={"steps": 5}))


def test_an_output_that_is_a_file_is_refused_in_one_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert cli.main(["train", "--data", str(data), "--output", str(output)]) == 2
        assert capsys.readouterr().err == (
            f"medgen train: {tmp_path / 'file'}: expected a folder, got a file. Choose another --output.\n"
        )


def test_a_folder_of_other_files_is_left_alone(data, tmp_path, begin):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(BadInputError, match=r"got one with other files \(thesis\.txt\)\. Choose another --output"):
        begin(data, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_what_a_kill_left_half_written_is_cleared_away(data, tmp_path, begin):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".plan.yaml.0123abcd.partial").write_text("plan:")  # killed before there was a plan
    begin(data, run)
    (run / "checkpoints" / "autoencoder" / ".step_00000004.safetensors.0123abcd.partial").write_bytes(b"half")
    (run / "model" / ".denoiser.partial").mkdir(parents=True)
    (run / "model" / ".denoiser.partial" / "config.json").write_text("{")
    begin(data, run)
    assert not list(run.rglob("*.partial"))


def test_a_damaged_record_is_named(data, tmp_path, begin):
    run = begin(data, tmp_path / "run")
    (run / "run.json").write_text("{")
    with pytest.raises(BadInputError, match=r"run\.json: expected the record of a run, got a damaged file"):
        begin(data, run)


def test_stages_need_the_ones_before_them_to_be_done(data, tmp_path, tiny):
    with pytest.raises(BadInputError, match="expected the stage 'autoencoder' to have run to its end"):
        train(data, tmp_path / "run", plan=tiny(), stages=("denoiser",), device="cpu")
    with pytest.raises(BadInputError, match="expected the stage 'denoiser' to have run to its end"):
        train(data, tmp_path / "run", plan=tiny(), stages=("label",), device="cpu")


def test_a_run_ends_with_where_the_model_is_and_what_to_do_next(data, tmp_path, capsys, tiny, begin):
    run = tmp_path / "run"
    begin(data, run)
    assert capsys.readouterr().out.endswith(f"no model yet. Next: medgen train --data {data} --output {run}\n")
    train(data, run, plan=tiny(), device="cpu")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"the model is in {run / 'model'}. Next: medgen synthesize --model {run} --output synthetic"
    names = sorted(path.name for path in run.iterdir())
    assert names == ["cache", "checkpoints", "latents.json", "logs", "model", "plan.yaml", "run.json", "samples"]
    card = (run / "model" / "README.md").read_text()
    assert "share the folder of this card and nothing of what lies around it" in card


def test_a_device_that_cannot_be_taken_is_refused(data, tmp_path, monkeypatch, tiny):
    with pytest.raises(BadInputError, match="device: expected a device of this machine, got 'cuda:77'"):
        train(data, tmp_path / "run", plan=tiny(), device="cuda:77")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInputError, match="expected 'cpu' or 'auto' for 2 processes, which take one device each"):
        train(data, tmp_path / "run", plan=tiny(), device="cpu:0")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_numbered_gpu_is_the_one_that_is_used(data, tmp_path, tiny):
    train(data, tmp_path / "run", plan=tiny(), device="cuda:1", stages=("autoencoder",))
    assert torch.cuda.max_memory_allocated(1) > 0
    assert torch.cuda.max_memory_allocated(0) == 0


def test_a_batch_that_the_processes_cannot_share_is_refused_before_any_work(data, tmp_path, monkeypatch, begin):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(
        BadInputError, match=r"autoencoder\.batch_size: expected a number that 3 processes can share, got 2"
    ):
        begin(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_is_one_line_that_says_what_to_change(data, tmp_path, capsys, tiny):
    plan = tmp_path / "wild.yaml"
    wild = dataclasses.replace(tiny().autoencoder, learning_rate=1e30, steps=40)
    write_plan(dataclasses.replace(tiny(), autoencoder=wild), plan)
    arguments = ["--data", str(data), "--output", str(tmp_path / "run"), "--device", "cpu", "--config", str(plan)]
    assert cli.main(["train", *arguments]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"medgen train: stage autoencoder, step \d+: expected a finite loss, got .*(nan|inf)", message)
    assert "Lower learning_rate in the plan's section 'autoencoder'" in message


@pytest.mark.parametrize(
    ("kind", "stage", "remedy"),
    [
        (AutoencoderStage, "autoencoder", "Lower patch_size or batch_size in the plan: that is another run"),
        (
            DenoiserStage,
            "denoiser",
            "Set gradient_checkpointing of 'denoiser' to true in the plan and run the same command",
        ),
    ],
)
def test_too_little_memory_is_one_line_with_a_remedy_that_works(
    kind, stage, remedy, data, tmp_path, monkeypatch, capsys, tiny
):
    update = kind.update

    def greedy(self, step, positions):
        if step == 3:
            torch.empty(1 << 50)  # more than any machine has: a real failure of the allocator
        return update(self, step, positions)

    monkeypatch.setattr(kind, "update", greedy)
    plan, run = tmp_path / "plan.yaml", tmp_path / "run"
    write_plan(tiny(label=None), plan)
    arguments = ["--data", str(data), "--output", str(run), "--device", "cpu", "--config", str(plan)]
    assert cli.main(["train", *arguments]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(
        f"medgen train: out of memory. stage {stage}, step 3: expected memory for batches of 2, got"
    )
    assert remedy in message
    assert ("gradient_checkpointing" in message) == (stage == "denoiser")
    assert (run / "checkpoints" / stage / "step_00000002.safetensors").is_file()
    monkeypatch.undo()
    write_plan(dataclasses.replace(tiny(denoiser={"gradient_checkpointing": True}), label=None), plan)
    assert cli.main(["train", *arguments]) == 0


def test_of_large_scans_the_model_knows_the_shapes_of_crops(data, tmp_path, tiny):
    small = dataclasses.replace(tiny().autoencoder, patch_size=(8, 8))
    plan = dataclasses.replace(tiny(), size=(8, 8), autoencoder=small, label=None)
    run = train(data, tmp_path / "run", plan=plan, max_steps=1, device="cpu")
    config = Generator.from_pretrained(run / "model").config
    assert set(config.shapes) == {(8, 8)}
    assert config.constant_classes == ()


def test_other_data_is_not_blamed_on_the_plan_that_lies_in_the_folder(data, tmp_path, tiny, begin):
    run = begin(data, tmp_path / "run")
    for path in (data / "images").iterdir():
        Image.open(path).convert("RGB").save(path)
    words = (
        r"plan\.yaml: expected the plan that lies in the output folder to fit .*got one of other data.*3 \(R, G, B\)"
    )
    with pytest.raises(BadInputError, match=words) as error:
        train(data, run, device="cpu")
    assert str(error.value).endswith("For other data choose another --output.")


def test_a_run_that_goes_on_says_so_and_from_where(data, tmp_path, tiny, begin, capsys):
    run = begin(data, tmp_path / "run")
    assert "goes on" not in capsys.readouterr().out
    begin(data, run)
    assert "stage autoencoder: all 4 steps are already done\n" in capsys.readouterr().out
    (run / "checkpoints" / "autoencoder" / "step_00000004.safetensors").unlink()  # as if killed before it
    begin(data, run)
    assert "stage autoencoder: goes on after step 2 of 4\n" in capsys.readouterr().out


def test_a_model_without_a_label_generator_is_told_where_label_maps_lie(data, tmp_path, tiny, capsys):
    run = train(data, tmp_path / "run", plan=tiny(label=None), max_steps=1, device="cpu")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f"Next: medgen synthesize --model {run} --labels {data} --output synthetic")


def test_a_dry_run_tells_the_size_that_the_cache_will_have(data, tmp_path, tiny, capsys):
    run = train(data, tmp_path / "run", plan=tiny(size=(8, 8), autoencoder={"patch_size": (8, 8)}), device="cpu")
    dataset = read_dataset(data)
    tensors = [load_file(path).values() for path in (run / "cache").rglob("*.safetensors")]
    # One bit per version says whether it is augmented.
    kept = sum(tensor.nbytes for values in tensors for tensor in values) - 2 * (3 * 2 + 1)
    assert cache_bytes(read_plan(run / "plan.yaml"), *split_cases(dataset)) == kept
    train(data, run, device="cpu", dry_run=True)
    assert f"Disk: {kept / 1e6:.1f} MB" in capsys.readouterr().out
