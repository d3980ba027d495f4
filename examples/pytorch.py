"""Train a segmentation network with plain PyTorch, every second pair a synthetic one: no MONAI in sight.

python examples/pytorch.py --data FOLDER --bank SYNTHETIC       # volumes in NIfTI, all of one size
python examples/pytorch.py --toy toy_pytorch                    # a minute, on volumes that it makes itself
"""

import argparse
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai_3d import make_toy_bank
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from medgen import read_dataset
from medgen.transforms import RandSyntheticReplace


def load_pair(files: dict[str, str]) -> dict[str, torch.Tensor]:
    """Read an image `(1, X, Y, Z)`, scaled to [0, 1], and its label map `(X, Y, Z)`."""
    image, label = (np.asarray(nib.load(files[key]).dataobj) for key in ("image", "label"))
    low, high = np.percentile(image, (1, 99))
    image = ((image - low) / (high - low)).clip(0, 1).astype(np.float32)
    return {"image": torch.from_numpy(image)[None], "label": torch.from_numpy(label.astype(np.int64))}


class Pairs(Dataset):
    """Real pairs, some of them replaced as they are loaded."""

    def __init__(self, files: list[dict[str, str]], bank: Path) -> None:
        self.files = files
        # The bank is loaded by the same function, once, and kept in a memory-mapped file that workers share.
        self.replace = RandSyntheticReplace(bank, prob=0.5, preprocess=load_pair)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = load_pair(self.files[index])
        return self.replace(pair["image"], pair["label"])


def main() -> None:
    """Train a few epochs."""
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
    pairs = Pairs([{"image": str(case.images[0]), "label": str(case.label)} for case in dataset.cases], bank)
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
        losses = []
        for image, label in loader:
            loss = F.cross_entropy(network(image), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")


if __name__ == "__main__":
    main()
