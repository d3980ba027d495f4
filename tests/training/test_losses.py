"""Losses and the cache's augmentation against torch, by hand, and against each other."""

import torch

from medgen.planning import DenoiserPlan
from medgen.training.augment import augment
from medgen.training.autoencoder import discriminator_loss, kl_divergence
from medgen.training.cache import crop_to
from medgen.training.denoiser import diffusion_loss


def test_kl_divergence_equals_that_of_torch_distributions():
    draw = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 3, 4, 4, generator=draw), torch.rand(2, 3, 4, 4, generator=draw) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(mean, std), expected)


def test_the_discriminator_loss_is_zero_beyond_the_hinge_and_one_for_a_blind_network():
    image = torch.ones(1, 1, 4, 4)
    perfect = discriminator_loss(lambda x: [x * 2 - (x < 1) * 3.0], image, torch.zeros_like(image))
    blind = discriminator_loss(lambda x: [torch.zeros_like(x)], image, image)
    assert perfect == 0
    assert blind == 1


def test_the_diffusion_loss_is_the_weighted_mean_of_each_sample():
    output, target = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    region = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(2, 1, 2, 2)
    target[:, :, 0, 0] = 3.0
    loss = diffusion_loss(output, target, torch.tensor([1.0, 0.5]), region)
    torch.testing.assert_close(loss, torch.tensor([5.0, 2.5]))


def test_augmentation_moves_image_and_label_together_and_never_mirrors():
    label = torch.zeros(24, 24, 24, dtype=torch.uint8)
    label[4:10, 8:16, 8:16] = 1  # off center along the first axis: a mirrored copy would be seen
    tensors = {"image": label[None] * 2.0 - 1, "label": label, "valid": torch.ones(24, 24, 24, dtype=torch.bool)}
    plan = DenoiserPlan(rotation=10, scaling=0.1)
    moved = [augment(tensors, plan, seed, (1.0, 1.0, 1.0)) for seed in range(6)]
    for row in moved:
        agree = ((row["image"][0] > 0) == (row["label"] > 0)).float().mean()
        assert agree > 0.99
        assert row["label"][:12].sum() > 5 * row["label"][12:].sum()
    assert not torch.equal(moved[0]["label"], moved[1]["label"])
    assert torch.equal(augment(tensors, plan, 3, (1.0, 1.0, 1.0))["image"], moved[3]["image"])


def test_crops_keep_tensors_together_and_leave_short_axes_whole():
    tensors = {"image": torch.arange(60.0).view(1, 10, 6), "label": torch.arange(60).view(10, 6)}
    crop = crop_to(tensors, (4, 8), torch.Generator().manual_seed(1))
    assert crop["image"].shape == (1, 4, 6)
    assert torch.equal(crop["image"][0].long(), crop["label"])
