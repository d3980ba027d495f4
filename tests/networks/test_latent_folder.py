"""Folders of bases: the settings of the pipeline; other families and damaged folders are refused."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DDPMScheduler

from medgen.diffusion.objective import Objective
from medgen.networks.latent_folder import read_latent_base
from medgen.types import BadInputError


def latents(*size):
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))


REFUSED = {
    "sdxl": ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, r"text_encoder_2 \(CLIPTextModel"),
    "flux": ({"unet": "absent", "transformer": ["diffusers", "FluxTransformer2DModel"]}, r"with transformer \(Flux"),
    "pixels": ({"vae": [None, None]}, "no vae"),
    "video": ({"unet": ["diffusers", "UNet3DConditionModel"]}, "unet UNet3DConditionModel"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    ],
)
def test_objective_is_that_of_the_scheduler(spoiled, changes):
    folder, change = spoiled
    change("scheduler/scheduler_config.json", **changes)
    found = read_latent_base(folder)
    objective = Objective(**found.objective)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    x0, noise, t = latents(8, 8), latents(8, 8).flip(0), torch.tensor([10, 999])
    torch.testing.assert_close(objective.add_noise(x0, noise, t), scheduler.add_noise(x0, noise, t), atol=2e-5, rtol=0)
    velocity = objective.prediction == "v_prediction"
    expected = scheduler.get_velocity(x0, noise, t) if velocity else noise
    torch.testing.assert_close(objective.target(x0, noise, t), expected, atol=2e-5, rtol=0)
    assert velocity == (changes.get("prediction_type") == "v_prediction")
    assert (found.size, found.latent_scale, found.latent_shift) == ((16, 16), (0.2,), (0.0,))


@pytest.mark.parametrize("kind", REFUSED)
def test_pipelines_of_other_families_are_refused(spoiled, kind):
    folder, change = spoiled
    changes, message = REFUSED[kind]
    change("model_index.json", **changes)
    with pytest.raises(
        BadInputError, match=rf"expected a base of the Stable Diffusion 1\.x or 2\.x family .*{message}"
    ):
        read_latent_base(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": 9}, r"expected a U-Net with 4 channels .*9 in and 4 out \(an inpainting"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "got one with addition_embed_type 'text_time'"),
        ("unet/config.json", {"cross_attention_dim": 24}, "expected a text encoder of width 24, .* got one of 16"),
        (
            "unet/config.json",
            {"block_out_channels": [8, 24]},
            "unet: expected the class UNet2DConditionModel as diffusers",
        ),
        ("unet/config.json", {"sample_size": None}, "expected the sample_size .*got none"),
        ("vae/config.json", {"latent_channels": 8}, "vae: expected the class AutoencoderKL as diffusers"),
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "sample"},
            "expected prediction_type epsilon .*got sample",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "scaled_linear from 0.00085 to 0.02"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "got trained_betas"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            r"got none \(FlowMatchEulerDiscreteScheduler\)",
        ),
        ("scheduler/scheduler_config.json", {"_class_name": "Mine"}, "expected a scheduler of diffusers, got Mine"),
    ],
)
def test_parts_that_do_not_fit_are_refused(spoiled, name, changes, message):
    folder, change = spoiled
    change(name, **changes)
    with pytest.raises(BadInputError, match=message):
        read_latent_base(folder)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", r"unet/config\.json: expected the U-Net's configuration, got no such file"),
        ("vae", r"vae/config\.json: expected a AutoencoderKL of diffusers, got no such file"),
        ("text_encoder", r"text_encoder/config\.json: expected the text encoder's configuration .* got no such file"),
        ("tokenizer", r"tokenizer: expected a tokenizer \(.*\), got none of these files"),
        ("scheduler", r"scheduler/scheduler_config\.json: expected the scheduler's configuration, got no such file"),
    ],
)
def test_a_part_that_is_missing_is_named(spoiled, part, message):
    folder, _ = spoiled
    shutil.rmtree(folder / part)
    with pytest.raises(BadInputError, match=message):
        read_latent_base(folder)


def test_missing_and_unsafe_files_are_refused(spoiled, saved_pipeline):
    folder, _ = spoiled
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadInputError, match=r"unet: expected diffusion_.*safetensors, got .*\.bin\. It is a pickle"):
        read_latent_base(folder)
    weights.with_suffix(".bin").rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(BadInputError, match=r"got diffusion_pytorch_model\.fp16\.safetensors\. Rename it"):
        read_latent_base(folder)
    weights.write_bytes(b"no weights")
    with pytest.raises(
        BadInputError, match="unet: expected the class UNet2DConditionModel as diffusers saves it, got an error"
    ):
        read_latent_base(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BadInputError, match="expected a tokenizer"):
        read_latent_base(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(BadInputError, match="expected JSON, got a damaged file"):
        read_latent_base(folder)
    with pytest.raises(BadInputError, match=r"unet/model_index\.json: expected the folder of a diffusers pipeline"):
        read_latent_base(saved_pipeline / "unet")
    with pytest.raises(BadInputError, match=r"expected a folder in diffusers' layout or a Hub id .*got nothing"):
        read_latent_base(folder / "absent")
    with pytest.raises(BadInputError, match="or a reachable Hub id, got neither"):
        read_latent_base("nobody-here/stable-diffusion")


def test_weights_that_are_missing_within_a_file_are_refused(spoiled):
    from safetensors.torch import load_file, save_file

    folder, _ = spoiled
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: part for name, part in load_file(weights).items() if name != "conv_in.bias"}, weights)
    with pytest.raises(BadInputError, match=r"expected weights of the whole network, got none for conv_in\.bias"):
        read_latent_base(folder)


def test_of_a_hub_id_only_what_is_needed_is_downloaded(saved_pipeline, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    needed = sorted(str(path.relative_to(saved_pipeline)) for path in saved_pipeline.rglob("*") if path.is_file())
    others = ["v1-5.ckpt", "v1-5.safetensors", "README.md", "text_encoder/pytorch_model.bin", "unet/flax_model.msgpack"]
    others += ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    others += ["safety_checker/model.safetensors", "text_encoder/model.fp16.safetensors"]
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, sorted(filter_repo_objects([*needed, *others], allow_patterns=allow_patterns))))
        return str(saved_pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert read_latent_base("owner/stable-diffusion").size == (16, 16)
    assert asked == [("owner/stable-diffusion", needed)]
