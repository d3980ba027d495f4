"""A `conditions.csv`: one row a sample, with its own label map, edges, source scan, text and attributes."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from medgen.data.dataset import Rejection
from medgen.generator import Generator, GeneratorConfig
from medgen.provenance import hide_folder, sha256_file
from medgen.synthesis.inputs import check_edge, check_label, require_same_grid
from medgen.synthesis.plan import EdgeSource, LabelSource, ScanSource, SourceFile, check_label_source
from medgen.synthesis.sources import read_source, resolve_strength
from medgen.synthesis.steering import require_conditions
from medgen.types import BadInputError

_SOURCE_COLUMNS = ("source", "source_label", "region", "strength")
_COLUMNS = {"label": "mask", "edge": "edge", "edge_map": "edge", "text": "text", "prompt": "text"}


def read_conditions(
    path: Path,
    generator: Generator,
    *,
    source: LabelSource | None,
    attributes: Mapping[str, str],
    outlines: bool = False,
    strength: float | None = None,
    skip_bad: bool = False,
) -> tuple[list[dict[str, Any]], list[Rejection]]:
    """Read what each sample of a run is to be steered by.

    Args:
        path: CSV file in UTF-8 with any of the columns `label`, `edge`, `edge_map` (files, relative to its folder; a
            scan of several channels as `a.nii.gz;b.nii.gz`), `source`, `source_label`, `region` (files too) and
            `strength`, `text` or `prompt`, and one per attribute, which comes first where it has such a name. An empty
            cell is absent.
        generator: The model.
        source: Where the label maps come from; None takes them as they are, and no label map where a row names none.
        attributes: Facts of every sample, where a row does not say otherwise.
        outlines: Whether label maps steer by their outlines.
        strength: Share of the noise process that is run on source scans, likewise.
        skip_bad: Leave out rows whose files cannot be used instead of stopping at the first.

    Returns:
        Fields of :class:`medgen.synthesis.SampleSpec` for each row, and what was left out with the reason.

    Raises:
        BadInputError: If the file is no such table, has no rows, or a row cannot be used (with ``skip_bad``, if all are
            so).
    """
    table = _read_rows(path)
    header = list(table[0][1])
    _check_header(path, header, generator)
    made_from = _source_columns(generator.config)
    filled = {
        "edge" if outlines and column == "label" else _COLUMNS.get(column, column): column
        for column in header
        if column not in made_from and any(row[column] for _, row in table)
    }
    require_conditions(generator, {name: f"{path}, column {column}" for name, column in filled.items()})
    reader = _FileReader(path.parent, generator.config)
    rows: list[dict[str, Any]] = []
    rejected: list[Rejection] = []
    for line, row in table:
        try:
            own = _row(row, reader, source, strength)
            own |= {"outlines": outlines and own["file"] is not None, "attributes": _facts(row, attributes, made_from)}
            rows.append(own)
        except BadInputError as error:
            if not skip_bad:
                raise BadInputError(f"{path}, line {line}: {error}") from error
            reason = hide_folder(str(error), path.parent)
            for cell in row.values():  # a path may lead anywhere
                reason = hide_folder(reason, Path(cell).parent) if Path(cell).is_absolute() else reason
            rejected.append(Rejection(f"{path.name}, line {line}", reason))
    if strength is not None and not any(row["scan"] for row in rows) and not rejected:
        raise BadInputError(
            f"strength: expected source scans, got none in {path}. Add a column source, or leave it out."
        )
    if not rows:
        raise BadInputError(f"{path}: expected a row that can be used, got none. First: {rejected[0].reason}")
    return rows, rejected


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and cells of each row."""
    if not path.is_file():
        raise BadInputError(f"{path}: expected a CSV file of conditions, got none there. Check the path.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise BadInputError(
                        f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} columns as in the "
                        "header, got another number. Quote values that contain commas."
                    )
                rows.append((reader.line_num, {name: value.strip() for name, value in row.items()}))
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadInputError(f"{path}: expected CSV in UTF-8, got an error: {error}. Save it again.") from error
    if not rows:
        raise BadInputError(f"{path}: expected a header and at least one row, got no row. Put in one row a sample.")
    return rows


def _check_header(path: Path, header: Sequence[str], generator: Generator) -> None:
    known = [*_COLUMNS, *_source_columns(generator.config), *generator.config.attributes]
    unknown = [column for column in header if column not in known]
    if unknown:
        raise BadInputError(
            f"{path}: expected columns among {', '.join(known)}, got {', '.join(map(repr, unknown))}. Rename them or "
            "take them away."
        )
    if "text" in header and "prompt" in header:
        raise BadInputError(f"{path}: expected a column text or prompt, got both. Remove one.")


def _facts(row: Mapping[str, str], attributes: Mapping[str, str], made_from: Sequence[str]) -> dict[str, str]:
    own = {name: value for name, value in row.items() if value and name not in _COLUMNS and name not in made_from}
    return {**attributes, **own}


def _row(
    row: Mapping[str, str], reader: _FileReader, source: LabelSource | None, strength: float | None
) -> dict[str, Any]:
    label, edge, edge_map = (row.get(name, "") for name in ("label", "edge", "edge_map"))
    if edge and edge_map:
        raise BadInputError("expected an edge or an edge_map, got both. Leave one empty.")
    if label and source in ("generate", "none"):
        raise BadInputError(
            f"expected no label map with label_source '{source}', got {label}. Empty the cell, or leave the argument "
            "out."
        )
    if label and source == "deform" and (edge or edge_map):
        raise BadInputError(
            "expected no edges beside a label map that is deformed, which they would contradict. Leave the cell empty."
        )
    file = reader.label(label) if label else None
    edges = reader.edge(edge or edge_map, ready=bool(edge_map)) if edge or edge_map else None
    scan = reader.scan(row, file, strength)
    if scan is not None:
        check_label_source(source)
    leading = file if scan is None else scan.files[0]
    if edges is not None and leading is not None:
        require_same_grid(edges.files[0].path, leading.path)
    own: LabelSource = (source or "files") if file is not None else "generate" if source == "generate" else "none"
    text = row.get("text") or row.get("prompt") or None
    return {"source": own, "file": file, "edge": edges, "scan": scan, "text": text}


class _FileReader:
    """Reads each file that a table names, however often, once."""

    def __init__(self, folder: Path, config: GeneratorConfig) -> None:
        self.folder, self.config = folder, config
        self.labels: dict[str, SourceFile] = {}
        self.edges: dict[tuple[str, bool], EdgeSource] = {}
        self.files: dict[str, SourceFile] = {}
        self.scans: set[tuple[ScanSource, SourceFile | None]] = set()

    def label(self, cell: str) -> SourceFile:
        if cell not in self.labels:
            self.labels[cell] = check_label(self.folder / cell, self.config, name=_name(cell))
        return self.labels[cell]

    def edge(self, cell: str, *, ready: bool) -> EdgeSource:
        if (cell, ready) not in self.edges:
            parts = [part.strip() for part in cell.split(";")]
            paths, names = [self.folder / part for part in parts], [_name(part) for part in parts]
            self.edges[cell, ready] = check_edge(paths, self.config, ready=ready, names=names)
        return self.edges[cell, ready]

    def scan(self, row: Mapping[str, str], label: SourceFile | None, strength: float | None) -> ScanSource | None:
        cells = {name: row[name] for name in _source_columns(self.config) if row.get(name)}
        if not cells.get("source"):
            if cells:
                raise BadInputError(
                    f"expected a source beside {', '.join(cells)}, got none. Name the scan, or empty it."
                )
            return None
        source = ScanSource(
            tuple(self._file(part.strip()) for part in cells["source"].split(";")),
            _strength(cells, strength),
            region=self._file(cells["region"]) if "region" in cells else None,
            label=self._file(cells["source_label"]) if "source_label" in cells else None,
        )
        if (source, label) not in self.scans:
            read_source(source, label, self.config)
            self.scans.add((source, label))
        return source

    def _file(self, cell: str) -> SourceFile:
        if cell not in self.files:
            path = self.folder / cell
            if not path.is_file():
                raise BadInputError(f"{path}: expected a file, got nothing there. Check the path.")
            self.files[cell] = SourceFile(path, sha256_file(path), _name(cell))
        return self.files[cell]


def _strength(cells: Mapping[str, str], default: float | None) -> float:
    cell = cells.get("strength", "")
    try:
        own = float(cell) if cell else default
    except ValueError as error:
        raise BadInputError(f"strength: expected a number, got {cell!r}. Write such as 0.5.") from error
    return resolve_strength(own, local="region" in cells or "source_label" in cells)


def _source_columns(config: GeneratorConfig) -> list[str]:
    """Columns of what a sample is made from; an attribute of the model that has such a name comes first."""
    return [name for name in _SOURCE_COLUMNS if name not in config.attributes]


def _name(cell: str) -> str:
    """How a manifest calls a file: by its place below the table, and nothing of this machine."""
    place = PurePosixPath(cell)
    return place.name if place.is_absolute() or ".." in place.parts else place.as_posix()
