"""Control branches: nothing added untrained or without a map, the base untouched, two stacked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from medgen.networks import Control, Denoiser

SIZES = {2: (10, 9), 3: (6, 5, 7)}


@pytest.fixture(params=[2, 3])
def base(request):
    torch.manual_seed(0)
    network = Denoiser(
        spatial_dims=request.param,
        in_channels=2,
        channels=(8, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=4,
        norm_num_groups=4,
        mask_stride=2,
        augmentation_flag=True,
        text_length=4,
        text_width=6,
        attributes={"view": 2},
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def inputs(base):
    size = SIZES[base.config["spatial_dims"]]
    whole = [2 * length for length in size]
    draw = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, *whole), generator=draw)
    parts = {"text": torch.randn(2, 4, 6, generator=draw), "view": torch.eye(2)}
    maps = {
        "mask": torch.nn.functional.one_hot(label, 3).movedim(-1, 1).float(),
        "edge": torch.cat([torch.rand(2, 1, *whole, generator=draw), torch.ones(2, 1, *whole)], dim=1),
    }
    return torch.randn(2, 2, *size, generator=draw), torch.tensor([3.0, 800.0]), parts, maps


def trained(base, name):
    control = Control.of(base, name, mask_classes=3 if name == "mask" else 0).eval()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return control


@pytest.mark.parametrize("name", ["mask", "edge"])
@torch.no_grad()
def test_an_untrained_branch_adds_nothing(base, name):
    x, t, parts, maps = inputs(base)
    control = Control.of(base, name, mask_classes=3)
    residuals = control(x, t, parts | {name: maps[name]})
    assert torch.equal(base(x, t, parts, residuals=[residuals]), base(x, t, parts))
    shared = control.network.down_blocks[0].resnets[0].conv1.conv.weight
    assert torch.equal(shared, base.network.down_blocks[0].resnets[0].conv1.conv.weight)


@pytest.mark.parametrize("name", ["mask", "edge"])
@torch.no_grad()
def test_a_branch_acts_by_its_map_and_by_nothing_else_where_there_is_none(base, name):
    x, t, parts, maps = inputs(base)
    control = trained(base, name)

    def output(part, scale=1.0):
        return base(x, t, parts, residuals=[control(x, t, parts | {name: part}, conditioning_scale=scale)])

    plain, steered = base(x, t, parts), output(maps[name])
    assert (steered - plain).abs().flatten(1).amax(1).min() > 1e-4
    assert (steered - output(maps[name].flip(0))).abs().max() > 1e-4
    half = maps[name].clone()
    half[0] = 0
    found = output(half)
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(found[1], steered[1])
    assert torch.equal(output(maps[name], 0.0), plain)
    weak = output(maps[name], 0.1)
    assert 0 < (weak - plain).abs().max() < (steered - plain).abs().max()


@torch.no_grad()
def test_in_half_precision_a_branch_hands_half_precision_to_its_base(base):
    x, t, parts, maps = inputs(base)
    control = trained(base, "mask")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        down, middle = control(x, t, {**parts, "mask": maps["mask"]}, conditioning_scale=0.7)
    # Else every activation of the base's second half would be float32, at twice the memory.
    assert {row.dtype for row in [*down, middle]} == {torch.bfloat16}


@torch.no_grad()
def test_two_branches_stack_and_their_order_does_not_matter(base):
    x, t, parts, maps = inputs(base)
    rows = [trained(base, name)(x, t, parts | {name: maps[name]}) for name in ("mask", "edge")]
    both = base(x, t, parts, residuals=rows)
    torch.testing.assert_close(both, base(x, t, parts, residuals=rows[::-1]))
    for row in rows:
        assert (both - base(x, t, parts, residuals=[row])).abs().max() > 1e-4


def test_only_the_branch_learns_when_its_base_is_frozen(base):
    x, t, parts, maps = inputs(base)
    control = trained(base, "mask").train()
    base.requires_grad_(False)
    base(x, t, parts, residuals=[control(x, t, parts | {"mask": maps["mask"]})]).square().mean().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert sum(parameter.grad is not None for parameter in control.parameters()) > 10


@torch.no_grad()
def test_a_branch_reloads_bit_for_bit_in_another_process(base, tmp_path):
    x, t, parts, maps = inputs(base)
    control = trained(base, "edge")
    control.save_pretrained(tmp_path / "control")
    torch.save({"x": x, "t": t, **parts, **maps}, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; from medgen.networks import Control;"
        "c = Control.from_pretrained(sys.argv[1]).eval(); d = torch.load(sys.argv[2]);"
        "torch.set_grad_enabled(False);"
        "torch.save(c(d['x'], d['t'], {k: d[k] for k in ('edge', 'text', 'view')})[1], sys.argv[3])"
    )
    names = [str(tmp_path / name) for name in ("control", "inputs.pt", "middle.pt")]
    subprocess.run([sys.executable, "-c", code, *names], check=True)
    middle = control(x, t, parts | {"edge": maps["edge"]})[1]
    assert torch.equal(torch.load(tmp_path / "middle.pt"), middle)


def test_a_branch_of_an_unknown_kind_is_refused(base):
    with pytest.raises(ValueError, match="expected a control by 'mask' or 'edge', got 'depth'"):
        Control.of(base, "depth")
