"""Own data in 2D: PNG images with labels in, twice as many labelled images out.

python examples/own_data_2d.py --data FOLDER --output runs/own_2d
python examples/own_data_2d.py --toy --output toy_2d        # a minute, on images that it makes itself
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from medgen import evaluate, read_dataset, synthesize, train


def make_toy_images(folder: Path, count: int = 12) -> Path:
    """Write noisy disks of two tissues as 8-bit PNG in `images/` and `labels/`, and the split in `metadata.csv`."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    rows = ["image,label,patient,split"]
    axes = np.indices((48, 48))
    for case in range(count):
        center = rng.uniform(20, 28, 2).reshape(2, 1, 1)
        distance = np.sqrt(((axes - center) ** 2).sum(0))
        label = (distance < rng.uniform(12, 16)).astype(np.uint8) + (distance < 7)
        image = 60 + 60 * label + rng.normal(0, 6, label.shape)
        name = f"disk_{case:02d}.png"
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
        Image.fromarray(label.astype(np.uint8)).save(folder / "labels" / name)
        # Two images a patient: the two never fall into different splits.
        rows.append(f"images/{name},labels/{name},patient_{case // 2},{'val' if case >= count - 4 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def main() -> None:
    """Train, synthesize, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of labelled images")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="make the data, and train for a few steps only")
    arguments = parser.parse_args()
    if not arguments.toy and not arguments.data:
        parser.error("give --data FOLDER, or --toy")
    data = make_toy_images(arguments.output / "data") if arguments.toy else arguments.data

    # The plan is made from the folder and written to run/plan.yaml; edit it there to change anything.
    run = train(data, arguments.output / "run", max_steps=6 if arguments.toy else None)

    # New label maps: smooth deformations of those of the training split, each with a scan of its own.
    count = 4 if arguments.toy else 2 * len(read_dataset(data).cases)
    steps = 4 if arguments.toy else 20
    synthetic = arguments.output / "synthetic"
    synthesize(
        synthetic, model=str(run), labels=data, label_source="deform", num_samples=count, num_inference_steps=steps
    )

    report = evaluate(data, synthetic, arguments.output / "report")
    print(
        f"look at {synthetic / 'contact_sheet.png'} first, then at {arguments.output / 'report'}: {len(report)} figures"
    )


if __name__ == "__main__":
    main()
