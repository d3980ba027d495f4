"""Own data in 3D: NIfTI volumes with labels in, twice as many labelled volumes out.

python examples/own_data_3d.py --data FOLDER --output runs/own_3d
python examples/own_data_3d.py --toy --output toy_3d        # a minute, on volumes that it makes itself
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np

from medgen import evaluate, read_dataset, synthesize, train


def make_toy_volumes(folder: Path, count: int = 12) -> Path:
    """Write noisy balls of two tissues, 2 mm voxels, as `images/` and `labels/`."""
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    axes = np.indices((24, 24, 20))
    for case in range(count):
        center = rng.uniform(9, 13, 3).reshape(3, 1, 1, 1)
        distance = np.sqrt(((axes - center) ** 2).sum(0))
        label = (distance < rng.uniform(6, 8)).astype(np.uint8) + (distance < 4)
        image = 100 + 60 * label + rng.normal(0, 8, label.shape)
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / "images" / f"ball_{case:02d}.nii.gz")
        nib.save(nib.Nifti1Image(label.astype(np.uint8), affine), folder / "labels" / f"ball_{case:02d}.nii.gz")
    return folder


def main() -> None:
    """Train, synthesize, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of labelled volumes")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="make the data, and train for a few steps only")
    arguments = parser.parse_args()
    if not arguments.toy and not arguments.data:
        parser.error("give --data FOLDER, or --toy")
    data = make_toy_volumes(arguments.output / "data") if arguments.toy else arguments.data

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
