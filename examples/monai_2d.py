"""Train a 2D segmentation network with MONAI on real images, every second one replaced by a synthetic pair.

python examples/monai_2d.py --data FOLDER --bank SYNTHETIC      # SYNTHETIC: output of medgen synthesize or filter
python examples/monai_2d.py --toy toy_monai_2d                  # a minute, on images that it makes itself
"""

import argparse
from pathlib import Path

import torch
from monai.data import CacheDataset, DataLoader
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from monai.transforms import (
    Compose,
    LoadImaged,
    RandFlipd,
    RandGaussianNoised,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
)
from monai.utils import set_determinism
from own_data_2d import make_toy_images

from medgen import read_dataset, synthesize, train
from medgen.data.dataset import split_cases
from medgen.transforms import RandSyntheticReplaced

KEYS = ("image", "label")


def make_toy_bank(folder: Path) -> tuple[Path, Path]:
    """Images, and pairs of a generator that has hardly learned from them."""
    data = make_toy_images(folder / "data")
    run = train(data, folder / "run", max_steps=6)
    labels = data / "labels"
    synthesize(folder / "synthetic", model=str(run), labels=labels, label_source="deform", num_inference_steps=4)
    return data, folder / "synthetic"


def main() -> None:
    """Train, and tell how many of the pairs were synthetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of labelled images")
    parser.add_argument("--bank", type=Path, help="folder of synthetic pairs")
    parser.add_argument("--toy", type=Path, help="folder for data and pairs that it makes itself")
    parser.add_argument("--size", type=int, default=64, help="rows and columns that the network sees")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.toy and not (arguments.data and arguments.bank):
        parser.error("give --data FOLDER and --bank SYNTHETIC, or --toy FOLDER")
    data, bank = make_toy_bank(arguments.toy) if arguments.toy else (arguments.data, arguments.bank)

    set_determinism(0)
    dataset = read_dataset(data)
    cases, _ = split_cases(dataset)  # validation and test stay out
    files = [{"image": [str(path) for path in case.images], "label": str(case.label)} for case in cases if case.label]

    # What every scan goes through, real or synthetic. The bank is packed once with the same list.
    prepare = [
        LoadImaged(KEYS, ensure_channel_first=True),
        ScaleIntensityRangePercentilesd("image", 1, 99, 0, 1, clip=True, channel_wise=True),
        ResizeWithPadOrCropd(KEYS, (arguments.size,) * 2),
    ]
    transforms = Compose(
        [
            *prepare,
            RandSyntheticReplaced(
                keys="image",
                label_key="label",
                bank=bank,
                prob=0.5,
                class_names=dataset.class_names,
                preprocess=prepare,
            ),
            RandFlipd(KEYS, prob=0.5, spatial_axis=0),
            RandGaussianNoised("image", prob=0.5, std=0.05),
        ]
    )
    # The cache ends before the first random transform, so other pairs are drawn in each epoch.
    loader = DataLoader(
        CacheDataset(files, transforms, progress=False),
        batch_size=4,
        shuffle=True,
        num_workers=arguments.workers,
    )

    classes = len(dataset.class_names)
    network = UNet(2, len(dataset.channel_names), classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True)
    for epoch in range(arguments.epochs):
        losses, synthetic = [], 0
        for batch in loader:
            loss = loss_function(network(batch["image"].as_tensor()), batch["label"].as_tensor())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            synthetic += int(batch["image"].meta["synthetic"].sum())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, {synthetic} of {len(files)} pairs synthetic")


if __name__ == "__main__":
    main()
