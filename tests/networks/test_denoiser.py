"""The denoiser: any size, conditions that act, and an absent one that is one thing however it is said."""

import pytest
import torch

from medgen.networks import Denoiser

SIZES = {2: (10, 9), 3: (6, 5, 7)}
CONDITIONS = ("mask", "edge", "text", "age", "view")


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
        augmentation_flag=True,
        edges=True,
        text_length=4,
        text_width=6,
        attributes={"age": 3, "view": 2},
    )
    for parameter in network.parameters():  # MONAI starts its last convolutions at zero, which would hide everything
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def inputs(denoiser):
    size = SIZES[denoiser.config["spatial_dims"]]
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, *size, generator=draw)
    whole = [2 * length for length in size]
    label = torch.randint(0, 3, (2, *whole), generator=draw)
    parts = {
        "mask": torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float(),
        "edge": torch.cat([torch.rand(2, 1, *whole, generator=draw), torch.ones(2, 1, *whole)], dim=1),
        "text": torch.randn(2, 4, 6, generator=draw),
        "age": torch.randn(2, 3, generator=draw),
        "view": torch.eye(2),
    }
    assert {name: tuple(part.shape[1:]) for name, part in parts.items()} == denoiser.condition_shapes(size)
    return x, torch.tensor([3.0, 800.0]), parts


@torch.no_grad()
def test_sizes_that_do_not_divide_come_back_at_their_size(denoiser):
    x, t, parts = inputs(denoiser)
    assert denoiser(x, t, parts).shape == x.shape


@torch.no_grad()
def test_changing_one_voxel_of_the_mask_changes_the_output(denoiser):
    x, t, parts = inputs(denoiser)
    other = parts["mask"].clone()
    other[(0, slice(None), *[5] * denoiser.config["spatial_dims"])] = torch.tensor([0.0, 0.0, 1.0])
    other[(0, slice(None), *[4] * denoiser.config["spatial_dims"])] = torch.tensor([0.0, 1.0, 0.0])
    changed = (denoiser(x, t, parts | {"mask": other}) - denoiser(x, t, parts)).abs().flatten(1).amax(1)
    assert changed[0] > 1e-5
    assert changed[1] == 0


@pytest.mark.parametrize("name", CONDITIONS)
@torch.no_grad()
def test_every_condition_acts_alone_and_beside_the_others(denoiser, name):
    x, t, parts = inputs(denoiser)
    swapped = parts[name].flip(0)
    for others in ({}, {key: part for key, part in parts.items() if key != name}):
        first, second = denoiser(x, t, others | {name: parts[name]}), denoiser(x, t, others | {name: swapped})
        assert (first - second).abs().flatten(1).amax(1).min() > 1e-5
        assert (first - denoiser(x, t, others)).abs().flatten(1).amax(1).min() > 1e-5


@pytest.mark.parametrize("name", CONDITIONS)
@torch.no_grad()
def test_a_missing_condition_equals_one_of_zeros(denoiser, name):
    x, t, parts = inputs(denoiser)
    others = {key: part for key, part in parts.items() if key != name}
    absent = denoiser(x, t, others)
    assert torch.equal(absent, denoiser(x, t, others | {name: torch.zeros_like(parts[name])}))
    one = parts[name].clone()
    one[0] = 0  # absent for one sample only
    mixed = denoiser(x, t, others | {name: one})
    torch.testing.assert_close(mixed[0], absent[0])
    torch.testing.assert_close(mixed[1], denoiser(x, t, parts)[1])


@torch.no_grad()
def test_no_edges_and_background_differ_from_no_map(denoiser):
    x, t, parts = inputs(denoiser)
    background, blank = torch.zeros_like(parts["mask"]), torch.zeros_like(parts["edge"])
    background[:, 0], blank[:, 1] = 1, 1
    absent = denoiser(x, t)
    for found in (denoiser(x, t, {"mask": background}), denoiser(x, t, {"edge": blank})):
        assert (absent - found).abs().max() > 1e-4


def test_conditions_that_do_not_fit_are_refused(denoiser):
    x, t, parts = inputs(denoiser)
    with pytest.raises(ValueError, match=r"expected a condition 'mask' of shape .* got"):
        denoiser(x, t, {"mask": parts["mask"][..., :-1]})
    with pytest.raises(ValueError, match="expected conditions among mask, edge, text, age, view, got sex"):
        denoiser(x, t, {"sex": parts["view"]})


def test_checkpointed_gradients_equal_the_plain_ones(denoiser):
    x, t, parts = inputs(denoiser)
    denoiser(x, t, parts).square().mean().backward()
    plain = [parameter.grad.clone() for parameter in denoiser.parameters() if parameter.grad is not None]
    denoiser.zero_grad()
    denoiser.checkpoint_blocks()
    denoiser(x, t, parts).square().mean().backward()
    again = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_training_in_bfloat16_attends_by_plain_products_and_recomputes_alike(denoiser):
    x, t, parts = inputs(denoiser)

    def gradients():
        denoiser.zero_grad()
        with torch.profiler.profile() as profile, torch.autocast("cpu", dtype=torch.bfloat16):
            denoiser(x, t, parts).square().mean().backward()
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


@torch.no_grad()
def test_attributes_keep_their_places_when_it_is_saved(tmp_path):
    torch.manual_seed(0)
    network = Denoiser(
        spatial_dims=2,
        in_channels=1,
        channels=(8, 8),
        attention_levels=(False, False),
        num_res_blocks=1,
        num_head_channels=4,
        norm_num_groups=4,
        attributes={"view": 2, "age": 2},  # not in the order of their names
    ).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(tmp_path)
    parts = {"view": torch.tensor([[1.0, 0.0]]), "age": torch.tensor([[0.0, 1.0]])}
    x, t = torch.ones(1, 1, 4, 4), torch.tensor([5.0])
    torch.testing.assert_close(Denoiser.from_pretrained(tmp_path).eval()(x, t, parts), network(x, t, parts))
