"""Real pairs replaced by synthetic ones in a training loop: the version for dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from medgen.transforms.bank import SyntheticBank
from medgen.transforms.packing import Preprocess
from medgen.transforms.subjects import close_sample, open_sample
from medgen.transforms.synthetic_replace import Draw, RandSyntheticReplace
from medgen.transforms.workers import DrawnWithin
from medgen.types import BadInputError


class RandSyntheticReplaced(DrawnWithin, MapTransform):
    """Replace the image and the label map of a sample by a pair of a bank of synthetic scans.

    A pair must be in the state of the sample whose place it takes: `preprocess` names the transforms that come before
    this one. ::

        prepare = [LoadImaged(("image", "label"), ensure_channel_first=True), ScaleIntensityd("image")]
        replaced = RandSyntheticReplaced(
            "image", "label", "synthetic/", class_names=read_dataset(FOLDER).class_names, preprocess=prepare
        )
        Compose([*prepare, replaced, RandFlipd(...)])

    Each sample is held to the bank: channels, axes, spacing and orientation of the affine, and whether its type of
    numbers holds the bank's. The first one that a process sees is also held to it by its label values and the range of
    its intensities. Put it before random crops, as a whole scan takes the place of what comes in. All other keys keep
    what they hold, so compute what depends on the image later.

    A MetaTensor gives one with the affine of the bank's scan, and the name, affine and size of its file; its metadata
    say whether it is ``synthetic``. Tensors, arrays and the images of a TorchIO ``Subject`` give their own kind.

    Draws come from ``self.R`` alone. MONAI's ``DataLoader`` seeds it, so under ``set_determinism`` a run gives the same
    samples again with the same number of workers; another number gives others, as with all random transforms of MONAI.
    In a worker that nobody seeded it takes the worker's seed, so ``torch.manual_seed`` decides with PyTorch's own
    loader; without workers call ``set_random_state``. MONAI's ``PersistentDataset`` keeps the affines of what it stores
    only with ``track_meta=True, weights_only=False``.

    Args:
        keys: Key of the image.
        label_key: Key of the label map; None to replace images alone, from a bank without labels or with `class_key`.
        bank: Output folder of ``medgen synthesize`` or ``medgen filter``, or a bank that was made for these keys.
        prob: Probability that a sample is replaced, in [0, 1].
        draw: ``"any"`` draws from the whole bank, ``"label"`` from the scans made for the sample's own label map (by
            name and digest of its file, as the manifest tells, also where it was deformed), ``"class"`` from those that
            show exactly the classes which the sample shows. A sample without such a scan stays, and a warning names the
            first.
        class_key: With ``draw="class"``, key of the class of the whole image, and column of the bank's
            ``metadata.csv``, in place of classes in the label map.
        class_names: Label value to name in the files of the real scans, such as ``read_dataset(FOLDER).class_names``: a
            bank that declares others is refused. Names that medgen gave for want of any (``class_1``) are not compared.
            By default only a label value that the bank lacks is refused.
        preprocess: As for :class:`~medgen.transforms.bank.SyntheticBank`.
        cache_dir: Likewise.
        allow_missing_keys: Leave a sample as it is that lacks one of the keys, instead of failing.

    Raises:
        BadInputError: If the bank cannot be used, has other classes, lacks what `draw` needs, or is not in the state of
            the samples.
        KeyError: If a sample lacks a key.
    """

    def __init__(
        self,
        keys: KeysCollection,
        label_key: str | None,
        bank: SyntheticBank | str | Path,
        prob: float = 0.5,
        *,
        draw: Draw = "any",
        class_key: str | None = None,
        class_names: Mapping[int, str] | None = None,
        preprocess: Preprocess | None = None,
        cache_dir: str | Path | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        if len(self.keys) != 1:
            raise BadInputError(
                f"keys: expected the key of one image, got {', '.join(map(str, self.keys))}. Join channels with "
                "ConcatItemsd before, and name the label map in label_key."
            )
        wanted = (str(self.keys[0]), label_key)
        if not isinstance(bank, SyntheticBank):
            bank = SyntheticBank(
                bank, image_key=wanted[0], label_key=label_key, preprocess=preprocess, cache_dir=cache_dir
            )
            preprocess = cache_dir = None
        elif bank.keys != wanted:
            raise BadInputError(f"{bank.folder}: expected a bank made for the keys {wanted}, got one for {bank.keys}.")
        self.label_key, self.class_key = label_key, class_key
        replace = RandSyntheticReplace(
            bank,
            prob,
            draw=draw,
            class_column=class_key,
            class_names=class_names,
            preprocess=preprocess,
            cache_dir=cache_dir,
        )
        DrawnWithin.__init__(self, replace)

    def __call__(self, data: Mapping[Hashable, Any], randomize: bool = True) -> Any:
        """Replace a pair, or not.

        Args:
            data: The sample: a dictionary, or a ``Subject`` of TorchIO.
            randomize: Draw anew; else the item of the bank that `last` names is used again.

        Returns:
            A new one of the same kind, with the same keys.
        """
        needed = [key for key in (*self.keys, self.label_key, self.class_key) if key is not None]
        missing = [key for key in needed if key not in data]
        if missing and not self.allow_missing_keys:
            raise KeyError(f"{type(self).__name__}: expected {', '.join(map(str, needed))}, got no {missing[0]}")
        made = open_sample(data)
        if not missing:
            image_class = None if self.class_key is None else made[self.class_key]
            if self.label_key is None:
                made[self.keys[0]] = self.inner(made[self.keys[0]], None, image_class, randomize)
            else:
                pair = self.inner(made[self.keys[0]], made[self.label_key], image_class, randomize)
                made[self.keys[0]], made[self.label_key] = pair
        return close_sample(made, data)


RandSyntheticReplaceD = RandSyntheticReplaceDict = RandSyntheticReplaced
