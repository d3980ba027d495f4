"""The model card: what a model is, for whoever finds its folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from medgen.conditions.attributes import Attribute
from medgen.generator import Generator
from medgen.provenance import write_text

# Values of a column that are longer than this may be what was written of a patient.
_LONGEST_VALUE = 30


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
        "## Steered by",
        "",
        *_steered_by(generator),
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


def _steered_by(generator: Generator) -> list[str]:
    """What steers the model, one line each, and a command that gives all of it."""
    config = generator.config
    if not generator.conditions:
        return ["Nothing: scans are drawn at random."]
    lines, example = [], ""
    facts: dict[str, Any] = {}
    for name in generator.conditions:
        if name == "mask":
            drawn = "" if generator.label_denoiser is None else "; without any, the model draws its own"
            lines.append(f"- `mask`: label maps of these classes{drawn}")
            example += " --labels FOLDER_OF_LABEL_MAPS"
        elif name == "edge":
            method = f" ({config.edge.method})" if config.edge is not None else ""
            lines.append(f"- `edge`: edges of scans{method}")
            example += " --edges FOLDER_OF_SCANS"
        elif name == "text":
            source = config.training.get("texts", "")
            if config.text_template is not None:
                source = f"template `{config.text_template}`"
            lines.append("- `text`: words" + (f", in training from the {source}" if source else ""))
            example += ' --prompts "TEXT"'
        else:
            words, value = _describe(config.attributes[name])
            lines.append(f"- `{name}`: {words}")
            facts |= {} if value is None else {name: value}
    if facts:
        example += f" --attributes {shlex.quote(json.dumps(facts, ensure_ascii=False))}"
    command = f"medgen synthesize --model FOLDER_OF_THIS_CARD{example} --output synthetic"
    return ["Each of these may be left out:", "", *lines, "", "```", command, "```"]


def _describe(attribute: Attribute) -> tuple[str, Any]:
    """What an attribute is, in words, and a value as an example; None where there is none to show."""
    mean = float(f"{attribute.mean:.3g}")
    if attribute.kind == "number":
        return f"a number in the unit of that column, in training {mean:g} ± {attribute.std:.3g}", mean
    if attribute.kind == "spacing":
        return f"voxel edges in mm, {attribute.width} numbers, in training about {mean:g}", [mean] * attribute.width
    if attribute.kind == "vector":
        return f"a vector of {attribute.width} numbers", None
    if max(map(len, attribute.values)) > _LONGEST_VALUE:
        return f"one of {len(attribute.values)} values, too long to be listed here", None
    return f"one of {', '.join(f'`{value}`' for value in attribute.values)}", attribute.values[0]
