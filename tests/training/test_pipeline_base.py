"""A pipeline of Stable Diffusion as a base: loaded, tuned by texts, steered by a branch, and back in diffusers."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from scipy import ndimage

from medgen.conditions.condition import Condition
from medgen.generator import Generator
from medgen.networks import LatentBaseControl, LatentBaseDenoiser
from medgen.training import train
from medgen.types import BadInputError

TEXTS = ("a ball", "no ball", "big ball")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for index in range(6):
        image = (120 + 60 * ndimage.gaussian_filter(rng.normal(size=(16, 16)), 1.5)).clip(1, 250)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"case_{index}.png")
        split = "val" if index > 3 else "train"
        rows.append(
            {"id": f"case_{index}", "image": f"images/case_{index}.png", "text": TEXTS[index % 3], "split": split}
        )
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


def _output(generator: Generator, text: str) -> torch.Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = generator.text_encoder.encode([text])
        return generator.denoise(x, torch.tensor([500.0]), Condition({"text": words}))


def test_a_pipeline_is_a_generator_of_gray_16_bit_pictures(saved_pipeline, tmp_path):
    base = Generator.from_pretrained(saved_pipeline)
    assert base.conditions == ("text",)
    assert (base.config.size, base.compression, base.config.image_dtype) == ((16, 16), 2, "uint16")
    assert isinstance(base.denoiser, LatentBaseDenoiser)
    assert base.weights_hash == Generator.from_pretrained(saved_pipeline).weights_hash
    assert not torch.equal(_output(base, "a ball"), _output(base, "no"))
    base.save_pretrained(tmp_path / "bundle")
    again = Generator.from_pretrained(tmp_path / "bundle")
    assert torch.equal(_output(again, "a ball"), _output(base, "a ball"))
    image = torch.rand(1, 1, 16, 16) * 2 - 1
    assert torch.equal(again.encode(image), base.encode(image))
    assert again.decode(again.encode(image)).shape == (1, 1, 16, 16)


def test_it_is_tuned_by_low_rank_changes_that_diffusers_loads(saved_pipeline, pipeline, folder, tmp_path):
    pytest.importorskip("peft")
    train(
        folder,
        tmp_path / "run",
        conditions=["text"],
        base=str(saved_pipeline),
        lora_rank=2,
        max_steps=3,
        device="cpu",
    )
    base, tuned = Generator.from_pretrained(saved_pipeline), Generator.from_pretrained(tmp_path / "run")
    assert tuned.conditions == ("text",)
    assert not torch.equal(_output(base, "a ball"), _output(tuned, "a ball"))
    assert tuned.config.image_dtype == "uint8"  # as the scans
    pipeline.load_lora_weights(tmp_path / "run" / "lora")
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        words = tuned.text_encoder.encode(["a ball"])
        theirs = pipeline.unet(x, torch.tensor([500.0]), encoder_hidden_states=words).sample
    torch.testing.assert_close(_output(tuned, "a ball"), theirs, rtol=1e-4, atol=1e-5)


def test_a_branch_is_trained_on_it_while_it_stays_as_it_is_then_both_are_tuned(saved_pipeline, folder, tmp_path):
    train(folder, tmp_path / "run", conditions=["edge"], base=str(saved_pipeline), max_steps=3, device="cpu")
    base, made = Generator.from_pretrained(saved_pipeline), Generator.from_pretrained(tmp_path / "run")
    assert made.conditions == ("text", "edge")
    assert isinstance(made.controls["edge"], LatentBaseControl)
    assert torch.equal(_output(base, "a ball"), _output(made, "a ball"))  # without edges the base alone
    words = {"conditions": ["text"], "base": str(tmp_path / "run"), "max_steps": 2, "device": "cpu"}
    tuned = Generator.from_pretrained(train(folder, tmp_path / "tuned", **words))
    assert tuned.conditions == ("text", "edge")
    assert not torch.equal(_output(made, "a ball"), _output(tuned, "a ball"))


def test_it_is_tuned_beside_a_packed_controlnet(saved_pipeline, pipeline, folder, tmp_path):
    network = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    network.save_pretrained(tmp_path / "soft")
    packed = Generator.from_pretrained(saved_pipeline, edge_control=tmp_path / "soft")
    packed.save_pretrained(tmp_path / "packed")
    words = {"conditions": ["text"], "base": str(tmp_path / "packed"), "max_steps": 2, "device": "cpu"}
    tuned = Generator.from_pretrained(train(folder, tmp_path / "run", **words))
    assert tuned.conditions == ("text", "edge")
    assert tuned.config.guidance_scales == {"edge": 1.0}
    assert not tuned.config.edges_are_outlines  # the ControlNet may be for other edges still


def test_a_folder_of_another_family_is_refused_in_its_words(spoiled):
    folder, change = spoiled
    change(
        "model_index.json", _class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModel"]
    )
    with pytest.raises(BadInputError, match=r"expected .*the Stable Diffusion 1\.x or 2\.x family"):
        Generator.from_pretrained(folder)
