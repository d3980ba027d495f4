"""Change a labelled scan: its whole look, one region, or its anatomy by a deformed label map; everything else stays.

python examples/edit_3d.py --output edited          # a minute: a synthetic volume of the embedded model is changed
python examples/edit_3d.py --scan scan.nii.gz --label label.nii.gz --model runs/mine --output edited
"""

import argparse
from pathlib import Path

import torch

from medgen import Generator, load_case, read_dataset, synthesize
from medgen.conditions.deformation import deform_label
from medgen.data.io import read_image, read_label, write_image, write_label
from medgen.pictures import contact_sheet
from medgen.synthesis import SamplingSettings, edit, translate
from medgen.types import Sample


def main() -> None:
    """Write three changed scans with their labels, and a picture of all beside the scan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="a volume; without one, one is made")
    parser.add_argument("--label", type=Path, help="its label map")
    parser.add_argument("--model", default="hippocampus-mr-3d", help="generator that was trained on such volumes")
    parser.add_argument("--steps", type=int, default=20, help="network steps of each change")
    parser.add_argument("--output", type=Path, default=Path("edited"))
    arguments = parser.parse_args()
    if bool(arguments.scan) != bool(arguments.label):
        parser.error("give --scan and --label together, or neither")
    if arguments.scan:
        (image, grid), (label, _) = read_image(arguments.scan), read_label(arguments.label)
    else:
        folder = arguments.output / "source"
        synthesize(folder, model=arguments.model, num_samples=1, num_inference_steps=arguments.steps)
        dataset = read_dataset(folder)
        sample = load_case(dataset.cases[0], dataset)
        image, label, grid = sample.image, sample.label, sample.grid

    generator = Generator.from_pretrained(arguments.model)
    common = {"grid": grid, "settings": SamplingSettings(num_inference_steps=arguments.steps)}
    # A box around one end of the structure, which is painted anew under the label as it is.
    places = torch.nonzero(label > 0)
    low, high = places.amin(0), places.amax(0)
    region = torch.zeros(label.shape, dtype=torch.bool)
    region[low[0] : high[0] + 1, low[1] : (low[1] + high[1]) // 2, low[2] : high[2] + 1] = True
    draw = torch.Generator().manual_seed(0)
    moved, _ = deform_label(label, generator=draw, spacing=grid.spacing, rotation=12.0, scaling=0.15)
    changed = {
        "look (strength 0.5)": translate(generator, image, label, strength=0.5, seed=1, **common),
        "region": edit(generator, image, label, region=region, seed=1, **common),
        "anatomy": edit(generator, image, label, new_label=moved, seed=1, **common),
    }
    shown = [Sample("scan", grid, image, label)]
    for name, made in changed.items():
        file = name.partition(" ")[0]
        kind = str(made.image.dtype).removeprefix("torch.")
        write_image(arguments.output / f"{file}.nii.gz", made.image, grid, dtype=kind, description="medgen, synthetic")
        write_label(arguments.output / f"{file}_label.nii.gz", made.label, grid, description="medgen, synthetic")
        kept = (made.image == image)[0].float().mean()
        print(f"{name}: {100 * kept:.0f} % of the voxels are bit for bit as they were")
        shown.append(Sample(name, grid, made.image, made.label))
    contact_sheet(shown, arguments.output / "edited.png", title="A scan, and the same with parts of it made anew")


if __name__ == "__main__":
    main()
