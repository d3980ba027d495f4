"""One picture of what a model does with each of its conditions, alone and in every combination, from the same noise.

    python benchmarks/condition_grid.py --dataset cxr_text --model FOLDER --output conditions.png

The conditions are those of a few real scans. Each row of the picture leaves some of them out, from all of them to none;
a column keeps its noise, so that a difference down a column is due to the conditions alone.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from common import WORKDIR, data_folder
from jsonargparse import auto_cli

from medgen.conditions.text import fill_template
from medgen.data.dataset import load_case, read_dataset
from medgen.generator import Generator
from medgen.pictures import contact_sheet
from medgen.synthesis import synthesize
from medgen.types import Sample


def main(
    dataset: str,
    model: str,
    output: Path,
    cases: list[str],
    guidance_scale: float | dict[str, float] | None = None,
    num_inference_steps: int = 20,
    seed: int = 0,
    workdir: Path = WORKDIR,
) -> None:
    """Synthesize and draw.

    Args:
        dataset: Real set that the conditions are taken from.
        model: As for `medgen synthesize`.
        output: PNG to write.
        cases: Real scans whose conditions are taken, one column each.
        guidance_scale: As for `medgen synthesize`.
        num_inference_steps: As for `medgen synthesize`.
        seed: As for `medgen synthesize`.
        workdir: Keeps the synthetic scans.
    """
    generator = Generator.from_pretrained(model)
    real = read_dataset(data_folder(dataset))
    chosen = [next(case for case in real.cases if case.case == name) for name in cases]
    known = [name for name in ("text", "mask", "edge") if name in generator.conditions]
    template = generator.config.text_template
    cells = []
    for case in chosen:
        text = fill_template(template, case.meta) if template else case.text
        cells.append(
            {
                "text": text or "",
                "label": str(case.label.resolve()) if case.label else "",
                "edge": ";".join(str(path.resolve()) for path in case.images),
            }
        )
    sheet: list[Sample] = []
    for names in (names for count in range(len(known), -1, -1) for names in combinations(known, count)):
        columns = ["label" if name == "mask" else name for name in names]
        folder = workdir / dataset / "grid" / ("-".join(names) or "none")
        table = folder.with_suffix(".csv")
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "edge"])
            writer.writerows(
                [cell[name] if name in columns else "" for name in ("text", "label", "edge")] for cell in cells
            )
        synthesize(
            folder,
            model=model,
            conditions=table,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            seed=seed,
            overwrite=True,
        )
        made = read_dataset(folder)
        for case, cell in zip(sorted(made.cases, key=lambda case: case.case), cells, strict=True):
            words = f": {cell['text']}" if "text" in names else ""
            sheet.append(replace(load_case(case, made), case=f"{' + '.join(names) or 'nothing'}{words}"))
    contact_sheet(sheet, output, class_names=generator.config.class_names, title=f"{generator.config.name}, synthetic")
    print(output)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
