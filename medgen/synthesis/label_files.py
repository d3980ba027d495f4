"""Label maps of the user's: which of a folder or of a data set are taken."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medgen.data.dataset import Rejection, is_data_set, labelled_training_cases, read_dataset, read_labels
from medgen.generator import GeneratorConfig
from medgen.provenance import hide_folder
from medgen.synthesis.inputs import check_label
from medgen.synthesis.plan import SourceFile
from medgen.types import BadInputError


@dataclass(frozen=True)
class LabelMaps:
    """Label maps of a folder.

    Attributes:
        files: Those that fit the model, by case.
        rejected: The others, with the reason.
        left_out: Cases of a data set that are not of its training split, or held out where it names none; None where
            the folder is one of label maps alone.
    """

    files: dict[str, SourceFile]
    rejected: list[Rejection]
    left_out: frozenset[str] | None

    @property
    def told(self) -> str:
        """What the user should know of the choice; empty where there was none."""
        if self.left_out is None:
            return ""
        rest = f"; {len(self.left_out)} left out, of scans that are held out for tests" if self.left_out else ""
        return f"label maps: {len(self.files)} of the training split{rest}"


def find_labels(
    folder: Path, config: GeneratorConfig, *, skip_bad: bool = False
) -> tuple[list[SourceFile], list[Rejection]]:
    """List the label maps of a folder.

    Args:
        folder: Folder of label maps; or a data set, of which those of the training split count.
        config: What the model was trained for.
        skip_bad: Leave out maps that do not fit instead of stopping at the first.

    Returns:
        Maps that fit, by name, and those left out with the reason.

    Raises:
        BadInputError: If a map does not fit the model (or none does), or a data set has none for training.
    """
    found = find_label_maps(folder, config, skip_bad=skip_bad)
    return list(found.files.values()), found.rejected


def find_label_maps(folder: Path, config: GeneratorConfig, *, skip_bad: bool = False) -> LabelMaps:
    """List the label maps of a folder by case.

    Args:
        folder: As for :func:`find_labels`, with its errors.
        config: As there.
        skip_bad: As there.

    Returns:
        The maps.
    """
    listed, left_out = _list_labels(folder)
    found = LabelMaps({}, [], left_out)
    for case, path in listed:
        try:
            # A place in the data set, by which a replay finds the file; never one outside.
            place = path.relative_to(folder) if path.is_relative_to(folder) else path
            name = path.name if ".." in place.parts or place.is_absolute() else place.as_posix()
            found.files[case] = check_label(path, config, name=name)
        except BadInputError as error:
            if not skip_bad:
                raise
            found.rejected.append(Rejection(case, hide_folder(str(error), path.parent)))
    if not found.files:
        reason = found.rejected[0].reason
        raise BadInputError(f"{folder}: expected label maps that fit the model, got none. First: {reason}")
    return found


def _list_labels(folder: Path) -> tuple[list[tuple[str, Path]], frozenset[str] | None]:
    """Case and file of each label map, and as `left_out` in :class:`LabelMaps`."""
    if not is_data_set(folder):
        return read_labels(folder), None
    dataset = read_dataset(folder)
    labelled = [case for case in dataset.cases if case.label is not None]
    alone = "give the folder of its label maps, all of which are taken then"
    if not labelled:
        raise BadInputError(
            f"{folder}: expected a data set with label maps, got {len(dataset.cases)} scans without. Add them."
        )
    try:
        chosen, _ = labelled_training_cases(dataset)
    except BadInputError as error:
        raise BadInputError(f"{error} Or {alone}.") from error
    left_out = {case.case for case in labelled} - {case.case for case in chosen}
    return [(case.case, case.label) for case in chosen if case.label is not None], frozenset(left_out)
