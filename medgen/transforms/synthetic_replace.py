"""A real image and its label map replaced by a synthetic pair: the version for arrays."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import torch
from monai.transforms import RandomizableTransform
from torch.utils.data import get_worker_info

from medgen.provenance import sha256_file
from medgen.seeding import derive_seed
from medgen.transforms.agreement import check_images, check_labels, has_contrast, label_channels, label_values, measure
from medgen.transforms.bank import SyntheticBank
from medgen.transforms.carriers import is_whole, mark_real, unwrap, wrap_like
from medgen.transforms.packing import Preprocess
from medgen.types import BadInputError

Draw = Literal["any", "label", "class"]


class RandSyntheticReplace(RandomizableTransform):
    """Replace an image and its label map by a pair of a bank; array version of :class:`RandSyntheticReplaced`.

    Args:
        bank: Folder, or a bank.
        prob: Probability that a sample is replaced, in [0, 1].
        draw: As for :class:`RandSyntheticReplaced`.
        class_column: With ``draw="class"``, column of the bank's ``metadata.csv`` in place of the label map.
        labelled: Whether labels are replaced too; for a folder only, a bank knows.
        preprocess: As for :class:`~medgen.transforms.bank.SyntheticBank`; for a folder only.
        cache_dir: Likewise.

    Raises:
        BadInputError: If the bank cannot be used, or lacks what `draw` needs.
    """

    def __init__(
        self,
        bank: SyntheticBank | str | Path,
        prob: float = 0.5,
        *,
        draw: Draw = "any",
        class_column: str | None = None,
        labelled: bool = True,
        preprocess: Preprocess | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if class_column is not None and draw != "class":
            raise BadInputError(f"class_column, class_key: expected draw='class' with it, got draw={draw!r}.")
        if not 0 <= prob <= 1:
            raise BadInputError(f"prob: expected a probability from 0 to 1, got {prob}.")
        if draw not in get_args(Draw):
            raise BadInputError(f"draw: expected one of {', '.join(get_args(Draw))}, got {draw!r}.")
        RandomizableTransform.__init__(self, prob)
        if not isinstance(bank, SyntheticBank):
            label_key = "label" if labelled else None
            bank = SyntheticBank(bank, label_key=label_key, preprocess=preprocess, cache_dir=cache_dir)
        elif preprocess is not None or cache_dir is not None:
            raise BadInputError("preprocess, cache_dir: expected them where the bank is made, got a bank that is made.")
        self.bank, self.draw, self.class_column = bank, draw, class_column
        self._index = self._group()
        self._item: int | None = None
        self._is_checked = self._has_warned = False
        self._seeded_by = os.getpid()

    def set_random_state(
        self, seed: int | None = None, state: np.random.RandomState | None = None
    ) -> RandSyntheticReplace:
        """Seed the draws.

        Args:
            seed: Of a new stream.
            state: A stream to share.

        Returns:
            The transform.
        """
        super().set_random_state(seed, state)
        self._seeded_by = os.getpid()
        return self

    def randomize(self, data: Sequence[int] | None = None) -> None:
        """Draw whether to replace, and by what.

        Args:
            data: Items of the bank that may be drawn; by default all.
        """
        worker = get_worker_info()
        if worker is not None and self._seeded_by != os.getpid():
            # A loader that is not MONAI's seeds torch alone, and all workers would draw the same.
            self.set_random_state(derive_seed(worker.seed, type(self).__name__) % 2**32)
        super().randomize(None)
        among = range(len(self.bank)) if data is None else data
        self._item = among[self.R.randint(len(among))] if self._do_transform and len(among) else None

    def __call__(self, image: Any, label: Any = None, image_class: object = None, randomize: bool = True) -> Any:
        """Replace a pair, or not.

        Args:
            image: ``(C, H, W[, D])`` MetaTensor, tensor, array, or image of TorchIO.
            label: Its label map ``([C, ]H, W[, D])``, of the same kind; None for a bank without labels.
            image_class: Value of the sample in `class_column`.
            randomize: Draw anew; else what was drawn last is used again.

        Returns:
            Image and label, or the image alone where no label was given; new ones in the kind, type and device of
            those given, or these.

        Raises:
            BadInputError: If the sample is not in the state of the bank's scans, or does not say what `draw` needs.
        """
        if (label is None) != (self.bank.keys[1] is None):
            raise BadInputError(
                f"{self.bank.folder}: expected a label map with each image exactly where the bank has labels, got "
                f"{'none' if label is None else 'one'}. Replace pairs with their labels, or make the bank with "
                "label_key=None."
            )
        if not self._is_checked:
            self._is_checked = self._check(image, label)
        if randomize:
            self.randomize(self._candidates(image, label, image_class))
        drawn = self._item
        if drawn is None:
            new_image, new_label = mark_real(image), None if label is None else mark_real(label)
        else:
            made_image, made_label = self.bank[drawn]
            new_image = wrap_like(image, made_image)
            new_label = None if made_label is None else wrap_like(label, made_label)
        return new_image if label is None else (new_image, new_label)

    def _group(self) -> dict[Hashable, list[int]]:
        """Items of the bank by what samples are matched with."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        if self.draw == "any":
            return groups
        if self.class_column is None and self.bank.keys[1] is None:
            raise BadInputError(
                f"{self.bank.folder}: expected labels to draw by {self.draw}, got a bank without. Name the column of "
                "its metadata.csv that holds the class of each scan (class_key=), or use draw='any'."
            )
        for number, item in enumerate(self.bank.items):
            key: Hashable = item.classes
            if self.draw == "label":
                key = PurePosixPath(item.made_from).name
            elif self.class_column is not None:
                key = item.columns.get(self.class_column, "")
            groups[key].append(number)
        empty = groups.pop("", [])
        if self.draw == "label" and not groups:
            raise BadInputError(
                f"{self.bank.folder}: expected scans made from label maps of real cases, got none whose record names "
                "one. Make the bank with --labels FOLDER, or use draw='any' or draw='class'."
            )
        if self.draw == "class" and empty:
            raise BadInputError(
                f"{self.bank.folder}: expected a class of every scan in column {self.class_column!r} of metadata.csv, "
                f"got none for {self.bank.items[empty[0]].case} ({len(empty)} such). Fill it in, or name another "
                "column."
            )
        return groups

    def _candidates(self, image: Any, label: Any, image_class: object) -> Sequence[int] | None:
        """Items that may stand for a sample; None for all of them."""
        if self.draw == "any":
            return None
        if self.draw == "label":
            shown, found = self._made_from(unwrap(label, "label").file)
        elif self.class_column is None:
            pixels, array = unwrap(image, "image").array, unwrap(label, "label").array
            classes = label_values(array, label_channels(array, pixels))
            shown, found = f"classes {', '.join(map(str, classes))}", self._index.get(classes, [])
        else:
            if image_class is None:
                raise BadInputError(f"{self.class_column}: expected the class of the sample, got none. Give it.")
            value = image_class.item() if isinstance(image_class, torch.Tensor | np.generic) else image_class
            shown, found = f"class {value}", self._index.get(str(value), [])
        if not found and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.bank.folder} has no scan for {shown}: such samples are never replaced (told once)", stacklevel=4
            )
        return found

    def _made_from(self, file: str) -> tuple[str, list[int]]:
        if not file:
            raise BadInputError(
                f"{self.bank.folder}: expected labels that name the file they come from to draw by label, got one "
                "without. Load them with LoadImaged and keep the metadata, or use draw='any' or draw='class'."
            )
        path = Path(file)
        found = []
        for number in self._index.get(path.name, []):
            item = self.bank.items[number]
            if path.as_posix() == item.made_from or path.as_posix().endswith(f"/{item.made_from}"):
                found.append(number)
        known = {self.bank.items[number].made_from_sha256 for number in found}
        if known and path.is_file() and (own := _digest(path, path.stat().st_mtime_ns)) not in known:
            raise BadInputError(
                f"{path}: expected the label map that scans of {self.bank.folder} were made from, got another of this "
                f"name (SHA-256 {own[:12]}…). Make the bank from these label maps, or use draw='any' or draw='class'."
            )
        return f"label map {path.name}", found

    def _check(self, image: Any, label: Any) -> bool:
        """Hold the first sample with contrast to the bank; false where it has none."""
        name, items = f"{self.bank.folder}", self.bank.items
        scan = unwrap(image, "image")
        facts = measure(scan.array, scan.affine)
        own = self.bank[0][0]
        if scan.affine is None and not self.bank.preprocessed:
            raise BadInputError(
                f"{name}: expected images that carry their affine, got {type(image).__name__}, which cannot tell the "
                "order of its axes or its voxel size. Give preprocess= the function that loads the real files."
            )
        if (scan.affine is None) != (own.affine is None):
            raise BadInputError(
                f"{name}: expected images {'without' if own.affine is None else 'with'} an affine as preprocess makes "
                f"them, got {type(image).__name__}. Give preprocess= all that comes before this transform."
            )
        if is_whole(image) and own.array.dtype == np.float32:
            raise BadInputError(
                f"{name}: expected images of a floating type as in the bank, got whole numbers. Give preprocess= the "
                "transforms that come before this one in the pipeline, from the loading of files on."
            )
        if not has_contrast(facts):
            return False
        check_images(facts, [item.facts for item in items], name)
        if label is not None:
            array = unwrap(label, "label").array
            channels = label_channels(array, scan.array)
            known = {*self.bank.class_names, *(value for item in items for value in item.classes)}
            check_labels(channels, set(label_values(array, channels)), items[0].label_channels, known, name)
        return True


@cache
def _digest(path: Path, changed: int) -> str:
    """Digest of a file; another time of change asks anew."""
    return sha256_file(path)
