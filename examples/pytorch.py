"""Train a segmentation network with a loop and a loader of plain PyTorch, every second pair a synthetic one.

python examples/pytorch.py --data FOLDER --bank SYNTHETIC       # volumes in NIfTI, of one channel, all of one size
python examples/pytorch.py --toy toy_pytorch                    # a minute, on volumes that it makes itself
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from own_data_3d import make_toy_volumes
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from medgen import read_dataset, synthesize
from medgen.data.dataset import split_cases
from medgen.transforms import RandSyntheticReplace


def make_toy_bank(folder: Path) -> tuple[Path, Path]:
    """Volumes, and scans of the embedded model for their label maps."""
    data = make_toy_volumes(folder / "data", count=4)
    synthesize(folder / "synthetic", labels=data / "labels", label_source="files", num_inference_steps=2)
    return data, folder / "synthetic"


def load_pair(files: dict[str, str]) -> dict[str, torch.Tensor]:
    """Read an image `(1, X, Y, Z)`, scaled to [0, 1], and its label map `(X, Y, Z)`, with axes that lead to RAS."""
    # A tensor cannot tell how its axes lie, so they are put in one order where the file can.
    scans = (nib.as_closest_canonical(nib.load(files[key])) for key in ("image", "label"))
    image, label = (np.asarray(scan.dataobj) for scan in scans)
    low, high = np.percentile(image, (1, 99))
    image = ((image - low) / (high - low)).clip(0, 1).astype(np.float32)
    return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label.astype(np.int64))}


class Pairs(Dataset):
    """Real pairs, some of them replaced as they are loaded."""

    def __init__(self, files: list[dict[str, str]], bank: Path, class_names: dict[int, str]) -> None:
        self.files = files
        # The bank is loaded by the same function, once, and kept in a memory-mapped file that workers share.
        self.replace = RandSyntheticReplace(bank, prob=0.5, class_names=class_names, preprocess=load_pair)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        pair = load_pair(self.files[index])
        image, label = self.replace(pair["image"], pair["label"])
        return image, label, image is not pair["image"]


def main() -> None:
    """Train, and tell how many of the pairs were synthetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of labelled volumes")
    parser.add_argument("--bank", type=Path, help="folder of synthetic pairs")
    parser.add_argument("--toy", type=Path, help="folder for data and pairs that it makes itself")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.toy and not (arguments.data and arguments.bank):
        parser.error("give --data FOLDER and --bank SYNTHETIC, or --toy FOLDER")
    data, bank = make_toy_bank(arguments.toy) if arguments.toy else (arguments.data, arguments.bank)

    dataset = read_dataset(data)
    if len(dataset.channel_names) > 1:
        parser.error(
            f"--data {data}: expected volumes of one channel, got {', '.join(dataset.channel_names.values())}: "
            "load_pair and the network of this example take one; examples/monai_3d.py takes any number"
        )
    cases, _ = split_cases(dataset)  # validation and test stay out
    files = [{"image": str(case.images[0]), "label": str(case.label)} for case in cases if case.label]
    pairs = Pairs(files, bank, dataset.class_names)
    # Workers seed the transform from torch; in this process it has to be told.
    torch.manual_seed(0)
    pairs.replace.set_random_state(0)
    loader = DataLoader(pairs, batch_size=2, shuffle=True, num_workers=arguments.workers)

    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv3d(8, 8, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv3d(8, len(dataset.class_names), 1),
    )
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for epoch in range(arguments.epochs):
        losses, synthetic = [], 0
        for image, label, replaced in loader:
            loss = F.cross_entropy(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            synthetic += int(replaced.sum())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}, {synthetic} of {len(files)} pairs synthetic")


if __name__ == "__main__":
    main()
