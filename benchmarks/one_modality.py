"""Nuclei of which one modality alone is annotated: the data of `configs/mrgen_text_mask.yaml`.

    python benchmarks/one_modality.py --output runs/one_modality

Writes the list of the real scans, `metadata.csv`, with the modality of each as `site` and in its `text`, and with a
label map for the training scans of the annotated modality alone. The scans stay where they are; `labels/` links to
these label maps, so that it can be given to `medgen synthesize --labels`. The captions of the data set are left out:
they count the nuclei, which only an annotated scan tells.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

from common import data_folder, link_files
from jsonargparse import auto_cli

from medgen.data.dataset import read_dataset


def main(output: Path = Path("runs/one_modality"), annotated: str = "fluorescence") -> None:
    """Write the list.

    Args:
        output: Folder to write, new or empty.
        annotated: Modality whose training scans keep their label maps: fluorescence, histology or brightfield.
    """
    if output.exists() and any(output.iterdir()):
        sys.exit(f"{output}: expected a new or empty folder, got one with files. Choose another --output.")
    cases = read_dataset(data_folder("nuclei_dsb2018")).cases
    sites = sorted({case.meta["site"] for case in cases})
    if annotated not in sites:
        sys.exit(f"annotated: expected one of {', '.join(sites)}, got {annotated}. Correct it.")
    labels = {
        case.case: case.label
        for case in cases
        if case.label is not None and case.meta["site"] == annotated and case.split == "train"
    }
    link_files(labels.values(), output / "labels")
    (output / "classes.json").write_text(json.dumps({"background": 0, "nucleus": 1}) + "\n")
    with (output / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "image", "label", "text", "site", "group", "split"])
        for case in cases:
            site, label = case.meta["site"], labels.get(case.case)
            shown = f"labels/{label.name}" if label else ""
            text = f"{site} microscopy, cell nuclei"
            writer.writerow([case.case, case.images[0].resolve(), shown, text, site, case.group, case.split])
    counts = {site: sum(case.meta["site"] == site for case in cases) for site in sites}
    print(f"{output}: {len(labels)} label maps for scans of {', '.join(f'{n} {site}' for site, n in counts.items())}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
