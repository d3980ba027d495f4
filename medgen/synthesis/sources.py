"""Scans that samples are made from: found, matched with all that belongs to them by file name, and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medgen.data.dataset import RGB, Rejection, check_same_grid, load_label, read_labels
from medgen.data.io import read_label, stored_dtype
from medgen.generator import GeneratorConfig
from medgen.provenance import hide_folder, sha256_file
from medgen.synthesis.inpainting import Inpainting, changed_region, check_labels, check_strength
from medgen.synthesis.inputs import SCAN_ENDINGS, check_grid, list_cases, read_scan, require_same_grid
from medgen.synthesis.plan import EdgeSource, ScanSource, SourceFile
from medgen.types import BadInputError, Grid


@dataclass(frozen=True)
class Inputs:
    """Files of the folders that were given, by the name of their case; empty where none was.

    Attributes:
        labels: Label maps that the samples are to have.
        edges: What their edges are taken from.
        scans: Scans that they are made from.
        regions: Maps of where these may change.
        source_labels: Label maps of the scans as they are.
        strength: Share of the noise process that is run on the scans.
    """

    labels: Mapping[str, SourceFile] = field(default_factory=dict)
    edges: Mapping[str, EdgeSource] = field(default_factory=dict)
    scans: Mapping[str, tuple[SourceFile, ...]] = field(default_factory=dict)
    regions: Mapping[str, SourceFile] = field(default_factory=dict)
    source_labels: Mapping[str, SourceFile] = field(default_factory=dict)
    strength: float = 1.0


def find_scans(folder: Path, config: GeneratorConfig) -> dict[str, tuple[SourceFile, ...]]:
    """List the scans of a folder.

    Args:
        folder: Folder of scans, one file each or one per channel (``CASE_0000``).
        config: What the model was trained for.

    Returns:
        Files by the name of their case; nothing is read but their digests.
    """
    cases = list_cases(folder, "scans", SCAN_ENDINGS, channels=len(config.channel_names))
    return {case: tuple(_source_file(path) for path in paths) for case, paths in cases.items()}


def find_maps(folder: Path) -> dict[str, SourceFile]:
    """List the regions or label maps of a folder.

    Args:
        folder: Folder of maps of whole numbers.

    Returns:
        Files by the name of their case; nothing is read but their digests.
    """
    return {case: _source_file(path) for case, path in read_labels(folder)}


def resolve_strength(strength: float | None, *, local: bool) -> float:
    """Share of the noise process, where it need not be given.

    Args:
        strength: As given.
        local: Whether a region, or labels that differ, say what of a scan may change.

    Returns:
        The share; 1 where the change is local and none is given.

    Raises:
        BadInputError: If it is out of range, or missing for a whole scan.
    """
    if strength is None and not local:
        raise BadInputError(
            "strength: expected a share in (0, 1] for source scans that are made anew as a whole, got none. Give "
            "--strength 0.5, for example (little keeps the scan, 1 makes it from noise), or say what may change: by "
            "--regions, or by --source_labels beside --labels."
        )
    strength = 1.0 if strength is None else float(strength)
    check_strength(strength)
    return strength


def pair_inputs(
    inputs: Inputs, config: GeneratorConfig, *, skip_bad: bool = False
) -> tuple[list[dict[str, Any]], list[Rejection]]:
    """Find what belongs together by the name of its file: for each label map and scan, or else source of edges.

    Args:
        inputs: What there is.
        config: What the model was trained for.
        skip_bad: Leave out cases that miss a file or whose files do not fit, instead of stopping at the first.

    Returns:
        Fields ``file``, ``edge`` and ``scan`` of :class:`medgen.synthesis.SampleSpec` for each case, and what was left
        out with the reason.

    Raises:
        BadInputError: If a case misses a file, or its files do not fit (with ``skip_bad``, if all are so).
    """
    rows: list[dict[str, Any]] = []
    rejected: list[Rejection] = []
    for case in dict.fromkeys([*inputs.labels, *inputs.scans]) or inputs.edges:
        file = inputs.labels.get(case)
        leading = (file or (inputs.scans.get(case) or inputs.edges[case].files)[0]).path
        scan = edge = None
        try:
            if inputs.labels:
                file = _partner(inputs, case, "labels", leading)
            if inputs.scans:
                maps = {
                    "region": _partner(inputs, case, "regions", leading) if inputs.regions else None,
                    "label": _partner(inputs, case, "source_labels", leading) if inputs.source_labels else None,
                }
                scan = ScanSource(_partner(inputs, case, "scans", leading), inputs.strength, **maps)
                read_source(scan, file, config)
            if inputs.edges:
                edge = _partner(inputs, case, "edges", leading)
                require_same_grid(edge.files[0].path, leading)
        except BadInputError as error:
            if not skip_bad:
                raise
            rejected.append(Rejection(case, _hide_folders(str(error), inputs)))
            continue
        rows.append({"file": file, "edge": edge, "scan": scan})
    if rejected and not rows:
        raise BadInputError(f"expected cases whose files belong together, got none. First: {rejected[0].reason}")
    return rows, rejected


def read_source(source: ScanSource, label: SourceFile | None, config: GeneratorConfig) -> Inpainting:
    """Read a scan that a sample is made from, and where it may change.

    Args:
        source: The scan.
        label: Label map that the sample is to have.
        config: What the model was trained for.

    Returns:
        The scan, its region and its normalization. A gray picture has three equal channels for a model in color.

    Raises:
        BadInputError: If a file cannot be read, does not fit the model or does not lie on the grid of the scan, nothing
            may change, labels differ where the scan stays, or one beside a region is not known to be the same there.
    """
    paths = [file.path for file in source.files]
    image, grid = read_scan(paths)
    check_grid(paths[0], grid, config, kind="scan")
    if config.channel_names == RGB and image.shape[0] == 1 and not grid.known:
        image = image.expand(3, *grid.shape).clone()
    types = {stored_dtype(path) for path in paths}
    dtype: torch.dtype = getattr(torch, types.pop() if len(types) == 1 else "float32")
    after = None if label is None else _label_on(label.path, config, paths[0], grid)
    region = _region(source, label, after, config, grid)
    return Inpainting.fit(image.to(dtype), region, config, strength=source.strength, name=str(paths[0]))


def _source_file(path: Path) -> SourceFile:
    return SourceFile(path, sha256_file(path))


def _region(
    source: ScanSource, label: SourceFile | None, after: torch.Tensor | None, config: GeneratorConfig, grid: Grid
) -> torch.Tensor:
    """Where a scan may change."""
    scan = source.files[0].path
    region = None if source.region is None else _region_on(source.region.path, scan, grid)
    if source.label is None:
        if label is not None and source.region is not None:
            raise BadInputError(
                f"{label.path}: expected the label map of the source scan beside, because outside of the region the "
                "scan stays and the labels have to be equal, got none. Give it with --source_labels, or in the column "
                "source_label of the table; where nothing of it changes, the same folder or file for both."
            )
        return torch.ones(grid.shape, dtype=torch.bool) if region is None else region
    if label is None or after is None:
        raise BadInputError(
            f"{source.label.path}: expected the label map that the result is to have beside that of the source scan, "
            "got none. Give it with --labels, or in the column label of the table."
        )
    before = _label_on(source.label.path, config, scan, grid, allow_empty=True)
    if region is None:
        return changed_region(before, after, before_name=str(source.label.path), after_name=str(label.path))
    check_labels(before, after, region, name=str(label.path))
    return region


def _label_on(
    path: Path, config: GeneratorConfig, scan: Path, grid: Grid, *, allow_empty: bool = False
) -> torch.Tensor:
    sample = load_label(path, config.class_names, allow_empty=allow_empty)
    check_same_grid(path, sample.grid, scan, grid)
    if sample.label is None:
        raise BadInputError(f"{path}: expected a label map, got none. Check the file.")
    return sample.label


def _region_on(path: Path, scan: Path, grid: Grid) -> torch.Tensor:
    values, own = read_label(path)
    check_same_grid(path, own, scan, grid)
    if not values.any():
        raise BadInputError(f"{path}: expected a region, which is not 0 somewhere, got none. Mark what may change.")
    return values != 0


_KINDS = {
    "labels": "a label map",
    "scans": "a source scan",
    "regions": "a region",
    "source_labels": "a source label map",
    "edges": "edges",
}


def _partner(inputs: Inputs, case: str, name: str, leading: Path) -> Any:
    """What one of the folders has for a case."""
    found = getattr(inputs, name)
    if case not in found:
        raise BadInputError(
            f"{leading}: expected {_KINDS[name]} of the same name ({_folder(found) / case}.*), got none. Add the file, "
            "or take this one away."
        )
    return found[case]


def _folder(found: Mapping[str, Any]) -> Path:
    first = next(iter(found.values()))
    files = first.files if isinstance(first, EdgeSource) else first if isinstance(first, tuple) else (first,)
    return Path(files[0].path).parent


def _hide_folders(reason: str, inputs: Inputs) -> str:
    for name in _KINDS:
        if found := getattr(inputs, name):
            reason = hide_folder(reason, _folder(found))
    return reason
