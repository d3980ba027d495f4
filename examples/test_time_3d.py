"""Generative test-time augmentation in 3D, with sliding windows for the segmenter and maps of its uncertainty.

python examples/test_time_3d.py --scan scan.nii.gz --model runs/mine --segmenter seg.ts --output predicted
python examples/test_time_3d.py --toy toy_views_3d          # a minute: a synthetic scan and an untrained segmenter
"""

import argparse
from pathlib import Path

import nibabel as nib
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import Compose, LoadImage, SaveImage, ScaleIntensityRangePercentiles

from medgen import synthesize
from medgen.pictures import contact_sheet
from medgen.test_time import GenerativeTTA
from medgen.types import Grid, Sample


def make_toy(folder: Path) -> tuple[Path, Path]:
    """A scan of the embedded model, and a segmenter with random weights."""
    synthesize(folder / "synthetic", num_samples=1, num_inference_steps=4)
    torch.manual_seed(0)
    network = UNet(3, 1, 3, (8, 16), (2,)).eval()
    torch.jit.trace(network, torch.rand(1, 1, 32, 32, 32)).save(folder / "seg.ts")
    return next((folder / "synthetic" / "imagesTr").glob("*.nii.gz")), folder / "seg.ts"


def main() -> None:
    """Segment a volume with views; write the label map, two maps of uncertainty and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, help="a volume")
    parser.add_argument("--model", default="hippocampus-mr-3d", help="generator that was trained on such volumes")
    parser.add_argument("--segmenter", type=Path, help="TorchScript that takes patches with intensities in [0, 1]")
    parser.add_argument("--toy", type=Path, help="folder for a scan and a segmenter that it makes itself")
    parser.add_argument("--patch", type=int, default=32, help="voxels per axis that the segmenter sees")
    parser.add_argument("--mirror", type=int, nargs="*", default=[], help="axes that it has seen mirrored in training")
    parser.add_argument("--num_views", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("predicted"))
    arguments = parser.parse_args()
    if not arguments.toy and not (arguments.scan and arguments.segmenter):
        parser.error("give --scan and --segmenter, or --toy FOLDER")
    scan, script = make_toy(arguments.toy) if arguments.toy else (arguments.scan, arguments.segmenter)

    # A MetaTensor knows where its voxels lie, so the generator sees them on its own grid, whatever the orientation.
    load = Compose([LoadImage(ensure_channel_first=True), ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)])
    image = load(scan)
    tta = GenerativeTTA(
        torch.jit.load(script),
        arguments.model,
        num_views=arguments.num_views,
        geometric=tuple(arguments.mirror),
        inferer=SlidingWindowInferer((arguments.patch,) * 3, sw_batch_size=4, mode="gaussian"),
    )
    found = tta(image)
    maps = {"label": found.label, "entropy": found.entropy, "mutual_information": found.mutual_information}
    for name, values in maps.items():
        save = SaveImage(arguments.output, output_postfix=name, separate_folder=False, print_log=False)
        save(values[None].float(), meta_data=image.meta)
    # A mirror image or a turn is for the segmenter alone: these views lie as the scan does.
    grid, label = Grid(tuple(image.shape[1:]), image.affine.numpy()), found.label.to(torch.int16)
    shown = [("scan", image), *((f"view {number}", view) for number, view in enumerate(tta.views(image, 2), 1))]
    shown.append(("entropy", found.entropy[None]))
    contact_sheet(
        [Sample(name, grid, torch.as_tensor(values), label) for name, values in shown],
        arguments.output / "views.png",
        title="Views of a scan, the consensus of all, and where it is unsure",
    )
    print(f"{found.views} predictions, {found.evaluations} evaluations, fallback: {found.fallback or 'none'}")
    print(f"Dice between them {found.pairwise_dice.tolist()}, volumes vary by {found.volume_cv.tolist()}")
    affines = [nib.load(path).affine for path in (scan, *arguments.output.glob("*_label.nii.gz"))]
    print(f"affine kept: {(affines[0] == affines[1]).all()}")


if __name__ == "__main__":
    main()
