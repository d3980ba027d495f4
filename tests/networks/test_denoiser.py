"""The denoiser: any size, a mask that acts, and an absent mask that is one thing however it is said."""

import pytest
import torch

from medgen.networks import Denoiser

SIZES = {2: (10, 9), 3: (6, 5, 7)}


@pytest.fixture(params=[2, 3])
def denoiser(request):
    torch.manual_seed(0)
    network = Denoiser(
        spatial_dims=request.param,
        in_channels=2,
        channels=(8, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=4,
        norm_num_groups=4,
        mask_classes=3,
        mask_channels=4,
        mask_stride=2,
    )
    for parameter in network.parameters():  # MONAI starts its last convolutions at zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def inputs(denoiser):
    size = SIZES[denoiser.config["spatial_dims"]]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, *size, generator=draw)
    label = torch.randint(0, 3, (2, *[2 * length for length in size]), generator=draw)
    mask = torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float()
    return x, torch.tensor([3.0, 800.0]), mask


@torch.no_grad()
def test_sizes_that_do_not_divide_come_back_at_their_size(denoiser):
    x, t, mask = inputs(denoiser)
    assert denoiser(x, t, mask).shape == x.shape


@torch.no_grad()
def test_changing_one_voxel_of_the_mask_changes_the_output(denoiser):
    x, t, mask = inputs(denoiser)
    other = mask.clone()
    other[(0, slice(None), *[5] * denoiser.config["spatial_dims"])] = torch.tensor([0.0, 0.0, 1.0])
    other[(0, slice(None), *[4] * denoiser.config["spatial_dims"])] = torch.tensor([0.0, 1.0, 0.0])
    changed = (denoiser(x, t, other) - denoiser(x, t, mask)).abs().flatten(1).amax(1)
    assert changed[0] > 1e-5
    assert changed[1] == 0


@torch.no_grad()
def test_a_missing_mask_equals_a_mask_of_zeros_and_differs_from_background(denoiser):
    x, t, mask = inputs(denoiser)
    background = torch.zeros_like(mask)
    background[:, 0] = 1
    absent = denoiser(x, t, None)
    assert torch.equal(absent, denoiser(x, t, torch.zeros_like(mask)))
    assert (absent - denoiser(x, t, background)).abs().max() > 1e-4


def test_a_mask_of_the_wrong_size_is_refused(denoiser):
    x, t, mask = inputs(denoiser)
    with pytest.raises(ValueError, match=r"expected a mask of shape .* got"):
        denoiser(x, t, mask[..., :-1])


def test_checkpointed_gradients_equal_the_plain_ones(denoiser):
    x, t, mask = inputs(denoiser)
    denoiser(x, t, mask).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None]
    denoiser.zero_grad()
    denoiser.checkpoint_blocks()
    denoiser(x, t, mask).square().mean().backward()
    again = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_training_in_bfloat16_attends_by_plain_products_and_recomputes_alike(denoiser):
    x, t, mask = inputs(denoiser)

    def gradients():
        denoiser.zero_grad()
        with torch.profiler.profile() as profile, torch.autocast("cpu", dtype=torch.bfloat16):
            denoiser(x, t, mask).square().mean().backward()
        names = {event.key for event in profile.key_averages()}
        fused = any("flash_attention" in name for name in names)
        return [p.grad for p in denoiser.parameters() if p.grad is not None], fused

    plain, fused = gradients()
    assert not fused
    denoiser.checkpoint_blocks()  # these run again outside the forward pass
    again, fused = gradients()
    assert fused
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * float(a.abs().max()) + 1e-6)
