"""The autoencoder: local, tileable, and the same after a reload."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medgen.networks import Autoencoder
from medgen.networks.autoencoder import KEPT_BYTES, ChannelNorm
from medgen.precision import has_bf16_kernels
from medgen.types import BadInputError


@pytest.fixture(params=[2, 3])
def autoencoder(request):
    torch.manual_seed(0)
    return Autoencoder(spatial_dims=request.param, channels=(8, 16), latent_channels=3, num_res_blocks=1).eval()


def latents_for(autoencoder, size):
    shape = (1, 3, *[size] * autoencoder.config["spatial_dims"])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_channel_norm_equals_torch_rms_norm():
    x = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0))
    ours = ChannelNorm(6)
    torch.nn.init.normal_(ours.weight)
    theirs = torch.nn.RMSNorm(6, eps=1e-6)
    theirs.weight.data = ours.weight.data
    torch.testing.assert_close(ours(x), theirs(x.movedim(1, -1)).movedim(-1, 1))


@torch.no_grad()
def test_tiles_decode_to_the_whole_including_their_borders(autoencoder):
    latents = latents_for(autoencoder, 24)
    whole = autoencoder.decode(latents)
    per_voxel = autoencoder._decode_bytes_per_latent_voxel()
    bound = (2 * autoencoder.decoder_radius + 6) ** autoencoder.config["spatial_dims"] * per_voxel / 1e9
    bound += (4 * whole.numel() + KEPT_BYTES) / 1e9
    tiled = autoencoder.decode(latents, max_memory_gb=bound * 1.01)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().max() < 1e-4 * whole.abs().max()


def test_one_latent_voxel_reaches_no_further_than_the_stated_radius(autoencoder):
    latents = latents_for(autoencoder, 21).requires_grad_()
    image = autoencoder.decode(latents)
    center = tuple(size // 2 for size in image.shape[2:])
    image[(0, 0, *center)].backward()
    reached = latents.grad.abs().sum((0, 1)).nonzero()
    middle = torch.tensor([index // autoencoder.compression for index in center])
    assert (reached - middle).abs().max() <= autoencoder.decoder_radius


def test_a_memory_bound_that_is_too_small_says_the_least_that_works(autoencoder):
    with pytest.raises(BadInputError, match=r"max_memory_gb: expected at least 0\.\d+ for scans of"):
        autoencoder.decode(latents_for(autoencoder, 40), max_memory_gb=1e-9)


def test_without_bf16_kernels_the_unfolding_of_a_convolution_counts(monkeypatch):
    network = Autoencoder(channels=(4, 8), latent_channels=4)
    monkeypatch.setattr("medgen.networks.autoencoder.has_bf16_kernels", lambda: False)
    maps = 4 * (4 * 8 + 3) * 2**3  # bytes per latent voxel: of float32 maps, at twice the resolution
    assert network._decode_bytes_per_latent_voxel() == maps
    with torch.autocast("cpu", torch.bfloat16):
        assert network._decode_bytes_per_latent_voxel() == maps + 2 * 27 * 8 * 2**3
        monkeypatch.setattr("medgen.networks.autoencoder.has_bf16_kernels", lambda: True)
        assert network._decode_bytes_per_latent_voxel() == maps


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure the peak of a process")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_decode_by_tiles_stays_within_its_memory_bound(precision):
    # Without bfloat16 kernels a convolution takes much more memory, and minutes at the size of the others.
    unfolded = precision == "bf16" and not has_bf16_kernels()
    channels, bound = (4, 0.23) if unfolded else (16, 0.2)
    script = """
import sys, torch
from pathlib import Path
from medgen.networks import Autoencoder
from medgen.precision import autocast, memory_format
def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9
torch.set_num_threads(1)
network = Autoencoder(channels=(int(sys.argv[2]),) * 2, latent_channels=4).eval()
if sys.argv[1] == "bf16":
    network.to(memory_format=memory_format(3))
with torch.inference_mode(), autocast("cpu", sys.argv[1]):
    network.decode(torch.zeros(1, 4, 8, 8, 8))
    latents = torch.randn(1, 4, 48, 48, 48)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    network.decode(latents, max_memory_gb=float(sys.argv[3]))
print(held("VmHWM") - before)
"""
    command = [sys.executable, "-c", script, precision, str(channels), str(bound)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0.02 < float(done.stdout) < bound  # the whole decode takes 0.25 GB or more


def test_sizes_that_do_not_divide_are_refused(autoencoder):
    with pytest.raises(ValueError, match="multiples of 2"):
        autoencoder.encode(torch.zeros(1, 1, *[7] * autoencoder.config["spatial_dims"]))


@torch.no_grad()
def test_a_fresh_process_reloads_it_bit_for_bit(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path / "autoencoder")
    latents = latents_for(autoencoder, 6)
    torch.save(latents, tmp_path / "latents.pt")
    script = (
        "import sys, torch; from medgen.networks import Autoencoder; torch.set_num_threads(1); folder = sys.argv[1]\n"
        "network = Autoencoder.from_pretrained(folder + '/autoencoder', use_safetensors=True)\n"
        "latents = torch.load(folder + '/latents.pt', weights_only=True)\n"
        "torch.save(network.decode(latents).detach(), folder + '/image.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = autoencoder.decode(latents)
    torch.set_num_threads(threads)
    assert torch.equal(torch.load(tmp_path / "image.pt", weights_only=True), here)
    assert not list((tmp_path / "autoencoder").glob("*.bin"))
