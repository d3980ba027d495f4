"""The names of the package: all there, and those of pre-trained bases loaded only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from medgen import networks


def test_importing_the_networks_loads_neither_peft_nor_the_networks_of_pretrained_bases() -> None:
    code = "import sys, medgen.networks as n; print(*sys.modules); print(*(hasattr(n, name) for name in n.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, found = (line.split() for line in done.stdout.splitlines())
    for name in ("peft", "diffusers.pipelines", "diffusers.models.unets", "transformers.models.clip.modeling_clip"):
        assert name not in loaded, name
    assert found == len(networks.__all__) * ["True"]


def test_a_name_that_the_networks_lack_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Denoisr'; public names: Autoencoder, .*Denoiser, "):
        networks.Denoisr  # noqa: B018
