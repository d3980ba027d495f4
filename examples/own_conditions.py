"""Your own conditions: what you know of each image, in a table, steers the synthetic ones. Here stained disks.

    python examples/own_conditions.py --output toy_conditions     # a minute; makes its own images

The same three steps for your data: write `metadata.csv` (columns `image`, and `label`, `text` or any others that you
have; a cell may be empty), name the columns in `conditions`, and give the model any of them at synthesis.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

from medgen import synthesize, train


def make_images(folder: Path, count: int = 16) -> Path:
    """Write disks that are light or dark, small or large, and the table that says so."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    distance = np.hypot(*(np.indices((48, 48)) - 23.5))
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "text", "stain", "diameter", "split"])
        for case in range(count):
            stain, radius = ("light", "dark")[case % 2], rng.uniform(8, 18)
            disk = distance < radius
            image = np.where(disk, 200 if stain == "light" else 40, 120) + rng.normal(0, 6, disk.shape)
            name = f"disk_{case:02d}.png"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
            label = ""
            if case % 4:  # not every image needs a label map
                label = f"labels/{name}"
                Image.fromarray(disk.astype(np.uint8)).save(folder / label)
            size = "small" if radius < 13 else "large"
            split = "val" if case >= count - 4 else "train"
            table.writerow([f"images/{name}", label, f"a {size} {stain} disk", stain, round(2 * radius), split])
    return folder


def main() -> None:
    """Train with five conditions, then make images by one of them, by several, and by a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max_steps", type=int, default=6, help="a few, to see it run; 2000 to see it follow")
    arguments = parser.parse_args()
    data = make_images(arguments.output / "data")

    # `stain` is a word and `diameter` a number: which of both a column is, the plan finds out.
    conditions = ["mask", "edge", "text", "stain", "diameter"]
    model = str(train(data, arguments.output / "run", conditions=conditions, max_steps=arguments.max_steps))

    # Without a label map; `label_source="generate"` would let the model draw one for each image.
    synthesize(
        arguments.output / "by_text", model=model, prompts="a large dark disk", label_source="none", num_samples=4
    )
    synthesize(
        arguments.output / "by_mask_and_stain", model=model, labels=data / "labels", attributes={"stain": "dark"}
    )
    # One row an image, each with what it has.
    table = arguments.output / "conditions.csv"
    table.write_text(
        "label,edge,text,stain,diameter\n"
        "data/labels/disk_01.png,,a small light disk,,\n"
        ",data/images/disk_02.png,,dark,\n"
        ",,,light,30\n"
    )
    synthesize(arguments.output / "by_table", model=model, conditions=table)
    print(f"look at the contact_sheet.png of each folder in {arguments.output}; each manifest.jsonl says what steered")


if __name__ == "__main__":
    main()
