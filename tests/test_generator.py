"""The bundle: what goes in comes out, in a fresh process too, and damage is noticed."""

import json
import subprocess
import sys

import pytest
import torch

from medgen.conditions.condition import Condition
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Autoencoder, Denoiser
from medgen.types import BadInputError


@pytest.fixture
def generator():
    torch.manual_seed(0)
    small = {"spatial_dims": 2, "channels": (8, 8), "attention_levels": (False, False), "num_res_blocks": 1}
    small |= {"norm_num_groups": 4, "num_head_channels": 4, "mask_channels": 4}
    config = GeneratorConfig(
        name="tiny",
        spatial_dims=2,
        channel_names={0: "MR"},
        class_names={0: "background", 4: "liver", 7: "tumor"},
        size=(16, 16),
        objective=Objective(prediction="v_prediction"),
        normalization=Normalization(),
        intensity=IntensityMap((0.02,), (-1.0,)),
        latent_scale=(0.5, 2.0),
        latent_shift=(0.1, -0.2),
        label_objective=Objective(),
        label_stride=2,
        shapes=((15, 16),),
        constant_classes=(4,),
    )
    return Generator(
        config,
        Denoiser(in_channels=2, mask_classes=3, mask_stride=2, **small),
        Autoencoder(spatial_dims=2, channels=(8, 8), latent_channels=2),
        Denoiser(in_channels=3, mask_classes=1, mask_stride=2, **small),
    )


@torch.no_grad()
def outputs(generator):
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, 1, 16, 16, generator=draw) * 2 - 1
    latents = generator.encode(image)
    mask = torch.ones(1, 3, 16, 16)
    denoised = generator.denoise(latents, torch.tensor([500.0]), Condition(mask))
    label = generator.denoise_label(torch.ones(1, 3, 8, 8), torch.tensor([10.0]), torch.ones(1, 1, 16, 16))
    return torch.cat([value.flatten() for value in (latents, generator.decode(latents), denoised, label)])


def test_settings_and_networks_survive_a_round_trip(generator, tmp_path):
    generator.save_pretrained(tmp_path / "model")
    again = Generator.from_pretrained(tmp_path / "model")
    assert again.config == generator.config
    assert again.weights_hash == generator.weights_hash
    assert torch.equal(outputs(again), outputs(generator))


def test_a_fresh_process_gives_the_same_bits(generator, tmp_path):
    generator.save_pretrained(tmp_path / "model", dtype=torch.float16)
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from medgen.generator import Generator; from medgen.conditions.condition import Condition\n"
        "g = Generator.from_pretrained(sys.argv[1] + '/model')\n"
        "with torch.no_grad(): y = g.denoise(torch.ones(1, 2, 8, 8), torch.tensor([5.0]), Condition())\n"
        "torch.save(y, sys.argv[1] + '/y.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    here = Generator.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        y = here.denoise(torch.ones(1, 2, 8, 8), torch.tensor([5.0]), Condition())
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), y)


def test_saving_over_an_older_bundle_replaces_it(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    generator.label_denoiser = None
    generator.save_pretrained(tmp_path)
    assert Generator.from_pretrained(tmp_path).label_denoiser is None
    assert not (tmp_path / "label_denoiser").exists()


def test_latents_are_shifted_and_scaled_per_channel_and_back(generator):
    image = torch.rand(1, 1, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = generator.autoencoder.encode(image)[0]
        latents = generator.encode(image)
        decoded = generator.decode(latents)
        expected = generator.autoencoder.decode(raw).clamp(-1, 1)
    scale, shift = torch.tensor([0.5, 2.0]).view(1, 2, 1, 1), torch.tensor([0.1, -0.2]).view(1, 2, 1, 1)
    torch.testing.assert_close(latents, (raw - shift) * scale)
    torch.testing.assert_close(decoded, expected, rtol=1e-5, atol=1e-5)


def test_label_values_and_indices_map_both_ways(generator):
    label = torch.tensor([[0, 4], [7, 4]], dtype=torch.int16)
    index = generator.label_to_index(label)
    assert index.tolist() == [[0, 1], [2, 1]]
    assert torch.equal(generator.index_to_label(index), label)


def test_undeclared_label_values_are_named(generator):
    with pytest.raises(BadInputError, match=r"expected values among \[0, 4, 7\], got \[5, 9\]"):
        generator.label_to_index(torch.tensor([5, 4, 9]))


def test_label_maps_survive_the_label_generators_space(generator):
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    label = ((rows - 14) ** 2 + (columns - 17) ** 2 < 81).long() + ((rows - 14) ** 2 + (columns - 17) ** 2 < 20).long()
    again = generator.decode_label(generator.encode_label(label)[None])[0]
    assert (again == label).float().mean() > 0.98
    for value in (1, 2):
        a, b = again == value, label == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95


@pytest.mark.parametrize("part", ["denoiser", "autoencoder", "label_denoiser"])
def test_a_damaged_weight_file_is_named(generator, tmp_path, part):
    generator.save_pretrained(tmp_path)
    path = tmp_path / part / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=rf"{part}.*expected SHA-256 .*the file is damaged"):
        Generator.from_pretrained(tmp_path)


def test_a_missing_weight_file_is_named(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    (tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"safetensors: expected this file of the model, got none"):
        Generator.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    path = tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(BadInputError, match="expected safetensors weights, got a pickle"):
        Generator.from_pretrained(tmp_path)


def test_an_unfinished_run_is_told_from_a_model(tmp_path):
    with pytest.raises(BadInputError, match=r"generator\.json: expected a medgen model .* let `medgen train`"):
        Generator.from_pretrained(tmp_path)


def test_damaged_settings_are_named(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    path = tmp_path / "generator.json"
    path.write_text(path.read_text()[:-40])
    with pytest.raises(BadInputError, match=r"generator\.json: expected JSON of a medgen model, got a damaged file"):
        Generator.from_pretrained(tmp_path)


def test_unknown_settings_are_refused(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    path = tmp_path / "generator.json"
    settings = json.loads(path.read_text())
    settings["config"]["gidance_scale"] = 3
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInputError, match="gidance_scale"):
        Generator.from_pretrained(tmp_path)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(BadInputError, match=r"Embedded: .*hippocampus-mr-3d"):
        Generator.from_pretrained("hipocampus")


def test_an_unreachable_hub_id_is_one_clear_error():
    with pytest.raises(BadInputError, match="expected a model folder or a reachable Hub id"):
        Generator.from_pretrained("nobody/nothing")
