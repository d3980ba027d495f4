"""The bundle: what goes in comes out, in a fresh process too, and damage is noticed."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medgen.conditions.condition import Condition
from medgen.data.intensity import IntensityMap, Normalization
from medgen.diffusion.objective import Objective
from medgen.generator import ControlUse, Generator, GeneratorConfig
from medgen.networks import Autoencoder, Control, Denoiser
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
    denoised = generator.denoise(latents, torch.tensor([500.0]), Condition({"mask": mask}))
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
    assert not list(tmp_path.glob("label_denoiser*"))


def run_in_a_child(action):
    """Exit status of ``action`` in a process of its own, so that it can be killed or held to limits."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BadInputError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(2)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_save_that_is_killed_at_any_moment_leaves_the_old_model_or_the_new_one(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("card")
    old = generator.weights_hash
    with torch.no_grad():
        for network in (generator.denoiser, generator.autoencoder, generator.label_denoiser):
            next(network.parameters()).add_(1)
    generator.config.guidance_scale = 3.0

    def save_and_die(step):
        left = [step]

        def count(event, arguments):
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") and str(tmp_path) in str(arguments):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        generator.save_pretrained(tmp_path)

    found = []
    for step in range(1000):
        status = run_in_a_child(lambda step=step: save_and_die(step))
        found.append(Generator.from_pretrained(tmp_path).weights_hash)
        if found[-1] != old:  # from here on each save starts over from the new model
            break
    generator.save_pretrained(tmp_path)
    assert os.WIFSIGNALED(status)
    assert len(found) > 20
    assert set(found[:-1]) == {old}
    assert found[-1] == generator.weights_hash
    assert (tmp_path / "README.md").read_text() == "card"
    assert len(list(tmp_path.iterdir())) == 5  # settings, card and three networks: nothing is left behind


def test_a_full_disk_is_one_clear_error_and_the_old_model_stays(generator, tmp_path, capfd):
    generator.save_pretrained(tmp_path)
    old = generator.weights_hash
    with torch.no_grad():
        next(generator.denoiser.parameters()).add_(1)

    def save_on_a_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        generator.save_pretrained(tmp_path)

    assert os.waitstatus_to_exitcode(run_in_a_child(save_on_a_full_disk)) == 2
    assert f"{tmp_path / 'autoencoder'}: expected free disk space, got a full disk" in capfd.readouterr().err
    assert Generator.from_pretrained(tmp_path).weights_hash == old
    assert not list(tmp_path.glob(".*"))


def test_the_hash_covers_weights_and_settings_and_is_the_same_after_loading(generator, tmp_path):
    generator.config.guidance_scale = 2  # JSON tells 2 from 2.0
    hashes = []
    for change in ("none", "settings", "weights"):
        if change == "settings":
            generator.config.latent_scale = (0.5, 2.5)
        if change == "weights":
            with torch.no_grad():
                next(generator.denoiser.parameters()).add_(1)
        generator.save_pretrained(tmp_path / change)
        assert Generator.from_pretrained(tmp_path / change).weights_hash == generator.weights_hash
        hashes.append(generator.weights_hash)
    assert len(set(hashes)) == 3


def test_a_model_of_the_first_format_still_loads_and_is_replaced_whole(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "generator.json").read_text())
    for name, entry in settings["components"].items():
        (tmp_path / entry["folder"]).rename(tmp_path / name)
    first = {name: entry["files"] for name, entry in settings["components"].items()}
    (tmp_path / "generator.json").write_text(json.dumps({**settings, "format_version": 1, "components": first}))
    again = Generator.from_pretrained(tmp_path)
    assert again.weights_hash == generator.weights_hash
    again.save_pretrained(tmp_path)
    assert not (tmp_path / "denoiser").exists()
    assert torch.equal(outputs(Generator.from_pretrained(tmp_path)), outputs(generator))


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


def weights_of(folder: Path, part: str) -> Path:
    return next(folder.glob(f"{part}-*/diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("part", ["denoiser", "autoencoder", "label_denoiser"])
def test_a_damaged_weight_file_is_named(generator, tmp_path, part):
    generator.save_pretrained(tmp_path)
    path = weights_of(tmp_path, part)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInputError, match=rf"{part}.*expected SHA-256 .*the file is damaged"):
        Generator.from_pretrained(tmp_path)


def test_a_missing_weight_file_is_named(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    weights_of(tmp_path, "denoiser").unlink()
    with pytest.raises(BadInputError, match=r"safetensors: expected this file of the model, got none"):
        Generator.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    path = weights_of(tmp_path, "denoiser")
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"controlnet": {"folder": "c", "files": {}}}, r"expected .* none but auto.*, got .*controlnet.*Update medgen"),
        ({"denoiser": None}, r"expected the network denoiser .*, got autoencoder, label_denoiser\. Copy"),
        ({"denoiser": {"folder": "d"}}, r"expected JSON of a medgen model, got a damaged file"),
    ],
)
def test_networks_that_are_unknown_or_missing_are_one_clear_error(generator, tmp_path, change, message):
    generator.save_pretrained(tmp_path)
    path = tmp_path / "generator.json"
    settings = json.loads(path.read_text())
    settings["components"] = {k: v for k, v in {**settings["components"], **change}.items() if v is not None}
    path.write_text(json.dumps(settings))
    with pytest.raises(BadInputError, match=rf"generator\.json: {message}"):
        Generator.from_pretrained(tmp_path)


def test_a_training_run_is_taken_for_the_model_in_it(generator, tmp_path):
    generator.save_pretrained(tmp_path / "run" / "model")
    assert Generator.from_pretrained(tmp_path / "run").weights_hash == generator.weights_hash


def test_a_mistyped_folder_is_no_hub_id(generator, tmp_path, monkeypatch):
    generator.save_pretrained(tmp_path / "runs" / "hippo")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match=r"runs/hipo: .*not looked up on the Hub.* Did you mean runs/hippo\?"):
        Generator.from_pretrained("runs/hipo")


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(BadInputError, match=r"Embedded: .*hippocampus-mr-3d"):
        Generator.from_pretrained("hipocampus")


def test_an_unreachable_hub_id_is_one_clear_error():
    with pytest.raises(BadInputError, match="expected a model folder or a reachable Hub id"):
        Generator.from_pretrained("nobody/nothing")


@pytest.fixture
def controlled() -> Generator:
    torch.manual_seed(0)
    denoiser = Denoiser(
        spatial_dims=2, in_channels=2, channels=(8, 8), attention_levels=(False, False), num_res_blocks=1,
        num_head_channels=4, norm_num_groups=4, mask_stride=2,
    )  # fmt: skip
    controls = {"mask": Control.of(denoiser, "mask", mask_classes=2), "edge": Control.of(denoiser, "edge")}
    for network in (denoiser, *controls.values()):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        network.eval()
    config = GeneratorConfig(
        name="controlled", spatial_dims=2, channel_names={0: "image"}, class_names={0: "background", 1: "ball"},
        size=(16, 16), objective=Objective(), normalization=Normalization(), intensity=IntensityMap((1.0,), (0.0,)),
    )  # fmt: skip
    return Generator(config, denoiser, controls=controls)


@torch.no_grad()
def test_control_branches_act_by_their_scale_and_in_their_time(controlled: Generator, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 8, 8, generator=draw)
    parts = {"mask": torch.ones(1, 2, 16, 16), "edge": torch.rand(1, 2, 16, 16, generator=draw)}

    def output(time: float, names: tuple[str, ...] = ("mask", "edge"), **uses: ControlUse) -> torch.Tensor:
        condition = Condition({name: parts[name] for name in names})
        return controlled.denoise(x, torch.tensor([time]), condition, controls=uses)

    assert controlled.conditions == ("edge", "mask")
    bare, both = output(500, ()), output(500)
    assert torch.equal(output(500, mask=ControlUse(0.0), edge=ControlUse(0.0)), bare)
    assert torch.equal(output(500, edge=ControlUse(0.0)), output(500, ("mask",)))
    for name in ("mask", "edge"):
        assert (output(500, (name,)) - bare).abs().max() > 1e-4
        assert (both - output(500, (name,))).abs().max() > 1e-4
    late = ControlUse(start=0.6)  # from pure noise on, 60 % of the way: below time 400
    assert torch.equal(output(500, mask=late, edge=late), bare)
    assert torch.equal(output(300, mask=late, edge=late), output(300))
    early = ControlUse(end=0.6)
    assert torch.equal(output(500, mask=early, edge=early), both)
    assert torch.equal(output(300, mask=early, edge=early), output(300, ()))
    controlled.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    torch.testing.assert_close(again.denoise(x, torch.tensor([500.0]), Condition(parts)), both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditioning_scale": -1.0}, "conditioning_scale: expected a finite number of 0 or more, got -1"),
        ({"start": 0.5, "end": 0.5}, r"rising shares of the noise process in \[0, 1\], .* got 0.5 and 0.5"),
        ({"end": 1.5}, "expected rising shares"),
    ],
)
def test_controls_that_cannot_be_used_so_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        ControlUse(**arguments)
