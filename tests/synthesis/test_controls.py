"""Control branches in a run: their scale and time from the arguments to the voxels, the manifest and back."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise

import pytest
import torch

from medgen.conditions.condition import Condition
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Control, Denoiser
from medgen.provenance import read_manifest
from medgen.synthesis import synthesize
from medgen.synthesis.plan import SamplingSettings
from medgen.synthesis.steering import control_uses, guide
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


@pytest.mark.parametrize("scales", [1.0, 2.0, {"mask": 1.5, "edge": 3.0, "text": 5.0}])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@torch.no_grad()
def test_two_branches_and_text_are_guided_as_the_formula_has_it(spatial_dims, scales):
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    denoiser = Denoiser(
        spatial_dims=spatial_dims,
        in_channels=1,
        channels=(8, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=4,
        norm_num_groups=4,
        text_length=3,
        text_width=4,
    )
    controls = {"mask": Control.of(denoiser, "mask", mask_classes=2), "edge": Control.of(denoiser, "edge")}
    for network in (denoiser, *controls.values()):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    size = (8,) * spatial_dims
    config = GeneratorConfig(
        name="two-branches",
        spatial_dims=spatial_dims,
        channel_names={0: "image"},
        class_names={0: "background", 1: "ball"},
        size=size,
        objective=Objective(),
        normalization=Normalization(),
        intensity=IntensityMap((1.0,), (0.0,)),
    )
    generator = Generator(config, denoiser, controls=controls)
    x, t = torch.randn(1, 1, *size, generator=draw), torch.tensor([500.0])
    parts = {
        "mask": torch.rand(1, 2, *size, generator=draw),
        "edge": torch.rand(1, 2, *size, generator=draw),
        "text": torch.randn(1, 3, 4, generator=draw),
    }
    factors = {"mask": 1.0, "edge": 0.5}

    def output(*names):
        given = {name: parts[name] for name in names}
        residuals = [controls[name](x, t, given, conditioning_scale=factors[name]) for name in names if name != "text"]
        return denoiser(x, t, {name: given[name] for name in names if name == "text"}, residuals=residuals)

    # e_0 + sum_k w_k (e_k - e_{k-1}); Brooks et al. 2023, equation 3.
    outputs = [output(), output("mask"), output("mask", "edge"), output("mask", "edge", "text")]
    weights = list(scales.values()) if isinstance(scales, dict) else [scales] * 3
    expected = outputs[0] + sum(w * (e - d) for w, (d, e) in zip(weights, pairwise(outputs), strict=True))
    assert all((after - before).abs().max() > 1e-3 for before, after in pairwise(outputs))
    settings = SamplingSettings(guidance_scale=scales, controls={"edge": {"conditioning_scale": 0.5}})
    uses = control_uses(generator, settings)
    guided = guide(generator, Condition(parts), settings, lambda *given: generator.denoise(*given, controls=uses))
    torch.testing.assert_close(guided(x, t), expected, rtol=1e-4, atol=1e-5)
    assert guided.evaluations == {1.0: 1, 2.0: 2}.get(weights[0], 4)
