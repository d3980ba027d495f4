"""Label maps, scans and edge maps of the user's: each is read and held to the model before sampling begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from medgen.conditions.edge import check_edges, check_outlines, extract_edges, from_whole_numbers
from medgen.data.dataset import (
    Rejection,
    check_same_grid,
    load_label,
    require_orientation,
    stem,
)
from medgen.data.geometry import Placement, place, to_model, valid_mask
from medgen.data.io import read_grid, read_image
from medgen.generator import GeneratorConfig
from medgen.provenance import hide_folder, sha256_file
from medgen.synthesis.plan import EdgeSource, SourceFile
from medgen.types import BadInputError, Grid

# Between these factors labels are resampled to the model's voxel size; beyond them the structures that the model
# learned to draw would be lost or invented.
_SPACING_FACTOR = 2.0
SCAN_ENDINGS = (".nii.gz", ".nii", ".png", ".tif", ".tiff")
_MAP_ENDINGS = (".nii.gz", ".nii", ".png")
_CHANNEL = re.compile(r"_\d{4}$")
_PNG_DEPTH = 24  # byte of the IHDR chunk


def check_label(path: Path, config: GeneratorConfig, *, name: str = "") -> SourceFile:
    """Read a label map and hold it to the model.

    Args:
        path: The file.
        config: What the model was trained for.
        name: How a manifest calls it, as in :class:`SourceFile`.

    Returns:
        The file with its digest.
    """
    check_grid(path, load_label(path, config.class_names).grid, config)
    return SourceFile(path, sha256_file(path), name)


def find_edges(
    folder: Path, config: GeneratorConfig, *, ready: bool, skip_bad: bool = False
) -> tuple[dict[str, EdgeSource], list[Rejection]]:
    """List the sources of edges of a folder.

    Args:
        folder: Folder of scans, one file each or one per channel (``CASE_0000``), or of edge maps.
        config: What the model was trained for.
        ready: Whether they are edge maps.
        skip_bad: Leave out those that do not fit instead of stopping at the first.

    Returns:
        Those that fit, by the name of their case, and those left out with the reason.

    Raises:
        BadInputError: If the folder holds none, or one does not fit the model (or none does).
    """
    kind, endings = ("edge maps", _MAP_ENDINGS) if ready else ("scans", SCAN_ENDINGS)
    cases = list_cases(folder, kind, endings, channels=0 if ready else len(config.channel_names))
    accepted: dict[str, EdgeSource] = {}
    rejected: list[Rejection] = []
    for case, files in cases.items():
        try:
            accepted[case] = check_edge(files, config, ready=ready)
        except BadInputError as error:
            if not skip_bad:
                raise
            rejected.append(Rejection(case, hide_folder(str(error), folder)))
    if not accepted:
        raise BadInputError(f"{folder}: expected {kind} that fit the model, got none. First: {rejected[0].reason}")
    return accepted, rejected


def list_cases(folder: Path, kind: str, endings: tuple[str, ...], *, channels: int) -> dict[str, list[Path]]:
    """List the files of a folder by case.

    Args:
        folder: The folder.
        kind: What it holds, for the message.
        endings: Of the files that count.
        channels: Of the model; 0 where a case is one file.

    Returns:
        Files by case; ``CASE_0000`` is a channel where each case has the first one, or as many as the model has.

    Raises:
        BadInputError: If the folder holds none, or two for one case.
    """
    if not folder.is_dir():
        raise BadInputError(f"{folder}: expected a folder of {kind}, got none. Check the path.")
    listed = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    paths = [path for path in listed if path.name.lower().endswith(endings)]
    if not paths:
        raise BadInputError(
            f"{folder}: expected {kind} ({', '.join(endings)}), got none. Point at the folder that holds them."
        )
    return _by_case(paths, channels)


def check_edge(paths: Sequence[Path], config: GeneratorConfig, *, ready: bool, names: Sequence[str] = ()) -> EdgeSource:
    """Read a source of edges and hold it to the model.

    Args:
        paths: Files of a scan, or one edge map.
        config: What the model was trained for.
        ready: Whether it is an edge map.
        names: How a manifest calls the files.

    Returns:
        The files with their digests.

    Raises:
        BadInputError: If a file cannot be read, has no contrast or is no edge map, or no outlines where those of the
            model are, or its grid does not fit the model.
    """
    if ready and (len(paths) != 1 or not paths[0].name.lower().endswith(_MAP_ENDINGS)):
        raise BadInputError(
            f"{paths[0]}: expected one edge map as {', '.join(_MAP_ENDINGS)}, got {len(paths)} file(s). Convert it."
        )
    image, grid = _read(paths, ready=ready, outlines=config.edges_are_outlines)
    check_grid(paths[0], grid, config, kind="edge map" if ready else "scan")
    if not ready:
        config.normalization.fit(image, source=paths[0])
    shown = names or ("",) * len(paths)
    files = tuple(SourceFile(path, sha256_file(path), name) for path, name in zip(paths, shown, strict=True))
    return EdgeSource(files, ready)


def place_edges(source: EdgeSource, placement: Placement, config: GeneratorConfig) -> torch.Tensor:
    """Edges of a sample on the model's grid.

    Edges of a scan are extracted there, from normalized intensities, as those of the training scans were.

    Args:
        source: Files that :func:`check_edge` has passed.
        placement: How their grid lies on the model's.
        config: Of the model; its settings say how edges are extracted.

    Returns:
        ``(1, *placement.shape)`` float32 in [0, 1].

    Raises:
        BadInputError: If the model does not say how edges are extracted.
    """
    image, grid = _read([file.path for file in source.files], ready=source.ready)
    if source.ready:
        return to_model(image, placement, mode="linear", padding="constant").clamp_(0, 1)
    if config.edge is None:
        raise BadInputError(
            f"model '{config.name}': expected one that says how its edges are extracted, got one that does not. Give "
            "edge maps with --edge_maps FOLDER."
        )
    intensity = config.normalization.fit(image, source=source.files[0].path)
    scan = to_model(intensity.forward(image), placement, mode="linear", padding="reflect")
    spacing = placement.grid.spacing if grid.known else None
    return extract_edges(scan, config.edge, valid=valid_mask(placement), spacing=spacing)


def outline_classes(index: torch.Tensor, valid: torch.Tensor, config: GeneratorConfig) -> torch.Tensor:
    """Outlines of the classes of a label map, one voxel thick, as Canny's edges of the training scans are.

    They are drawn, not extracted: a smoothing that leaves out the texture of scans would leave out small lesions too.

    Args:
        index: ``(H, W[, D])`` class indices on the model's grid.
        valid: ``(H, W[, D])`` bool, True inside the field of view, whose rim is no outline.
        config: Of the model.

    Returns:
        ``(1, H, W[, D])`` float32: 1 where a neighbor along an axis is of a lower class, else 0.

    Raises:
        BadInputError: If the model does not take outlines.
    """
    if config.edge is None or config.edge.method != "canny":
        got = "nothing about its edges" if config.edge is None else config.edge.method
        raise BadInputError(
            f"label_outlines: expected a model of Canny's edges, got {got}. Give pictures of the label maps with "
            "--edges FOLDER, or edge maps with --edge_maps FOLDER."
        )
    outlines = torch.zeros(index.shape, dtype=torch.bool)
    for axis, length in enumerate(index.shape):
        before, after = (slice(None),) * axis + (slice(length - 1),), (slice(None),) * axis + (slice(1, None),)
        both = valid[before] & valid[after]
        outlines[before] |= both & (index[before] > index[after])
        outlines[after] |= both & (index[after] > index[before])
    return outlines[None].float()


def require_same_grid(path: Path, other: Path) -> None:
    """Refuse a file whose voxels do not lie where those of another do.

    Args:
        path: The file.
        other: The file that it belongs to.

    Raises:
        BadInputError: If shape or affine differ.
    """
    check_same_grid(path, read_grid(path), other, read_grid(other))


def check_grid(path: Path, grid: Grid, config: GeneratorConfig, *, kind: str = "label map") -> None:
    """Refuse a file whose voxels are not those that the model works on.

    Args:
        path: Its file, for the message.
        grid: Its voxel grid.
        config: What the model was trained for.
        kind: What it is, for the message.

    Raises:
        BadInputError: If dimension, orientation or spacing do not fit.
    """
    if grid.spatial_dims != config.spatial_dims:
        raise BadInputError(
            f"{path}: expected a {config.spatial_dims}D {kind} for the model '{config.name}', got "
            f"{grid.spatial_dims}D of shape {grid.shape}. Choose another model or other files."
        )
    require_orientation(path, grid, config.orientation)
    if config.spacing is None:
        return
    model = " x ".join(f"{value:.3g}" for value in config.spacing)
    if not grid.known:
        raise BadInputError(
            f"{path}: expected a {kind} that states its voxel size (the model works at {model} mm), got a format "
            "without one. Give it as NIfTI."
        )
    axes = place(grid, orientation=config.orientation).axes[0]
    own = [grid.spacing[axis] for axis in axes]
    factors = [mine / wanted for mine, wanted in zip(own, config.spacing, strict=True)]
    if max(factors) > _SPACING_FACTOR or min(factors) < 1 / _SPACING_FACTOR:
        got = " x ".join(f"{value:.3g}" for value in own)
        raise BadInputError(
            f"{path}: expected voxels within a factor {_SPACING_FACTOR:g} of the model's {model} mm, got {got} mm. "
            f"Resample the {kind}, or train a model on scans of this spacing."
        )


def _by_case(paths: Sequence[Path], channels: int) -> dict[str, list[Path]]:
    cases: dict[str, list[Path]] = {}
    for path in paths:
        cases.setdefault(_CHANNEL.sub("", stem(path.name)), []).append(path)
    wholes = [[f"_{index:04d}" for index in range(count)] for count in (1, channels)]
    if channels and all(
        [stem(path.name).removeprefix(case) for path in files] in wholes for case, files in cases.items()
    ):
        return cases
    cases = {}
    for path in paths:
        case = stem(path.name)
        if case in cases:
            raise BadInputError(f"{path}: expected one file per case, got {cases[case][0].name} too. Remove one.")
        cases[case] = [path]
    return cases


def read_scan(paths: Sequence[Path]) -> tuple[torch.Tensor, Grid]:
    """Read a scan of one file or several.

    Args:
        paths: One file for all channels, or one per channel.

    Returns:
        ``(C, H, W[, D])`` float32 in source units, and its grid.
    """
    parts = [read_image(path) for path in paths]
    grid = parts[0][1]
    for path, (_, other) in zip(paths[1:], parts[1:], strict=True):
        check_same_grid(path, other, paths[0], grid)
    return torch.cat([part for part, _ in parts]), grid


def _read(paths: Sequence[Path], *, ready: bool, outlines: bool = False) -> tuple[torch.Tensor, Grid]:
    """A scan ``(C, *shape)`` in source units, or edge strength ``(1, *shape)`` in [0, 1]; and the grid."""
    if not ready:
        return read_scan(paths)
    image, grid = read_image(paths[0])
    try:
        if paths[0].name.lower().endswith(".png"):
            image = from_whole_numbers(image, paths[0].read_bytes()[_PNG_DEPTH])
        check_edges(image, grid.shape)
        if outlines:
            check_outlines(image)
    except BadInputError as error:
        raise BadInputError(f"{paths[0]}: {error}") from error
    return image, grid
