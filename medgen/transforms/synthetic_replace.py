"""A real image and its label map replaced by a synthetic pair: the version for arrays."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from medgen.data.case import unlike_classes
from medgen.provenance import sha256_file
from medgen.transforms.agreement import (
    check_classes,
    check_intensities,
    check_label_channels,
    check_place,
    has_contrast,
    label_channels,
    label_values,
    measure,
    measure_place,
    reference,
)
from medgen.transforms.bank import SyntheticBank
from medgen.transforms.carriers import (
    is_whole,
    limits,
    mark_real,
    read_affine,
    read_dtype,
    read_file,
    read_shape,
    unwrap,
    wrap_like,
)
from medgen.transforms.packing import Packed, Preprocess
from medgen.transforms.variation import check_prob
from medgen.transforms.workers import SeededInWorkers
from medgen.types import BadInputError

Draw = Literal["any", "label", "class"]

_PERSISTENT = " (MONAI's PersistentDataset does with track_meta=True, weights_only=False)"


class RandSyntheticReplace(SeededInWorkers):
    """Replace an image and its label map by a pair of a bank; array version of :class:`RandSyntheticReplaced`.

    Its `last` holds the index of the bank's item that took the last place, or None where the pair stayed.

    Args:
        bank: Folder, or a bank.
        prob: Probability that a sample is replaced, in [0, 1].
        draw: As for :class:`RandSyntheticReplaced`.
        class_column: With ``draw="class"``, column of the bank's ``metadata.csv`` in place of the label map.
        class_names: As for :class:`RandSyntheticReplaced`.
        labelled: Whether labels are replaced too; for a folder only, a bank knows.
        preprocess: As for :class:`~medgen.transforms.bank.SyntheticBank`; for a folder only.
        cache_dir: Likewise.

    Raises:
        BadInputError: If the bank cannot be used, has other classes, or lacks what `draw` needs.
    """

    def __init__(
        self,
        bank: SyntheticBank | str | Path,
        prob: float = 0.5,
        *,
        draw: Draw = "any",
        class_column: str | None = None,
        class_names: Mapping[int, str] | None = None,
        labelled: bool = True,
        preprocess: Preprocess | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        if class_column is not None and draw != "class":
            raise BadInputError(f"class_column, class_key: expected draw='class' with it, got draw={draw!r}.")
        if draw not in get_args(Draw):
            raise BadInputError(f"draw: expected one of {', '.join(get_args(Draw))}, got {draw!r}.")
        check_prob(prob)
        super().__init__(prob)
        if not isinstance(bank, SyntheticBank):
            label_key = "label" if labelled else None
            bank = SyntheticBank(bank, label_key=label_key, preprocess=preprocess, cache_dir=cache_dir)
        elif preprocess is not None or cache_dir is not None:
            raise BadInputError("preprocess, cache_dir: expected them where the bank is made, got a bank that is made.")
        self.bank, self.matched_by, self.class_column = bank, draw, class_column
        if class_names is not None:
            self._check_class_names(class_names)
        self._index = self._group()
        self._common = reference([item.facts for item in bank.items])
        self._numbers = {
            what: _numbers([packed for item in bank.items if (packed := getattr(item, part)) is not None])
            for what, part in (("images", "image"), ("labels", "label"))
        }
        self._classes = {*bank.class_names, *(value for item in bank.items for value in item.classes)}
        self.last: int | None = None
        self._is_checked = self._has_warned = False

    def randomize(self, data: Callable[[], Sequence[int]] | None = None) -> None:
        """Draw whether to replace, and by what, into `last`.

        Args:
            data: As for :meth:`draw`.
        """
        self.last = self.draw(data)

    def draw(self, candidates: Callable[[], Sequence[int]] | None = None) -> int | None:
        """Draw whether to replace, and by what.

        Args:
            candidates: Finds the items of the bank that may be drawn, asked only where one is; by default all may.

        Returns:
            Index of the item; None to leave the pair.
        """
        if self.R.rand() >= self.prob:
            return None
        among = range(len(self.bank)) if candidates is None else candidates()
        return int(among[self.R.randint(len(among))]) if len(among) else None

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
        self._check(image, label)
        if not self._is_checked:
            self._is_checked = self._check_contents(image, label)
        if randomize:
            # Threads of a loader share this transform, so what one draws is not read from it again.
            self.last = drawn = self.draw(partial(self._candidates, image, label, image_class))
        else:
            drawn = self.last
        if drawn is None:
            new_image, new_label = mark_real(image), None if label is None else mark_real(label)
        else:
            matched = randomize and self.matched_by == "class" and self.class_column is None
            if label is not None and not matched:
                self._check_classes(label)
            made_image, made_label = self.bank[drawn]
            new_image = wrap_like(image, made_image)
            new_label = None if made_label is None else wrap_like(label, made_label)
        return new_image if label is None else (new_image, new_label)

    def _check_class_names(self, class_names: Mapping[int, str]) -> None:
        declared = self.bank.class_names
        if self.bank.keys[1] is None:
            raise BadInputError(f"class_names: expected none for a bank without labels, got {_classes(class_names)}.")
        if unlike_classes(class_names, declared):
            raise BadInputError(
                f"{self.bank.folder}: expected a bank of the classes {_classes(class_names)} (class_names), got one of "
                f"{_classes(declared)}. Make a bank with the classes of these scans, or name equal classes alike."
            )

    def _group(self) -> dict[Hashable, list[int]]:
        """Items of the bank by what samples are matched with."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        if self.matched_by == "any":
            return groups
        if self.class_column is None and self.bank.keys[1] is None:
            raise BadInputError(
                f"{self.bank.folder}: expected labels to draw by {self.matched_by}, got a bank without. Name the "
                "column of its metadata.csv that holds the class of each scan (class_key=), or use draw='any'."
            )
        for number, item in enumerate(self.bank.items):
            key: Hashable = item.classes
            if self.matched_by == "label":
                key = PurePosixPath(item.made_from).name
            elif self.class_column is not None:
                key = _one_class(item.columns.get(self.class_column, ""))
            groups[key].append(number)
        empty = groups.pop("", [])
        if self.matched_by == "label" and not groups:
            raise BadInputError(
                f"{self.bank.folder}: expected scans made from label maps of real cases, got none whose record names "
                "one. Make the bank with --labels FOLDER, or use draw='any' or draw='class'."
            )
        if self.matched_by == "class" and empty:
            raise BadInputError(
                f"{self.bank.folder}: expected a class of every scan in column {self.class_column!r} of metadata.csv, "
                f"got none for {self.bank.items[empty[0]].case} ({len(empty)} such). Fill it in, or name another "
                "column."
            )
        return groups

    def _candidates(self, image: Any, label: Any, image_class: object) -> Sequence[int]:
        """Items that may stand for a sample."""
        if self.matched_by == "any":
            return range(len(self.bank))
        if self.matched_by == "label":
            shown, found = self._made_from(read_file(label))
        elif self.class_column is None:
            array = unwrap(label, "label").array
            classes = label_values(array, label_channels(array.shape, read_shape(image, "image")))
            shown, found = f"classes {', '.join(map(str, classes))}", self._index.get(classes, [])
        else:
            if image_class is None:
                raise BadInputError(f"{self.class_column}: expected the class of the sample, got none. Give it.")
            value = _one_class(image_class)
            shown, found = f"class {value}", self._index.get(value, [])
        if not found and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self.bank.folder} has no scan for {shown}: such samples are never replaced (told once)", stacklevel=5
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

    def _check(self, image: Any, label: Any) -> None:
        """Hold a sample to the bank, without a look at its voxels."""
        name = f"{self.bank.folder}"
        shape, affine, own = read_shape(image, "image"), read_affine(image), self.bank.items[0].image.affine
        if affine is None and not self.bank.preprocessed:
            raise BadInputError(
                f"{name}: expected images that carry their affine, got {type(image).__name__}, which cannot tell the "
                "order of its axes or its voxel size. Give preprocess= the function that loads the real files, or keep "
                f"the metadata{_PERSISTENT}."
            )
        if (affine is None) != (own is None):
            raise BadInputError(
                f"{name}: expected images {'without' if own is None else 'with'} an affine as preprocess makes them, "
                f"got {type(image).__name__}. Give preprocess= all that comes before this transform, or keep the "
                f"metadata{_PERSISTENT}."
            )
        check_place(measure_place(shape, affine), self._common, name)
        self._check_numbers(image, "images")
        if label is not None:
            channels = label_channels(read_shape(label, "label"), shape)
            check_label_channels(channels, self.bank.items[0].label_channels, name)
            self._check_numbers(label, "labels")

    def _check_numbers(self, value: Any, what: str) -> None:
        """Refuse a type that would cut or wrap the numbers of the bank."""
        are_whole, low, high = self._numbers[what]
        if is_whole(value) and not are_whole:
            raise BadInputError(
                f"{self.bank.folder}: expected {what} of a floating type as in the bank, got whole numbers. Give "
                "preprocess= the transforms that come before this one in the pipeline, from the loading of files on."
            )
        least, most = limits(value)
        if low < least or high > most:
            raise BadInputError(
                f"{self.bank.folder}: expected {what} of a type that holds the {low:g} to {high:g} of the bank, got "
                f"{read_dtype(value)}, which ends at {least:g} and {most:g}. Give preprocess= the transforms that come "
                "before this one in the pipeline, from the loading of files on, or cast samples to a wider type."
            )

    def _check_contents(self, image: Any, label: Any) -> bool:
        """Hold the first sample with contrast to the bank; false where it has none."""
        name, items = f"{self.bank.folder}", self.bank.items
        facts = measure(unwrap(image, "image").array, None)
        if not has_contrast(facts):
            return False
        check_intensities(facts, [item.facts for item in items], name)
        if label is not None:
            self._check_classes(label)
        return True

    def _check_classes(self, label: Any) -> None:
        """Refuse a label map that no scan of the bank can stand for: a class of it would never be learned."""
        array, known = unwrap(label, "label").array, self._classes
        check_classes(set(label_values(array, self.bank.items[0].label_channels)), known, f"{self.bank.folder}")


def _one_class(value: object) -> str:
    """A class of a whole image in words; 1, 1.0, tensor(1.) and "1.0" are one class."""
    value = value.item() if hasattr(value, "item") else value
    return re.sub(r"^(-?\d+)\.0+$", r"\1", str(value))


def _numbers(packed: Sequence[Packed]) -> tuple[bool, float, float]:
    """Whether all numbers are whole, the lowest and the highest."""
    low, high = min((each.low for each in packed), default=0), max((each.high for each in packed), default=0)
    return all(each.dtype != "float32" for each in packed), low, high


def _classes(names: Mapping[int, str]) -> str:
    return ", ".join(f"{value} ({name})" for value, name in names.items())


@cache
def _digest(path: Path, changed: int) -> str:
    """Digest of a file; another time of change asks anew."""
    return sha256_file(path)
