"""Control branches of Stable Diffusion: the residuals of diffusers, nothing without a map, others refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import ControlNetModel

from medgen.networks.latent_control import LatentBaseControl
from medgen.networks.latent_folder import read_control, read_latent_base
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
def test_controlnet_gives_the_residuals_of_diffusers(base, pipeline, tmp_path):
    controlnet = ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16))
    for parameter in controlnet.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    controlnet.save_pretrained(tmp_path / "control")
    control = read_control(tmp_path / "control", base.denoiser)
    x, words, edge = latents(8, 8), text(base), edges(16, 16)
    picture = edge[:, :1].repeat(1, 3, 1, 1)
    down, middle = controlnet(x, T, words, picture, return_dict=False)
    found = control(x, T, {"text": words, "edge": edge, "view": torch.ones(2, 1)})
    assert all(torch.equal(row, other) for row, other in zip(found[0], down, strict=True))
    assert torch.equal(found[1], middle)
    empty = base.denoiser.empty_text.expand(2, -1, -1)
    assert torch.equal(control(x, T, {"edge": edge})[1], controlnet(x, T, empty, picture).mid_block_res_sample)
    steered = pipeline.unet(
        x, T, words, down_block_additional_residuals=down, mid_block_additional_residual=middle
    ).sample
    plain = base.denoiser(x, T, {"text": words})
    assert torch.equal(base.denoiser(x, T, {"text": words}, residuals=[found]), steered)
    assert (steered - plain).abs().max() > 1e-3

    half = edge.clone()
    half[0] = 0
    partly = base.denoiser(x, T, {"text": words}, residuals=[control(x, T, {"text": words, "edge": half})])
    torch.testing.assert_close(partly, torch.stack([plain[0], steered[1]]))
    twice = control(x, T, {"text": words, "edge": edge}, conditioning_scale=0.5)
    assert torch.equal(base.denoiser(x, T, {"text": words}, residuals=[twice, twice]), steered)
    picked = read_control(tmp_path / "control", base.denoiser, condition="depth")
    assert torch.equal(picked(x, T, {"text": words, "depth": picture})[1], middle)
    uneven = control(latents(7, 9), T, {"edge": edges(14, 18)})
    assert base.denoiser(latents(7, 9), T, residuals=[uneven]).shape == (2, 4, 7, 9)


@pytest.mark.parametrize(("name", "classes"), [("edge", 0), ("mask", 5)])
@torch.no_grad()
def test_a_new_control_adds_nothing_and_learns(base, name, classes):
    x = latents(8, 8)
    control = LatentBaseControl.of(base.denoiser, name, mask_classes=classes)
    part = (
        edges(16, 16)
        if name == "edge"
        else torch.eye(5)[torch.arange(256) % 5].T.reshape(1, 5, 16, 16).repeat(2, 1, 1, 1)
    )
    assert torch.equal(base.denoiser(x, T, residuals=[control(x, T, {name: part})]), base.denoiser(x, T))
    assert torch.equal(control.controlnet.conv_in.weight, base.denoiser.unet.conv_in.weight)
    with torch.enable_grad():
        base.denoiser(x, T, residuals=[control(x, T, {name: part})]).square().mean().backward()
    assert control.controlnet.controlnet_down_blocks[0].weight.grad.abs().max() > 0
    base.denoiser.zero_grad()
    with pytest.raises(ValueError, match="expected a control by 'mask' or 'edge', got 'depth'"):
        LatentBaseControl.of(base.denoiser, "depth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_out_channels": (8, 8)}, r"with block_out_channels \(8, 16\), got \(8, 8\)"),
        ({"cross_attention_dim": 24}, "with cross_attention_dim 16, got 24"),
        ({"conditioning_embedding_out_channels": (8, 8, 8)}, "with map voxels per latent voxel 2, got 4"),
    ],
)
def test_controlnets_of_another_base_are_refused(base, tmp_path, arguments, message):
    sizes = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 16,
        "conditioning_embedding_out_channels": (8, 8),
    }
    ControlNetModel(**(sizes | arguments)).save_pretrained(tmp_path)
    with pytest.raises(BadInputError, match=f"expected a ControlNet for this base, {message}"):
        read_control(tmp_path, base.denoiser)


def test_a_folder_of_another_network_is_no_controlnet(base, saved_pipeline):
    with pytest.raises(BadInputError, match="expected a ControlNetModel of diffusers, got AutoencoderKL"):
        read_control(saved_pipeline / "vae", base.denoiser)
    with pytest.raises(BadInputError, match=r"config\.json: expected the folder of a diffusers ControlNet"):
        read_control(saved_pipeline, base.denoiser)
