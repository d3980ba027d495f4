"""Generative test-time augmentation in 2D: a segmenter meets images of another quality, and gets views of them.

python examples/test_time_2d.py --data FOLDER --model runs/mine --segmenter seg.ts --output views.png
python examples/test_time_2d.py --toy toy_views_2d          # a minute, with data and networks that it makes itself
"""

import argparse
from pathlib import Path

import torch
from own_data_2d import make_toy_images

from medgen import read_dataset, train
from medgen.data.dataset import split_cases
from medgen.data.standard import normalize, read_scan
from medgen.pictures import strip
from medgen.segmentation import CLASSICAL, Recipe, fit_preparation, load_pairs, train_segmenter
from medgen.test_time import GenerativeTTA
from medgen.transforms import Corruption


def make_toy_networks(folder: Path, *, dims: int = 2, modality: str = "mri") -> tuple[Path, Path, Path]:
    """A data set, a generator and a segmenter that are trained for some seconds."""
    data = make_toy_images(folder / "data")
    model = train(data, folder / "run", max_steps=6)
    dataset = read_dataset(data)
    cases, _ = split_cases(dataset)
    prepare = fit_preparation(cases, dataset, 0)
    pairs = load_pairs(cases, dataset, prepare, "training")
    recipe = Recipe(60, 4, (8, 16), augmentation=CLASSICAL[dims])
    network = train_segmenter(pairs, recipe, prepare.patch, len(dataset.class_names), 0, torch.device("cpu"), "toy")
    torch.jit.trace(network, pairs[0][0].float()[None]).save(folder / "seg.ts")
    return data, model, folder / "seg.ts"


def dice(found: torch.Tensor, label: torch.Tensor) -> float:
    """Mean over the classes that the label shows."""
    shown = [k for k in label.unique().tolist() if k]
    each = [2 * ((found == k) & (label == k)).sum() / ((found == k).sum() + (label == k).sum()) for k in shown]
    return float(sum(each) / len(each))


def main() -> None:
    """Segment noisy validation images with and without views, and draw the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of labelled images")
    parser.add_argument("--model", type=Path, help="generator that was trained on such images")
    parser.add_argument("--segmenter", type=Path, help="TorchScript that takes images in [0, 1]")
    parser.add_argument("--toy", type=Path, help="folder for data and networks that it makes itself")
    parser.add_argument("--corruption", default="noise", help="what befalls the images, as in medgen.transforms")
    parser.add_argument("--num_views", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("views.png"))
    arguments = parser.parse_args()
    if not arguments.toy and not (arguments.data and arguments.model and arguments.segmenter):
        parser.error("give --data, --model and --segmenter, or --toy FOLDER")
    data, model, script = arguments.data, arguments.model, arguments.segmenter
    if arguments.toy:
        data, model, script = make_toy_networks(arguments.toy)

    segmenter = torch.jit.load(script)
    tta = GenerativeTTA(segmenter, str(model), num_views=arguments.num_views)
    dataset = read_dataset(data)
    before, after = [], []
    for number, case in enumerate(split_cases(dataset)[1]):
        image, label, grid = read_scan(case, dataset)
        worse = Corruption(arguments.corruption, severity=3, seed=number)(image)
        scan = normalize(torch.as_tensor(worse).float(), case, dataset).clamp(0, 1)
        found = tta(scan)
        before.append(dice(segmenter(scan[None])[0].argmax(0), label))
        after.append(dice(found.label, label))
        if number == 0:
            views = [(f"view {index + 1}", view.clamp(0, 1)) for index, view in enumerate(tta.views(scan, 2))]
            maps = [
                ("consensus", found.label[None] / max(1, found.label.max())),
                ("entropy", found.entropy[None] / found.entropy.max()),
            ]
            picture = strip([("scan", scan), *views, *maps], grid)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            picture.save(arguments.output)
    print(
        f"Dice of {len(after)} images: {sum(before) / len(before):.3f} alone, {sum(after) / len(after):.3f} with views"
    )
    print(f"{found.evaluations} evaluations an image; look at {arguments.output}")


if __name__ == "__main__":
    main()
