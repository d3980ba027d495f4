"""LoRA: only its weights learn, and its files are those of diffusers."""

from __future__ import annotations

import builtins
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medgen.networks import Denoiser
from medgen.networks.latent_folder import read_latent_base
from medgen.networks.lora import LORA_FILE, add_lora, load_lora, merge_lora, save_lora
from medgen.types import BadInputError

pytest.importorskip("peft")
T = torch.tensor([3.0, 800.0])


@pytest.fixture
def denoiser(saved_pipeline):
    return read_latent_base(saved_pipeline).denoiser


@pytest.fixture
def own():
    torch.manual_seed(0)
    network = Denoiser(
        spatial_dims=3,
        in_channels=2,
        channels=(8, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        num_head_channels=4,
        norm_num_groups=4,
        text_length=4,
        text_width=6,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def inputs(network):
    draw = torch.Generator().manual_seed(0)
    channels, size = network.config["in_channels"], (8,) * network.config["spatial_dims"]
    shape = network.condition_shapes(size)["text"]
    return torch.randn(2, channels, *size, generator=draw), torch.randn(2, *shape, generator=draw)


def output(network):
    x, words = inputs(network)
    with torch.no_grad():
        return network(x, T, {"text": words})


def train(network, steps=2):
    x, words = inputs(network)
    optimizer = torch.optim.AdamW([part for part in network.parameters() if part.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (network(x, T, {"text": words}) - 1).square().mean().backward()
        optimizer.step()


def weights_without_lora(network):
    return {
        name.replace(".base_layer", ""): part.clone()
        for name, part in network.state_dict().items()
        if ".lora_" not in name
    }


@pytest.mark.parametrize("kind", ["denoiser", "own"])
def test_only_lora_weights_learn_and_they_start_as_nothing(kind, request):
    network = request.getfixturevalue(kind)
    before, frozen = output(network), weights_without_lora(network)
    layers = add_lora(network, rank=2)
    assert {name.rpartition("attn")[2][2:] for name in layers} >= {"to_q", "to_k", "to_v"}
    assert torch.equal(output(network), before)
    trained = [name for name, part in network.named_parameters() if part.requires_grad]
    assert len(trained) == 2 * len(layers) and all(".lora_" in name for name in trained)
    train(network)
    assert (output(network) - before).abs().max() > 1e-4
    now = weights_without_lora(network)
    assert all(torch.equal(now[name], part) for name, part in frozen.items())


@pytest.mark.parametrize("kind", ["denoiser", "own"])
def test_merged_weights_compute_the_same_without_lora_layers(kind, request):
    network = request.getfixturevalue(kind)
    names = set(network.state_dict())
    add_lora(network, rank=2)
    train(network)
    before = output(network)
    assert merge_lora(network) is network
    torch.testing.assert_close(output(network), before, atol=1e-5, rtol=1e-4)
    assert set(network.state_dict()) == names
    assert all(part.requires_grad for part in network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of an adapter that is still known
        add_lora(network, rank=1)


@torch.no_grad()
def test_plain_diffusers_loads_it_back(denoiser, pipeline, tmp_path):
    plain = output(denoiser)
    with torch.enable_grad():
        add_lora(denoiser, rank=3)
        train(denoiser)
    path = save_lora(denoiser, tmp_path / "lora")
    assert path == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    pipeline.load_lora_weights(tmp_path / "lora", local_files_only=True)
    x, words = inputs(denoiser)
    expected = pipeline.unet(x, T, encoder_hidden_states=words).sample
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(output(denoiser), expected)


@pytest.mark.parametrize("kind", ["denoiser", "own"])
def test_saved_weights_load_into_a_fresh_network(kind, request, tmp_path):
    network = request.getfixturevalue(kind)
    plain = {name: part.clone() for name, part in network.state_dict().items()}
    layers = add_lora(network, rank=2)
    train(network)
    save_lora(network, tmp_path)
    fresh = type(network).from_config(dict(network.config)).eval()
    fresh.load_state_dict(plain)
    assert sorted(load_lora(fresh, tmp_path)) == sorted(layers)
    assert torch.equal(output(fresh), output(network))
    assert {name for name, part in fresh.named_parameters() if part.requires_grad} == {
        name for name, part in network.named_parameters() if part.requires_grad
    }


@torch.no_grad()
def test_a_lora_of_diffusers_with_mixed_ranks_and_an_alpha_loads_here(denoiser, pipeline, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.loaders.lora_base import _pack_dict_with_prefix
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 3})
    pipeline.unet.add_adapter(config)
    for name, part in pipeline.unet.named_parameters():
        if ".lora_" in name:
            part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(2)))
    metadata = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "conv1"], "rank_pattern": {"conv1": 3}}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), unet_lora_adapter_metadata=metadata
    )
    with safe_open(tmp_path / LORA_FILE, framework="pt") as handle:
        assert json.loads(handle.metadata()["lora_adapter_metadata"]) == _pack_dict_with_prefix(metadata, "unet")
    layers = load_lora(denoiser, tmp_path)
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "conv1"}
    x, words = inputs(denoiser)
    torch.testing.assert_close(output(denoiser), pipeline.unet(x, T, words).sample, atol=1e-5, rtol=1e-5)


def test_targets_that_do_not_exist_are_refused_with_those_that_do(denoiser, own):
    with pytest.raises(BadInputError, match=r"got query\. There are .*conv1, .*to_k, to_out\.0, to_q, to_v"):
        add_lora(denoiser, targets=["to_q", "query"])
    with pytest.raises(BadInputError, match=r"of Denoiser, got to_out\.0\. There are .*out_proj"):
        add_lora(own, targets=["to_out.0"])
    with pytest.raises(BadInputError, match=r"ends of names of layers of Sequential, got none\. There are no layers"):
        add_lora(torch.nn.Sequential(torch.nn.ReLU()))
    with pytest.raises(BadInputError, match="rank: expected 1 or more, got 0"):
        add_lora(denoiser, rank=0)
    assert add_lora(denoiser, targets=["attn2.to_k", "conv_in"])[0] == "unet.conv_in"


def test_what_cannot_be_added_saved_or_merged_is_said(denoiser, tmp_path):
    with pytest.raises(BadInputError, match="LatentBaseDenoiser: expected LoRA weights to save, got none"):
        save_lora(denoiser, tmp_path)
    with pytest.raises(BadInputError, match="expected LoRA weights to merge, got none"):
        merge_lora(denoiser)
    add_lora(denoiser)
    with pytest.raises(BadInputError, match="expected no LoRA weights yet, got some"):
        add_lora(denoiser)


def test_files_that_are_no_lora_of_this_network_are_refused(denoiser, own, tmp_path):
    add_lora(own)
    save_lora(own, tmp_path)
    with pytest.raises(BadInputError, match=r"for this LatentBaseDenoiser, got weights for network\.\S+, network"):
        load_lora(denoiser, tmp_path)
    path, key = tmp_path / LORA_FILE, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"

    def refused(message, metadata=None, **weights):
        save_file(weights, path, metadata=metadata)
        with pytest.raises(BadInputError, match=message):
            load_lora(denoiser, path)

    a, b = torch.zeros(2, 16), torch.zeros(16, 2)
    whole = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    refused(
        r"shapes \(2, 16\) and \(16, 2\), got \(2, 9\) and \(16, 2\)",
        **(whole | {f"{key}.lora_A.weight": a[:, :9].clone()}),
    )
    refused("expected lora_A and lora_B for every layer, got one of them for unet", **{f"{key}.lora_A.weight": a})
    refused("got lora_unet_down.alpha: another format", **{"lora_unet_down.alpha": a})
    dora = {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})}
    refused("expected a plain LoRA, got one with use_dora", dora, **whole)
    path.write_bytes(b"no weights")
    with pytest.raises(BadInputError, match="expected safetensors, got a damaged file"):
        load_lora(denoiser, path)
    path.rename(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(BadInputError, match=r"got no such file\. pytorch_lora_weights\.bin is a pickle"):
        load_lora(denoiser, tmp_path)
    assert "peft_config" not in vars(denoiser) and not any(".lora_" in name for name in denoiser.state_dict())


def test_a_missing_peft_says_how_to_get_it(denoiser, monkeypatch):
    found = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadInputError, match=r"expected the package peft, got none\. Run: pip install 'medgen\[lora\]'"):
        add_lora(denoiser)


def test_the_file_holds_nothing_but_lora_weights(denoiser, tmp_path):
    layers = add_lora(denoiser, rank=2)
    weights = load_file(save_lora(denoiser, tmp_path))
    assert set(weights) == {f"{name}.lora_{part}.weight" for name in layers for part in "AB"}
