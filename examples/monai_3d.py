"""Train a 3D segmentation network with MONAI; real volumes are replaced by synthetic ones of the same label map.

python examples/monai_3d.py --data FOLDER --bank SYNTHETIC      # SYNTHETIC: medgen synthesize --labels FOLDER
python examples/monai_3d.py --toy toy_monai_3d                  # a minute, on volumes that it makes itself
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
    Orientationd,
    RandGaussianNoised,
    RandSpatialCropd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism
from pytorch import make_toy_bank

from medgen import read_dataset
from medgen.data.dataset import split_cases
from medgen.transforms import RandSyntheticReplaced

KEYS = ("image", "label")


def main() -> None:
    """Train, and tell how many of the pairs were synthetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of labelled volumes")
    parser.add_argument("--bank", type=Path, help="folder of synthetic pairs")
    parser.add_argument("--toy", type=Path, help="folder for data and pairs that it makes itself")
    parser.add_argument("--spacing", type=float, default=2.0, help="voxel edges that the network sees, in mm")
    parser.add_argument("--patch", type=int, default=16, help="voxels per axis that the network sees")
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
        Orientationd(KEYS, "RAS", labels=None),
        Spacingd(KEYS, (arguments.spacing,) * 3, mode=("bilinear", "nearest")),
        ScaleIntensityRangePercentilesd("image", 1, 99, 0, 1, clip=True, channel_wise=True),
        SpatialPadd(KEYS, (arguments.patch,) * 3),
    ]
    replaced = RandSyntheticReplaced(
        keys="image",
        label_key="label",
        bank=bank,
        prob=0.5,
        draw="label",
        class_names=dataset.class_names,
        preprocess=prepare,
        cache_dir=bank.parent / "bank_cache",  # the next start need not pack it again
    )
    # Whole scans are replaced, so crops come later.
    augment = [RandSpatialCropd(KEYS, (arguments.patch,) * 3, random_size=False), RandGaussianNoised("image", std=0.05)]
    loader = DataLoader(
        CacheDataset(files, Compose([*prepare, replaced, *augment]), progress=False),
        batch_size=2,
        shuffle=True,
        num_workers=arguments.workers,
    )

    classes = len(dataset.class_names)
    network = UNet(3, len(dataset.channel_names), classes, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
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
