"""Stable Diffusion and its ControlNets from the command line: a folder of each and no code."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel
from PIL import Image

from medgen import cli
from medgen.conditions.condition import Condition
from medgen.conditions.edge import EdgeSettings
from medgen.generator import Generator
from medgen.provenance import read_manifest
from medgen.synthesis.plan import SamplingSettings
from medgen.synthesis.steering import control_uses, guide

QUICK = ("--num_inference_steps", "2", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def controlnet(pipeline, tmp_path) -> Path:
    """Folder of a ControlNet that has learned something."""
    network = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    network.save_pretrained(tmp_path / "canny")
    return tmp_path / "canny"


@pytest.fixture
def scans(tmp_path) -> Path:
    """Two dark pictures of 8 bits with a bright block, here or there."""
    (tmp_path / "scans").mkdir()
    for index in range(2):
        picture = np.full((16, 16), 20, dtype=np.uint8)
        picture[2 + 5 * index : 8 + 5 * index, 4:12] = 60
        Image.fromarray(picture).save(tmp_path / "scans" / f"case_{index}.png")
    return tmp_path / "scans"


def synthesize(output: Path, *arguments: object) -> list[str]:
    """Run the command; digests of the scans."""
    assert cli.main(["synthesize", "--output", str(output), *map(str, arguments), *QUICK]) == 0
    return [record.image_sha256 for record in read_manifest(output / "manifest.jsonl")]


def test_a_pipeline_and_a_controlnet_make_scans_that_follow_edges(saved_pipeline, controlnet, scans, tmp_path, capsys):
    both = ("--model", saved_pipeline, "--edge_control", controlnet, "--edges", scans, "--prompts", "a")
    steered = synthesize(tmp_path / "steered", *both)
    assert len(set(steered)) == 2
    weak = synthesize(tmp_path / "weak", *both, "--controls", "{edge: {conditioning_scale: 0.5}}")
    off = synthesize(tmp_path / "off", *both, "--controls", "{edge: {conditioning_scale: 0}}")
    plain = synthesize(tmp_path / "plain", "--model", saved_pipeline, "--prompts", "a", "--num_samples", 2)
    assert not {*steered} & {*weak} | {*steered, *weak} & {*plain}
    assert off == plain
    first = read_manifest(tmp_path / "steered" / "manifest.jsonl")[0]
    assert first.guidance_scale == {"text": 7.5, "edge": 1.0}
    assert synthesize(tmp_path / "said", *both, "--guidance_scale", "7.5") == steered
    edges_too = synthesize(tmp_path / "edges_too", *both, "--guidance_scale", "{edge: 7.5}")
    assert not {*steered} & {*edges_too}
    assert first.network_evaluations == 2 * 2  # as in diffusers: with the text and without, the edges in both
    assert first.model_hash != read_manifest(tmp_path / "plain" / "manifest.jsonl")[0].model_hash
    assert "edge_control: canny\n" in (tmp_path / "steered" / "synthesize.yaml").read_text()

    manifest = tmp_path / "steered" / "manifest.jsonl"
    again = ("synthesize", "--replay", str(manifest), "--model", str(saved_pipeline), "--edges", str(scans))
    capsys.readouterr()
    assert cli.main([*again, "--output", str(tmp_path / "refused")]) == 2
    assert "and its ControlNet, if it had one, with --edge_control" in capsys.readouterr().err
    assert cli.main([*again, "--output", str(tmp_path / "again"), "--edge_control", str(controlnet)]) == 0
    assert [record.image_sha256 for record in read_manifest(tmp_path / "again" / "manifest.jsonl")] == steered


def test_maps_that_it_does_not_read_come_with_what_adds_them(saved_pipeline, scans, tmp_path, capsys):
    branch = "train a branch on it with `medgen train --base MODEL --conditions"
    for argument, remedy in {
        "edges": f"Leave it out, give --edge_control CONTROLNET, or {branch} edge`.",
        "labels": f"Leave it out, or {branch} mask`.",
    }.items():
        words = ["--model", saved_pipeline, f"--{argument}", scans, "--output", tmp_path / "out"]
        assert cli.main(["synthesize", *map(str, words)]) == 2
        assert f"{argument}: expected none" in (told := capsys.readouterr().err)
        assert remedy in told


@pytest.mark.parametrize("scale", [None, 4.0, {"text": 4.0}])
@torch.no_grad()
def test_guided_by_text_the_edges_act_in_both_passes_as_in_diffusers(saved_pipeline, pipeline, controlnet, scale):
    generator = Generator.from_pretrained(saved_pipeline, edge_control=controlnet)
    assert generator.conditions == ("text", "edge")
    draw = torch.Generator().manual_seed(0)
    x, t, picture = torch.randn(1, 4, 8, 8, generator=draw), torch.tensor([500.0]), torch.rand(1, 1, 16, 16)
    words, empty = pipeline.encode_prompt("a", "cpu", 1, True, negative_prompt="")
    theirs = []
    network = ControlNetModel.from_pretrained(controlnet)
    for text in (empty, words):
        down, middle = network(x, t, text, picture.repeat(1, 3, 1, 1), 0.8, return_dict=False)
        theirs.append(
            pipeline.unet(x, t, text, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
        )
    condition = Condition({"text": words, "edge": torch.cat([picture, torch.ones_like(picture)], dim=1)})
    settings = SamplingSettings(guidance_scale=scale, controls={"edge": {"conditioning_scale": 0.8}})
    uses = control_uses(generator, settings)
    guided = guide(generator, condition, settings, lambda *given: generator.denoise(*given, controls=uses))
    torch.testing.assert_close(
        guided(x, t), theirs[0] + (7.5 if scale is None else 4) * (theirs[1] - theirs[0]), rtol=1e-4, atol=1e-4
    )


def test_the_controlnet_is_packed_with_the_model_and_goes_with_a_tuned_one(saved_pipeline, controlnet, scans, tmp_path):
    Generator.from_pretrained(saved_pipeline).save_pretrained(tmp_path / "tuned")
    Generator.from_pretrained(tmp_path / "tuned", edge_control=controlnet).save_pretrained(tmp_path / "packed")
    packed = Generator.from_pretrained(tmp_path / "packed")
    assert (packed.config.edge, packed.config.guidance_scales) == (EdgeSettings(), {"edge": 1.0})
    apart = synthesize(
        tmp_path / "apart", "--model", saved_pipeline, "--edge_control", controlnet, "--edges", scans, "--prompts", "a"
    )
    assert synthesize(tmp_path / "one", "--model", tmp_path / "packed", "--edges", scans, "--prompts", "a") == apart
    # It may be one for soft edges, whatever the settings say.
    assert len(synthesize(tmp_path / "soft", "--model", tmp_path / "packed", "--edge_maps", scans)) == 2
    before = read_manifest(tmp_path / "apart" / "manifest.jsonl")[0].model_hash
    assert Generator.from_pretrained(saved_pipeline, edge_control=controlnet).weights_hash == before
    network = ControlNetModel.from_pretrained(controlnet)
    network.conv_in.bias.data += 0.1
    network.save_pretrained(controlnet)
    assert Generator.from_pretrained(saved_pipeline, edge_control=controlnet).weights_hash != before


def test_edges_of_a_scan_do_not_depend_on_its_units(saved_pipeline, controlnet, scans, tmp_path):
    (tmp_path / "other").mkdir()
    for path in sorted(scans.iterdir()):
        Image.fromarray(np.asarray(Image.open(path)).astype(np.uint16) * 250).save(tmp_path / "other" / path.name)
    both = ("--model", saved_pipeline, "--edge_control", controlnet, "--edges")
    assert synthesize(tmp_path / "low", *both, scans) == synthesize(tmp_path / "high", *both, tmp_path / "other")


def change(folder: Path, **entries: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "expected a folder in diffusers' layout or a Hub id"),
        (lambda folder: (folder / "config.json").unlink(), "expected the folder of a diffusers ControlNet"),
        (
            lambda folder: (folder / "diffusion_pytorch_model.safetensors").unlink(),
            "expected diffusion_pytorch_model.safetensors, got no weights",
        ),
        (lambda folder: change(folder, _class_name="FluxControlNetModel"), "got FluxControlNetModel"),
        (
            lambda folder: ControlNetModel.from_config(
                ControlNetModel.load_config(folder) | {"cross_attention_dim": 24}
            ).save_pretrained(folder),
            "expected a ControlNet for this base, with cross_attention_dim 16, got 24",
        ),
    ],
)
def test_a_controlnet_that_cannot_be_used_is_refused(
    saved_pipeline, controlnet, scans, tmp_path, capsys, spoil, message
):
    spoil(controlnet)
    words = ["--model", saved_pipeline, "--edge_control", controlnet, "--edges", scans, "--output", tmp_path / "out"]
    assert cli.main(["synthesize", *map(str, words)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_of_another_family_or_with_edges_takes_no_controlnet(saved_pipeline, controlnet, tmp_path, capsys):
    words = ["synthesize", "--edge_control", str(controlnet), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 2
    assert "'hippocampus-mr-3d' is not of the Stable Diffusion 1.x or 2.x family" in capsys.readouterr().err
    Generator.from_pretrained(saved_pipeline, edge_control=controlnet).save_pretrained(tmp_path / "packed")
    assert cli.main([*words, "--model", str(tmp_path / "packed")]) == 2
    assert "follows edges already" in capsys.readouterr().err


def test_pictures_of_512_come_from_a_folder_without_code(saved_pipeline, tmp_path):
    folder = tmp_path / "full-size"
    shutil.copytree(saved_pipeline, folder)
    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        sample_size=512,
    ).save_pretrained(folder / "vae")
    change(folder / "unet", sample_size=64)
    synthesize(tmp_path / "out", "--model", folder, "--prompts", "a lung", "--num_samples", 1)
    (record,) = read_manifest(tmp_path / "out" / "manifest.jsonl")
    (written,) = (tmp_path / "out" / "imagesTr").iterdir()
    picture = Image.open(written)
    assert (record.shape, picture.size, picture.mode) == ([512, 512], (512, 512), "I;16")
    assert np.asarray(picture).std() > 0


@pytest.fixture
def x_rays(real_data, tmp_path) -> Path:
    """Some real chest X-rays with their notes."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(real_data / "cxr_text" / "images")
    with (real_data / "cxr_text" / "metadata.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    with (tmp_path / "data" / "metadata.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, ["id", "image", "text", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([row for row in rows if row["split"] == "train"][:12])
        writer.writerows([row for row in rows if row["split"] == "val"][:3])
    return tmp_path / "data"


@pytest.mark.filterwarnings("ignore:text '.*is too long")  # the words of the tiny pipeline are single letters
def test_it_is_tuned_to_real_x_rays_by_their_texts(saved_pipeline, x_rays, tmp_path):
    pytest.importorskip("peft")
    words = ["--data", x_rays, "--base", saved_pipeline, "--conditions", "text", "--lora_rank", 4]
    words += ["--max_steps", 2, "--device", "cpu", "--output", tmp_path / "run"]
    assert cli.main(["train", *map(str, words)]) == 0
    base, tuned = Generator.from_pretrained(saved_pipeline), Generator.from_pretrained(tmp_path / "run")
    pairs = zip(base.denoiser.parameters(), tuned.denoiser.parameters(), strict=True)
    changed = [not torch.equal(before, after) for before, after in pairs]
    assert 0 < sum(changed) < len(changed) / 2
    ask = ("--prompts", "effusion", "--num_samples", 1)
    (scan,) = synthesize(tmp_path / "out", "--model", tmp_path / "run", *ask)
    assert scan not in synthesize(tmp_path / "before", "--model", saved_pipeline, *ask)
    (written,) = (tmp_path / "out" / "imagesTr").iterdir()
    assert Image.open(written).mode == "L"  # 8 bits, as the X-rays


def test_the_settings_of_a_pipeline_are_part_of_its_digest(saved_pipeline, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(saved_pipeline, again)
    before = Generator.from_pretrained(saved_pipeline).weights_hash
    assert Generator.from_pretrained(again).weights_hash == before
    path = again / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    assert Generator.from_pretrained(again).weights_hash != before
