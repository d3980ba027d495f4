"""The model card: what a model is, for whoever finds its folder."""

from __future__ import annotations

from pathlib import Path

from medgen.generator import Generator
from medgen.provenance import write_text


def write_card(generator: Generator, folder: Path) -> None:
    """Write `README.md` beside a bundle.

    Args:
        generator: The model.
        folder: Folder of the bundle.
    """
    config = generator.config
    summary = config.training
    spacing = (
        "as in each scan" if config.spacing is None else " x ".join(f"{value:g}" for value in config.spacing) + " mm"
    )
    networks = {
        "autoencoder": generator.autoencoder,
        "denoiser": generator.denoiser,
        "label generator": generator.label_denoiser,
    }
    sizes = [
        f"- {name}: {sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} million parameters"
        for name, network in networks.items()
        if network is not None
    ]
    steps = ", ".join(f"{stage} {count}" for stage, count in summary.get("steps", {}).items())
    versions = ", ".join(f"{name} {number}" for name, number in summary.get("versions", {}).items())
    classes = ", ".join(f"{value} {name}" for value, name in sorted(config.class_names.items()))
    lines = [
        f"# {config.name}",
        "",
        f"A generative model of labelled {config.spatial_dims}D scans, trained with medgen.",
        "",
        f"- channels: {', '.join(config.channel_names.values())}; modality: {config.modality or 'not stated'}",
        f"- classes: {classes}",
        f"- voxel size: {spacing}; grid of at least {' x '.join(map(str, config.size))} voxels",
        *sizes,
        "",
        "## Training",
        "",
        f"- data: folder `{summary.get('data', '?')}`, {summary.get('training_cases', '?')} training and "
        f"{summary.get('validation_cases', '?')} validation cases",
        f"- steps: {steps}; seed {summary.get('seed', '?')}; {versions}",
        "",
        "## Use",
        "",
        "```",
        "medgen synthesize --model FOLDER_OF_THIS_CARD --output synthetic",
        "```",
        "",
        f"Scans are drawn with guidance {config.guidance_scale:g} at temperature {config.temperature:g}, unless asked",
        "for otherwise.",
        "",
        "To share the model, share the folder of this card and nothing of what lies around it: a training run also",
        "keeps copies and pictures of real scans.",
        "",
        "## Limits",
        "",
        "What it makes shows no patient and is not for diagnosis. It knows only what its training scans show. A small",
        "training set can be partly memorized: its licence and its privacy rules go with the model and its output.",
        "Its quality has not been measured here; `medgen evaluate` does that.",
        "",
    ]
    write_text(Path(folder) / "README.md", "\n".join(lines))
