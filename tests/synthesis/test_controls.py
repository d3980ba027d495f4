"""Control branches in a run: their scale and time from the arguments to the voxels, the manifest and back."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Control, Denoiser
from medgen.provenance import read_manifest
from medgen.synthesis import synthesize
from medgen.types import BadInputError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    denoiser = Denoiser(
        spatial_dims=2,
        in_channels=1,
        channels=(8, 8),
        attention_levels=(False, False),
        num_res_blocks=1,
        num_head_channels=4,
        norm_num_groups=4,
        attributes={"view": 2},
    )
    control = Control.of(denoiser, "mask", mask_classes=2)
    for network in (denoiser, control):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    config = GeneratorConfig(
        name="controlled",
        spatial_dims=2,
        channel_names={0: "image"},
        class_names={0: "background", 1: "ball"},
        size=(16, 16),
        objective=Objective(),
        normalization=Normalization(),
        intensity=IntensityMap((1 / 100,), (-1.0,)),
        image_dtype="uint8",
        orientation=None,
    )
    folder = tmp_path_factory.mktemp("model")
    Generator(config, denoiser, controls={"mask": control}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("labels")
    for index in range(2):
        label = torch.zeros(16, 16, dtype=torch.uint8)
        label[4 + index : 10 + index, 4:12] = 1
        Image.fromarray(label.numpy()).save(folder / f"case_{index}.png")
    return folder


def _images(records):
    return [record.image_sha256 for record in records]


def test_scale_and_time_of_a_branch_reach_the_voxels_and_the_replay(model, labels, tmp_path):
    def run(name, **controls):
        return synthesize(
            tmp_path / name,
            model=str(model),
            labels=labels,
            num_inference_steps=4,
            guidance_scale=1.0,
            controls={"mask": controls} if controls else None,
            device="cpu",
        )

    plain, weak, late = run("plain"), run("weak", conditioning_scale=0.3), run("late", start=0.9)
    off = run("off", conditioning_scale=0.0)
    assert len({tuple(_images(records)) for records in (plain, weak, late, off)}) == 4
    assert _images(run("same", conditioning_scale=1.0)) == _images(plain)
    again = synthesize(replay=tmp_path / "weak" / "manifest.jsonl", model=str(model), labels=labels, device="cpu")
    assert _images(again) == _images(weak)
    assert read_manifest(tmp_path / "weak" / "manifest.jsonl")[0].controls == {"mask": {"conditioning_scale": 0.3}}
    assert "controls" in json.loads((tmp_path / "plain" / "manifest.jsonl").read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        ({"edge": {}}, r"controls: expected control branches of the model 'controlled' \(mask\), got 'edge'"),
        ({"mask": {"scale": 1.0}}, "controls: expected conditioning_scale, start, end for mask, got scale"),
        ({"mask": {"end": 2.0}}, "control start and end: expected rising shares"),
    ],
)
def test_controls_that_cannot_be_are_refused_before_anything_is_written(model, labels, tmp_path, controls, message):
    with pytest.raises(BadInputError, match=message):
        synthesize(tmp_path / "out", model=str(model), labels=labels, controls=controls, device="cpu")
    assert not (tmp_path / "out").exists()


def test_records_from_before_controls_still_load(model, labels, tmp_path):
    records = synthesize(
        tmp_path / "out", model=str(model), labels=labels, num_inference_steps=2, attributes=None, device="cpu"
    )
    values = dataclasses.asdict(records[0])
    del values["controls"]
    assert type(records[0]).from_dict(values).controls == {}
