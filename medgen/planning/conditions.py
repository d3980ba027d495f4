"""What a denoiser is to be steered by, as a plan says it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from medgen.conditions.attributes import SPACING, Attribute, fit_attribute, fit_spacing
from medgen.conditions.edge import EdgeSettings
from medgen.conditions.mask import MaskForm
from medgen.conditions.text import fill_template
from medgen.data.case import TRAIN_SPLITS, Case, Dataset
from medgen.data.geometry import place
from medgen.data.io import read_grid
from medgen.data.metadata import TEXT_COLUMNS, text_columns
from medgen.types import BadInputError

SMALL_ENCODER = "small"


@dataclass
class TextPlan:
    """How texts steer it.

    Attributes:
        template: Text of a scan from the columns of its metadata, `{view}`, with `[, {age} years]` left out where a
            column is empty; null takes the data set's own text: the first of the columns `text`, `caption` and `report`
            that is filled.
        encoder: `small` learns its own words along with the denoiser; else the folder or Hub id of a text encoder.
        trainable: Whether a pretrained encoder is tuned too; the small one always is.
        length: Most words of a text, of which longer ones are cut in training.
        width: Features of a word; that of a pretrained encoder.
        depth: Layers of the small encoder.
        min_count: Times that a word must occur in the training texts, for the small encoder to know it.
    """

    template: str | None = None
    encoder: str = SMALL_ENCODER
    trainable: bool = False
    length: int = 64
    width: int = 128
    depth: int = 2
    min_count: int = 2

    def text_of(self, case: Case) -> str:
        """Text of a scan.

        Args:
            case: The scan.

        Returns:
            The text; empty where there is none.

        Raises:
            BadInputError: If the template names a column that is not there.
        """
        if self.template is None:
            return (case.text or "").strip()
        return fill_template(self.template, case.meta)

    def source(self, cases: Iterable[Case]) -> str:
        """Where the texts of scans come from.

        Args:
            cases: The scans.

        Returns:
            In words, such as `column caption`.
        """
        if self.template is not None:
            return f"template {self.template!r}"
        columns = text_columns(cases)
        if len(columns) == 1:
            return f"column {next(iter(columns))}"
        return ", ".join(f"column {name} of {count} scans" for name, count in columns.items()) or "no scan has one"


@dataclass
class ConditionsPlan:
    """What steers the denoiser. Each may be absent in a scan, and is left out of some training samples on purpose.

    Attributes:
        mask: Whether label maps do.
        mask_form: How they are written as numbers: `one_hot`, or `signed_distance` from the border of each class.
        class_dropout: Chance that a class of a label map is background in a training sample, so that maps with few of
            the classes can be used later, and the others come as the model likes (Konz et al. 2024, arXiv:2402.05210).
        edge: How edges are extracted from the training scans; null is without edges.
        text: How texts are read; null is without text.
        attributes: Columns of the metadata, and `spacing` for the voxel size, each with how it is written as numbers.
        drop_all: Chance that a training sample loses all of its conditions together, on top of each on its own.
    """

    mask: bool = True
    mask_form: MaskForm = "one_hot"
    class_dropout: float = 0.0
    edge: EdgeSettings | None = None
    text: TextPlan | None = None
    attributes: dict[str, Attribute] = field(default_factory=dict)
    drop_all: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the conditions."""
        maps = {"mask": self.mask, "edge": self.edge is not None, "text": self.text is not None}
        return (*(name for name, there in maps.items() if there), *self.attributes)

    def only(self, names: Collection[str]) -> ConditionsPlan:
        """Fewer conditions.

        Args:
            names: Those to keep.

        Returns:
            The plan without the others.
        """
        return replace(
            self,
            mask=self.mask and "mask" in names,
            edge=self.edge if "edge" in names else None,
            text=self.text if "text" in names else None,
            attributes={name: attribute for name, attribute in self.attributes.items() if name in names},
        )

    def describe(self, cases: Iterable[Case]) -> str:
        """Names of the conditions, with where the texts come from.

        Args:
            cases: The scans that are learned from.

        Returns:
            Such as `mask, text (column caption), age`.
        """
        text = {"text": f"text ({self.text.source(cases)})"} if self.text is not None else {}
        return ", ".join(text.get(name, name) for name in self.names) or "nothing"

    @property
    def needs_labels(self) -> bool:
        """Whether a scan without a label map teaches nothing."""
        return self.names == ("mask",)


def choose_conditions(dataset: Dataset, names: Sequence[str] | None = None) -> ConditionsPlan:
    """Describe the conditions that a user asks for.

    Args:
        dataset: The scans.
        names: `mask`, `edge`, `text`, `spacing` and columns of the metadata, or `none` alone; None takes label maps.

    Returns:
        The plan.

    Raises:
        BadInputError: If the data set has no such thing.
    """
    if names is None:
        return ConditionsPlan()
    wanted = [name for name in dict.fromkeys(names) if name != "none"]
    learned = [case for case in dataset.cases if case.split is None or case.split in TRAIN_SPLITS]
    columns = sorted({name for case in learned for name, value in case.meta.items() if value} - {"text"})
    found = ConditionsPlan(mask="mask" in wanted, drop_all=0.1 if len(wanted) > 1 else 0.0)
    for name in wanted:
        if name == "mask":
            if all(case.label is None for case in learned):
                raise BadInputError(f"{dataset.root}: expected label maps for the condition 'mask', got none.")
        elif name == "edge":
            found.edge = EdgeSettings()
        elif name == "text":
            if not any(case.text for case in learned):
                raise BadInputError(
                    f"{dataset.root}: expected a column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]} in the "
                    "metadata for the condition 'text', got none. Add one, or give a template of other columns in the "
                    "plan (denoiser.conditions.text.template)."
                )
            found.text = TextPlan(length=_text_length([case.text for case in learned if case.text]))
        elif name == SPACING:
            found.attributes[name] = _spacing(dataset, learned)
        elif name in columns:
            values = [case.meta[name] for case in learned if case.meta.get(name)]
            found.attributes[name] = fit_attribute(name, values)
        else:
            raise BadInputError(
                f"conditions: expected mask, edge, text, spacing, none or a column of the metadata "
                f"({', '.join(columns) or 'it has none'}), got {name!r}. Correct the name."
            )
    return found


def _text_length(texts: Sequence[str]) -> int:
    """Room for 19 of 20 texts, within what a denoiser can attend to in a reasonable time."""
    words = sorted(len(text.split()) for text in texts)
    return min(max(8, -(-int(1.2 * words[19 * (len(words) - 1) // 20]) // 8) * 8), 128)


def facts_of(case: Case, attributes: Sequence[str]) -> dict[str, str]:
    """What is known of a scan's attributes, apart from its voxel size.

    Args:
        case: The scan.
        attributes: Names.

    Returns:
        Values that are not empty.
    """
    return {name: case.meta[name] for name in attributes if case.meta.get(name)}


def _spacing(dataset: Dataset, cases: Sequence[Case]) -> Attribute:
    grids = []
    for case in cases:
        try:
            grids.append(read_grid(case.images[0]))
        except BadInputError:  # training says what is wrong with it
            continue
    known = [grid for grid in grids if grid.known]
    if not known:
        raise BadInputError(
            f"{dataset.root}: expected scans that state their voxel size for the condition 'spacing', got none."
        )
    spacings = [tuple(grid.spacing[axis] for axis in place(grid).axes[0]) for grid in known]
    return fit_spacing(spacings)
