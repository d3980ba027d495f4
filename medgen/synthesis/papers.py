"""What a finished output folder says of itself: data set description, contact sheet, card, and what was left out."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medgen.data.dataset import Rejection, load_case, read_dataset
from medgen.data.export import write_dataset_json, write_metadata
from medgen.generator import Generator
from medgen.pictures import contact_sheet
from medgen.provenance import MANIFEST, SampleRecord, explain_full_disk, write_text
from medgen.synthesis.steering import describe_scales

REJECTED = "rejected.jsonl"
CONTACT_SHEET = "contact_sheet.png"
_MOST_SHOWN = 12
_NOTICES = {
    False: (
        "**Every image here is synthetic.** It was drawn by a generative model and shows no patient. Do not diagnose,",
        "treat, or draw conclusions on a population from it. The license of the model and of its training data",
        "applies; see the model's card.",
    ),
    True: (
        "**Every image here is synthetic, and made from a source scan where one was given.** Parts of that scan may be",
        "in it as they were: protect these images as you protect the scans. The rest was drawn by a generative model",
        "and shows no patient. Do not diagnose, treat, or draw conclusions on a population from them. The licenses of",
        "the source scans, of the model and of its training data apply; see the model's card.",
    ),
}
_LAYOUTS = {True: "The layout is nnU-Net v2 raw.", False: "`metadata.csv` lists the scans."}


def append_rejection(output: Path, rejection: Rejection) -> None:
    """Add a line to the list of what was left out; several processes may do so at once.

    Args:
        output: Folder of the run.
        rejection: Case and reason.
    """
    line = json.dumps({"case": rejection.case, "reason": rejection.reason}, ensure_ascii=False) + "\n"
    with explain_full_disk(output / REJECTED):
        handle = os.open(output / REJECTED, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def close_folder(output: Path, generator: Generator, records: Sequence[SampleRecord], replay: str | None) -> None:
    """Write the description of the data set, the contact sheet and the card, from what lies in the folder.

    ``dataset.json`` where all scans have a label and one type of file, as nnU-Net wants it; a table where not, or where
    texts or attributes steered them.

    Args:
        output: Folder of the run; all its scans are written.
        generator: The model.
        records: Final manifest.
        replay: How a replay compares with its original, or None.
    """
    config = generator.config
    ending = _nnunet_ending(records)
    if ending:
        write_dataset_json(
            output,
            class_names=config.class_names,
            channel_names=config.channel_names,
            num_training=len(records),
            ending=ending,
            name=f"synthetic_{config.name}",
            edited=any("source" in record.conditions for record in records),
            details={"model": records[0].model, "model_hash": records[0].model_hash, "manifest": MANIFEST},
        )
    rows = [_row(record, config.modality) for record in records]
    if not ending or any({"text", *config.attributes} & set(row) for row in rows):
        write_metadata(output, rows, class_names=None if ending else config.class_names)
    if not any((output / "labelsTr").iterdir()):
        (output / "labelsTr").rmdir()
    dataset = read_dataset(output)
    cases = {case.case: case for case in dataset.cases}
    step = max(len(records) / _MOST_SHOWN, 1)
    shown = [records[int(index * step)].case for index in range(min(len(records), _MOST_SHOWN))]
    contact_sheet(
        (load_case(cases[name], dataset) for name in shown),
        output / CONTACT_SHEET,
        class_names=config.class_names,
        title=f"{len(shown)} of {len(records)} synthetic scans, model {config.name}",
    )
    rejections = _read_rejections(output)
    write_text(output / "README.md", _card(generator, records, rejections, replay))


def _nnunet_ending(records: Sequence[SampleRecord]) -> str:
    """File type where nnU-Net can read the scans: each has a label, and all are of one type."""
    endings = {"".join(Path(name).suffixes[-2:]) for record in records for name in record.files}
    whole = all(record.label_sha256 for record in records) and len(endings) == 1
    return endings.pop() if whole else ""


def _row(record: SampleRecord, modality: str | None) -> dict[str, str]:
    """A scan as a row of ``metadata.csv``."""
    folders: dict[str, list[str]] = {"imagesTr": [], "labelsTr": []}
    for name in record.files:
        folders[name.partition("/")[0]].append(name)
    row = {"id": record.case, "file_name": ";".join(folders["imagesTr"]), "label": "".join(folders["labelsTr"])}
    row |= {"modality": modality} if modality else {}
    row |= record.conditions.get("attributes", {})
    return row | ({"text": record.conditions["text"]} if "text" in record.conditions else {})


def _read_rejections(output: Path) -> list[dict[str, str]]:
    path = output / REJECTED
    if not path.exists():
        return []
    unique = dict.fromkeys(path.read_text(encoding="utf-8").splitlines())
    write_text(path, "".join(f"{line}\n" for line in unique))
    return [json.loads(line) for line in unique]


def _steered_by(record: SampleRecord) -> list[str]:
    """Names of what steered a scan, as people say them."""
    plural = {"edge": "edges", "edge_map": "edge maps", "source": "source scan"}
    names = [] if record.label["source"] == "none" else ["label map"]
    if "label_outlines" in record.conditions:
        names = ["outlines of the label map"]
    names += [plural.get(name, name) for name in record.conditions if name not in ("attributes", "label_outlines")]
    return [*names, *record.conditions.get("attributes", {})]


def _card(
    generator: Generator, records: Sequence[SampleRecord], rejections: Sequence[dict[str, str]], replay: str | None
) -> str:
    config, first = generator.config, records[0]
    sources = Counter(record.label["source"] for record in records)
    words = {
        "files": "taken from files",
        "deform": "deformed from files",
        "generate": "drawn by the label generator",
        "none": "without",
    }
    steered = Counter(name for record in records for name in _steered_by(record))
    given: dict[str, Any] = {"--labels": {"files", "deform"} & set(sources), "--edges": steered["edges"]}
    edited = [record.conditions["source"] for record in records if "source" in record.conditions]
    given |= {"--edge_maps": steered["edge maps"], "--sources": edited}
    given |= {"--regions": any("region" in each for each in edited)}
    given |= {"--source_labels": any("label" in each for each in edited)}
    folders = [f"`{name} FOLDER`" for name, used in given.items() if used]
    scale = "in the units and the type of the source scans" if edited else ""
    if len(edited) < len(records):
        scale = f"`{config.image_dtype}`, on the scale typical of the training set" + (f"; {scale}" if scale else "")
    evaluations = sorted({record.network_evaluations for record in records if record.network_evaluations is not None})
    shapes = Counter(" x ".join(map(str, record.shape)) for record in records).most_common(3)
    classes = ", ".join(f"{value} {name}" for value, name in sorted(config.class_names.items()))
    lines = [
        "---",
        "tags: [synthetic, medical-imaging, segmentation]",
        "---",
        f"# {len(records)} synthetic scans from {config.name}",
        "",
        *_NOTICES[bool(edited)],
        "",
        f"![Contact sheet]({CONTACT_SHEET})",
        "",
        "| | |",
        "|---|---|",
        f"| Model | `{first.model}`, SHA-256 `{first.model_hash}` |",
        f"| Modality | {config.modality or 'not stated'}, {config.spatial_dims}D |",
        f"| Channels | {', '.join(name for _, name in sorted(config.channel_names.items()))} |",
        f"| Label values | {classes} |",
        f"| Labels | {', '.join(f'{count} {words[name]}' for name, count in sorted(sources.items()))} |",
        f"| Steered by | {', '.join(f'{name} ({count})' for name, count in steered.items()) or 'nothing'} |",
        f"| Voxels | {', '.join(f'{shape} ({count})' for shape, count in shapes)} |",
        f"| Intensities | {scale} |",
        f"| Sampler | {first.sampler}, spacing {first.sampler_spacing}, {first.num_inference_steps} steps, "
        f"guidance {describe_scales(first.guidance_scale)}, temperature {first.temperature:g}, "
        f"{f'minority scale {first.minority_scale:g}, ' if first.minority_scale else ''}{first.precision}, "
        f"{' or '.join(map(str, evaluations))} network evaluations a scan |",
        f"| Made with | {', '.join(f'{name} {version}' for name, version in first.runtime['versions'].items())} |",
        "",
        f"{_LAYOUTS[bool(_nnunet_ending(records))]} `{MANIFEST}` holds one line per scan: seed, label "
        "source, conditions, settings, hashes.",
        f"`medgen synthesize --replay {MANIFEST} --output FOLDER` makes the same voxels again on the same processor;",
        f"add {' and '.join(['`--model` with its folder or Hub id if it is not embedded', *folders])}.",
    ]
    if replay:
        lines += ["", f"This folder is a replay: {replay}."]
    if rejections:
        lines += ["", f"## Left out ({len(rejections)})", "", "| case | reason |", "|---|---|"]
        lines += [f"| {item['case']} | {' '.join(item['reason'].split()).replace('|', '/')} |" for item in rejections]
    return "\n".join(lines) + "\n"
