"""Bases of Stable Diffusion: the same numbers as in diffusers, behind medgen's calls."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from medgen.bundle import read_bundle, write_bundle
from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import sample
from medgen.networks.latent_base import LatentBaseAutoencoder, LatentBaseDenoiser
from medgen.networks.latent_control import LatentBaseControl
from medgen.networks.latent_folder import read_latent_base
from medgen.types import BadInputError

T = torch.tensor([3.0, 800.0])


@pytest.fixture(scope="module")
def base(saved_pipeline):
    return read_latent_base(saved_pipeline)


def latents(*size):
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))


def text(base):
    return base.text_encoder.encode(["normal lung", "nodule"])


def edges(*size):
    strength = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))
    return torch.cat([strength, torch.ones(2, 1, *size)], dim=1)


@torch.no_grad()
def test_denoiser_equals_the_pipelines_unet_bit_for_bit(base, pipeline):
    x, words = latents(8, 8), text(base)
    expected = pipeline.unet(x, T, encoder_hidden_states=words).sample
    assert torch.equal(base.denoiser(x, T, {"text": words}), expected)
    assert (base.denoiser(x, T, {"text": words.flip(0)}) - expected).abs().amax((1, 2, 3)).min() > 1e-4
    assert base.denoiser.condition_shapes((8, 8)) == {"text": (12, 16)}


@torch.no_grad()
def test_no_text_is_the_empty_prompt_for_each_sample_alone(base, pipeline):
    x, words = latents(8, 8), text(base)
    _, empty = pipeline.encode_prompt("nodule", "cpu", 1, True, negative_prompt="")
    torch.testing.assert_close(base.denoiser.empty_text, empty[0])
    expected = pipeline.unet(x, T, encoder_hidden_states=base.denoiser.empty_text.expand(2, -1, -1)).sample
    assert torch.equal(base.denoiser(x, T), expected)
    mixed = words.clone()
    mixed[0] = 0
    found = base.denoiser(x, T, {"text": mixed})
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], base.denoiser(x, T, {"text": words})[1])


@torch.no_grad()
def test_prompts_are_embedded_as_by_the_pipeline(base, pipeline):
    expected, _ = pipeline.encode_prompt("normal lung", "cpu", 1, False)
    torch.testing.assert_close(text(base)[:1], expected)


@torch.no_grad()
def test_sizes_that_do_not_halve_are_padded_by_their_border_and_cropped(base, pipeline):
    x = latents(7, 9)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="replicate")
    expected = pipeline.unet(padded, T, encoder_hidden_states=text(base)).sample[:, :, :7, :9]
    assert torch.equal(base.denoiser(x, T, {"text": text(base)}), expected)
    assert base.denoiser.divisor == 2


@torch.no_grad()
def test_conditions_that_it_does_not_read_are_refused(base):
    with pytest.raises(ValueError, match="expected conditions among text, got mask"):
        base.denoiser(latents(8, 8), T, {"mask": torch.zeros(2, 3, 16, 16)})


def test_recomputed_blocks_give_the_same_gradients(saved_pipeline):
    def gradients(recompute):
        network = read_latent_base(saved_pipeline).denoiser.train()
        if recompute:
            network.checkpoint_blocks()
        network(latents(8, 8), T).square().mean().backward()
        return [parameter.grad for parameter in network.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_autoencoder_equals_the_pipelines(base, pipeline):
    image = torch.rand(2, 1, 16, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = pipeline.vae.encode(image.repeat(1, 3, 1, 1)).latent_dist
    assert isinstance(expected, DiagonalGaussianDistribution)
    mean, std = base.autoencoder.encode(image)
    assert torch.equal(mean, expected.mean) and torch.equal(std, expected.std)
    decoded = base.autoencoder.decode(mean)
    pictures = pipeline.vae.decode(expected.mean).sample
    torch.testing.assert_close(decoded, (pictures[:, :1] + pictures[:, 1:2] + pictures[:, 2:]) / 3)
    assert decoded.shape == image.shape and decoded.unique().numel() > 256  # not rounded to 8 bits
    assert base.autoencoder.compression == 2
    with pytest.raises(ValueError, match="multiples of 2"):
        base.autoencoder.encode(torch.zeros(1, 1, 15, 16))


@torch.no_grad()
def test_bfloat16_runs_keep_what_16_bit_images_need(base):
    z, x = latents(8, 8), latents(8, 8).to(memory_format=torch.channels_last)
    expected, image = base.denoiser(x, T), base.autoencoder.decode(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(base.autoencoder.decode(z), image)
        found = base.denoiser(x, T)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0)


@torch.no_grad()
def test_color_images_keep_their_channels(saved_pipeline, pipeline):
    autoencoder = read_latent_base(saved_pipeline, image_channels=3).autoencoder
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mean, _ = autoencoder.encode(image)
    assert torch.equal(mean, pipeline.vae.encode(image).latent_dist.mean)
    assert torch.equal(autoencoder.decode(mean), pipeline.vae.decode(mean).sample)
    with pytest.raises(ValueError, match="expected images of 3 channels, got 1"):
        autoencoder.encode(image[:, :1])
    with pytest.raises(BadInputError, match=r"image channels: expected 1 or 3 .*, got 2"):
        read_latent_base(saved_pipeline, image_channels=2)


@torch.no_grad()
def test_a_memory_bound_decodes_image_by_image_or_says_what_it_takes(base):
    z = latents(8, 8)
    torch.testing.assert_close(base.autoencoder.decode(z, max_memory_gb=1), base.autoencoder.decode(z))
    with pytest.raises(BadInputError, match=r"max_memory_gb: expected at least 0\.15 for 2 images of 256 pixels"):
        base.autoencoder.decode(z, max_memory_gb=0.01)


@torch.no_grad()
def test_a_sample_equals_one_of_the_pipeline(base, pipeline):
    start, words = latents(8, 8), text(base)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True
    )
    expected = pipeline(
        prompt_embeds=words, latents=start, guidance_scale=1.0, num_inference_steps=10, output_type="pt"
    ).images
    drawn = sample(
        lambda x, t: base.denoiser(x, t, {"text": words}),
        start,
        objective=Objective(**base.objective),
        sampler="ddim",
        spacing="uniform",
        num_inference_steps=10,
    )
    image = (base.autoencoder.decode(drawn / base.latent_scale[0]) / 2 + 0.5).clamp(0, 1)
    # The pipeline clamps each color, medgen their mean.
    inside = ((expected > 0) & (expected < 1)).all(1, keepdim=True)
    assert inside.float().mean() > 0.5 and expected.std() > 0.02
    torch.testing.assert_close(image[inside], expected.mean(1, keepdim=True)[inside], atol=1e-4, rtol=0)


@torch.no_grad()
def test_all_three_reload_bit_for_bit_in_another_process(base, tmp_path):
    control = LatentBaseControl.of(base.denoiser, "edge")
    for row in (*control.controlnet.controlnet_down_blocks, control.controlnet.controlnet_mid_block):
        torch.nn.init.normal_(row.weight)
    networks = {"denoiser": base.denoiser, "autoencoder": base.autoencoder, "control": control}
    write_bundle(
        tmp_path / "bundle", {name: networks[name] for name in ("denoiser", "autoencoder")}, {}, dtype=torch.float32
    )
    bundle = read_bundle(tmp_path / "bundle")
    copy = LatentBaseDenoiser.from_pretrained(bundle.networks["denoiser"])
    assert torch.equal(copy(latents(8, 8), T), base.denoiser(latents(8, 8), T))
    for name, network in networks.items():
        network.save_pretrained(tmp_path / name)
    inputs = {"x": latents(8, 8), "t": T, "edge": edges(16, 16)}
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; from pathlib import Path; torch.set_grad_enabled(False)\n"
        "from medgen.networks.latent_base import LatentBaseAutoencoder as A, LatentBaseDenoiser as D\n"
        "from medgen.networks.latent_control import LatentBaseControl as C\n"
        "p = Path(sys.argv[1]); d = torch.load(p / 'inputs.pt')\n"
        "kinds = {'autoencoder': A, 'denoiser': D, 'control': C}\n"
        "a, n, c = (kind.from_pretrained(p / name).eval() for name, kind in kinds.items())\n"
        "out = n(d['x'], d['t'], residuals=[c(d['x'], d['t'], {'edge': d['edge']})])\n"
        "torch.save([out, a.decode(out)], p / 'out.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    out = base.denoiser(inputs["x"], T, residuals=[control(inputs["x"], T, {"edge": inputs["edge"]})])
    assert (out - base.denoiser(inputs["x"], T)).abs().max() > 1e-4
    for found, expected in zip(torch.load(tmp_path / "out.pt"), [out, base.autoencoder.decode(out)], strict=True):
        assert torch.equal(found, expected)


def test_a_denoiser_without_its_base_can_be_built_from_sizes_alone():
    unet = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }
    shared = {"norm_num_groups": 2, "attention_head_dim": 2, "layers_per_block": 1}
    network = LatentBaseDenoiser(settings=unet | shared, mask_stride=2, text_length=5, text_width=6)
    assert network(latents(4, 4), T).shape == (2, 4, 4, 4)
    assert LatentBaseAutoencoder(settings={"block_out_channels": (32,)}).config["latent_channels"] == 4
