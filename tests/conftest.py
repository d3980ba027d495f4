"""What every test shares: one thread per worker, no network, no display, and the folder of real scans."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from string import ascii_lowercase

# Before torch and matplotlib are imported: two workers with all cores each would only get in each other's way.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets: ``MEDGEN_DATA``, else ``../shared/data`` beside the repository."""
    named = os.environ.get("MEDGEN_DATA")
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: name its folder in MEDGEN_DATA to run this test")
    return folder


WORDS = ("heart", "large", "small")


def build_generator(spatial_dims=2, *, channels=1, conditions=("mask",), **config):
    """A real generator of a few thousand weights: untrained, but every weight takes part."""
    from medgen.conditions.attributes import Attribute
    from medgen.conditions.edge import EdgeSettings
    from medgen.data.intensity import IntensityMap, Normalization
    from medgen.diffusion.objective import Objective
    from medgen.generator import Generator, GeneratorConfig
    from medgen.networks import Autoencoder, Denoiser, TextEncoder

    torch.manual_seed(0)
    attributes = {name: Attribute("number", mean=50.0, std=10.0) for name in conditions if name == "age"}
    text = "text" in conditions
    denoiser = Denoiser(
        spatial_dims=spatial_dims,
        in_channels=2,
        channels=(8, 16),
        attention_levels=(False, text),
        num_res_blocks=1,
        num_head_channels=8,
        norm_num_groups=4,
        mask_classes=3 if "mask" in conditions else 0,
        mask_channels=4,
        mask_stride=2,
        edges="edge" in conditions,
        text_length=6 if text else 0,
        text_width=8 if text else 0,
        attributes={name: attribute.features for name, attribute in attributes.items()},
    )
    autoencoder = Autoencoder(spatial_dims=spatial_dims, in_channels=channels, channels=(4, 8), latent_channels=2)
    for part in (autoencoder, denoiser):
        for weight in part.parameters():
            if not weight.any():  # new diffusion networks end in zeros, and would ignore their input
                torch.nn.init.normal_(weight, std=0.1)
    values = {
        "name": f"tiny-{spatial_dims}d",
        "spatial_dims": spatial_dims,
        "channel_names": {index: f"channel {index}" for index in range(channels)},
        "class_names": {0: "background", 1: "organ", 2: "lesion"},
        "size": (8,) * spatial_dims,
        "objective": Objective(),
        "normalization": Normalization(),
        "intensity": IntensityMap((0.002,) * channels, (-1.0,) * channels),
        "spacing": (1.0, 1.0, 1.0) if spatial_dims == 3 else None,
        "orientation": "RAS" if spatial_dims == 3 else None,
        "latent_scale": (1.0, 1.0),
        "latent_shift": (0.0, 0.0),
        "edge": EdgeSettings(smoothing=1.0) if "edge" in conditions else None,
        "attributes": attributes,
    }
    encoder = TextEncoder(WORDS, width=8, depth=1, heads=2, length=6) if text else None
    return Generator(GeneratorConfig(**{**values, **config}), denoiser, autoencoder=autoencoder, text_encoder=encoder)


@pytest.fixture(scope="session")
def make_generator():
    """Makes tiny generators, with other dimensions, conditions and settings."""
    return build_generator


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory):
    """Folder of a tiny Stable Diffusion with random weights, in diffusers' own format; do not change it.

    Two levels, 4 latent channels, pictures of 16, prompts of 12 tokens.
    """
    pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("stable-diffusion")
    words = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=16,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.2,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


@pytest.fixture
def pipeline(saved_pipeline):
    """The pipeline as diffusers loads it."""
    from diffusers import StableDiffusionPipeline

    loaded = StableDiffusionPipeline.from_pretrained(saved_pipeline, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def spoiled(saved_pipeline, tmp_path):
    """A copy of the pipeline's folder, and a function that changes entries of one of its JSON files."""
    folder = tmp_path / "spoiled"
    shutil.copytree(saved_pipeline, folder)

    def change(name, **entries):
        path = folder / name
        values = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))

    return folder, change
