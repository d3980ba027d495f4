"""From the arguments of a run to its plan: files are found, matched and checked against the model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medgen.conditions.text import read_prompts
from medgen.data.case import TRAIN_SPLITS
from medgen.data.dataset import Rejection, image_splits, label_splits
from medgen.generator import Generator, GeneratorConfig
from medgen.synthesis.inputs import find_edges
from medgen.synthesis.label_files import find_label_maps
from medgen.synthesis.plan import (
    LabelSampling,
    LabelSource,
    SampleSpec,
    SourceFile,
    check_label_source,
    plan_rows,
    plan_samples,
)
from medgen.synthesis.rare import draw_by_weight, rare_weights
from medgen.synthesis.sources import Inputs, find_maps, find_scans, pair_inputs, resolve_strength
from medgen.synthesis.steering import check_steering, require_conditions
from medgen.synthesis.table import read_conditions
from medgen.types import BadInputError

AttributeValue = str | bool | int | float | list[float]
_DEFAULT_COUNT = 8
_IN_TABLE = ("labels", "prompts", "edges", "edge_maps", "sources", "source_labels", "regions")


@dataclass(frozen=True)
class Request:
    """Arguments of :func:`medgen.synthesis.synthesize` that say what the samples are to be.

    Attributes:
        labels: As there.
        label_source: As there.
        label_sampling: As there.
        label_outlines: As there.
        prompts: As there.
        edges: As there.
        edge_maps: As there.
        sources: As there.
        source_labels: As there.
        regions: As there.
        strength: As there.
        attributes: As there.
        conditions: As there.
        num_samples: As there.
        seed: As there.
        truncate_prompts: As there.
        skip_bad: As there.
    """

    labels: Path | None
    label_source: LabelSource | None
    label_sampling: LabelSampling
    label_outlines: bool
    prompts: str | None
    edges: Path | None
    edge_maps: Path | None
    sources: Path | None
    source_labels: Path | None
    regions: Path | None
    strength: float | None
    attributes: Mapping[str, AttributeValue] | None
    conditions: Path | None
    num_samples: int | None
    seed: int
    truncate_prompts: bool
    skip_bad: bool

    @property
    def inputs(self) -> dict[str, Path | None]:
        """Files and folders that it names."""
        prompts = Path(self.prompts) if self.prompts and self.prompts.lower().endswith((".txt", ".csv")) else None
        return {
            "labels": self.labels,
            "edges": self.edges,
            "edge_maps": self.edge_maps,
            "sources": self.sources,
            "source_labels": self.source_labels,
            "regions": self.regions,
            "conditions": self.conditions,
            "prompts": prompts,
        }

    @property
    def arguments(self) -> dict[str, Any]:
        """What says it again; of files and folders the names."""
        names = {name: Path(path).resolve().name for name, path in self.inputs.items() if path is not None}
        given: dict[str, Any] = {"prompts": self.prompts, "strength": self.strength, **names}
        given["attributes"] = dict(self.attributes) if self.attributes else None
        keys = (*_IN_TABLE, "strength", "attributes", "conditions")
        return {
            **{key: given.get(key) for key in keys},
            "label_outlines": self.label_outlines,
            "truncate_prompts": self.truncate_prompts,
            "skip_bad": self.skip_bad,
        }


@dataclass(frozen=True)
class Planned:
    """What a request comes to.

    Attributes:
        specs: The samples.
        source: Where their labels come from, None where that differs from row to row.
        rejected: What was left out.
        splits: Of which splits label maps, source scans and scans of the edges are; empty where none are named.
        digests: What the samples are made of, to tell this run from every other.
    """

    specs: list[SampleSpec]
    source: LabelSource | None
    rejected: list[Rejection]
    splits: str
    digests: dict[str, str | None]


def plan_request(request: Request, generator: Generator) -> Planned:
    """Find and check all that a run is to be made from.

    Args:
        request: What is asked for.
        generator: The model.

    Returns:
        The plan.

    Raises:
        BadInputError: If arguments contradict each other, the model lacks a condition, or a file cannot be used.
    """
    attributes = _plain(request.attributes or {})
    require_conditions(generator, {name: f"attribute '{name}'" for name in attributes})
    source, order, told = request.label_source, [], ""
    _check_label_sampling(request)
    if request.conditions is not None:
        _refuse_beside_table(request)
        rows, rejected = read_conditions(
            Path(request.conditions),
            generator,
            source=source,
            outlines=request.label_outlines,
            strength=request.strength,
            attributes=attributes,
            skip_bad=request.skip_bad,
        )
        count = len(rows) if request.num_samples is None else request.num_samples
        specs = plan_rows(rows, count, seed=request.seed)
    else:
        rows, rejected, told = _find(request, generator)
        files, edges, scans = ([row[name] for row in rows if row[name]] for name in ("file", "edge", "scan"))
        prompts = [] if request.prompts is None else read_prompts(request.prompts)
        source = source or _default_source(rows, generator)
        largest = max(len(rows), len(prompts))
        count = (largest or _DEFAULT_COUNT) if request.num_samples is None else request.num_samples
        if request.label_sampling == "rare":
            order = draw_by_weight(rare_weights(files, generator), count, request.seed)
        specs = plan_samples(
            count,
            order=order,
            seed=request.seed,
            source=source,
            files=files,
            outlines=request.label_outlines,
            edges=edges,
            scans=scans,
            prompts=prompts,
            attributes=attributes,
        )
    check_steering(generator, specs, truncate=request.truncate_prompts)
    # Of folders all that is in them counts, also what a shorter run does not come to.
    used = rows if request.conditions is None else [vars(spec) for spec in specs]
    listed = list(dict.fromkeys(row["file"] for row in used if row["file"]))
    steered = [spec.conditions for spec in specs]
    digests = {
        "labels_sha256": _digest("".join(file.sha256 for file in listed)) if listed else None,
        "conditions_sha256": _digest(json.dumps(steered, sort_keys=True)) if any(steered) else None,
    }
    if request.conditions is not None:
        sources = [[spec.source, spec.file and spec.file.sha256] for spec in specs]
        digests["labels_sha256"] = _digest(json.dumps(sources))
    splits = [told] if told else _describe_splits("label maps", listed)
    if order:
        splits.append(f"label maps: {len(set(order))} of {len(listed)}, those of rare sizes more often")
    for name, kind in {"scan": "source scans", "edge": "edge scans"}.items():
        splits += _describe_splits(kind, dict.fromkeys(row[name].files[0] for row in used if row[name]))
    return Planned(specs, source, rejected, "\n".join(splits), digests)


def _check_label_sampling(request: Request) -> None:
    """Refuse to choose label maps where there are none to choose from."""
    if request.label_sampling == "in_turn":
        return
    if request.label_sampling != "rare":
        raise BadInputError(f"label_sampling: expected 'in_turn' or 'rare', got {request.label_sampling!r}.")
    if request.conditions is not None:
        raise BadInputError(
            "label_sampling 'rare': expected no conditions, whose rows name the label map of each sample, got some. "
            "Give the label maps with --labels FOLDER, or leave label_sampling out."
        )
    if request.labels is None or request.label_source in ("generate", "none"):
        raise BadInputError(
            "label_sampling 'rare': expected label maps to choose from, got label maps that are "
            f"{'absent' if request.label_source == 'none' else 'generated'}. Give them with --labels FOLDER, or leave "
            "label_sampling out."
        )


def _find(request: Request, generator: Generator) -> tuple[list[dict[str, Any]], list[Rejection], str]:
    """Label maps, edges and scans of the folders, matched where several are given; and what to tell of the choice."""
    if request.edges is not None and request.edge_maps is not None:
        raise BadInputError("edges: expected scans (--edges) or edge maps (--edge_maps), got both. Leave one out.")
    given = {"labels": "mask", "prompts": "text", "edges": "edge", "edge_maps": "edge"}
    if request.label_outlines:
        require_conditions(generator, {"edge": "label_outlines"})
        del given["labels"]
    require_conditions(generator, {name: key for key, name in given.items() if getattr(request, key) is not None})
    config, skip_bad = generator.config, request.skip_bad
    found: dict[str, Any] = _find_sources(request, config)
    rejected, told = [], ""
    if request.labels is not None:
        maps = find_label_maps(Path(request.labels), config, skip_bad=skip_bad)
        found["labels"], rejected, told = maps.files, maps.rejected, maps.told
        if "scans" in found and maps.left_out:
            found["scans"] = {case: files for case, files in found["scans"].items() if case not in maps.left_out}
    folder = request.edges or request.edge_maps
    if folder is not None:
        ready = request.edges is None
        found["edges"], bad = find_edges(Path(folder), config, ready=ready, skip_bad=skip_bad)
        rejected += bad
    rows, bad = pair_inputs(Inputs(**found), config, skip_bad=skip_bad)
    known = {rejection.case for rejection in rejected}
    return rows, rejected + [rejection for rejection in bad if rejection.case not in known], told


def _find_sources(request: Request, config: GeneratorConfig) -> dict[str, Any]:
    """Scans that the samples are made from, with their regions and labels."""
    beside = [name for name in ("source_labels", "regions", "strength") if getattr(request, name) is not None]
    if request.sources is None:
        if beside:
            raise BadInputError(
                f"{', '.join(beside)}: expected source scans beside, got none. Give them with --sources FOLDER."
            )
        return {}
    check_label_source(request.label_source)
    if request.source_labels is not None and request.labels is None:
        raise BadInputError(
            "source_labels: expected the label maps that the results are to have beside them, got none. Give them with "
            "--labels FOLDER."
        )
    local = request.regions is not None or request.source_labels is not None
    maps = {"regions": request.regions, "source_labels": request.source_labels}
    return {
        "strength": resolve_strength(request.strength, local=local),
        "scans": find_scans(Path(request.sources), config),
        **{name: find_maps(Path(folder)) for name, folder in maps.items() if folder is not None},
    }


def _default_source(rows: Sequence[Mapping[str, Any]], generator: Generator) -> LabelSource:
    if any(row["file"] for row in rows):
        return "files"
    # A label map that is drawn anew would contradict edges and scans that are given.
    return "none" if rows or "mask" not in generator.conditions else "generate"


def _refuse_beside_table(request: Request) -> None:
    both = [name for name in _IN_TABLE if getattr(request, name) is not None]
    if both:
        raise BadInputError(
            f"{', '.join(both)}: expected none beside conditions, whose rows name what each sample has. Leave "
            f"{'it' if len(both) == 1 else 'them'} out, or put {'it' if len(both) == 1 else 'them'} into the table."
        )


def _plain(attributes: Mapping[str, AttributeValue]) -> dict[str, str]:
    """Values as the columns of a table hold them."""
    plain = {}
    for name, value in attributes.items():
        if isinstance(value, bool):
            raise BadInputError(
                f"attribute '{name}': expected a word or a number, got {value}, which YAML makes of yes, no, true and "
                "false. Put the value in quotes."
            )
        plain[name] = value if isinstance(value, str) else json.dumps(value)
    return plain


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _describe_splits(kind: str, files: Iterable[SourceFile]) -> list[str]:
    """Which splits files of one kind are of, a line for each of their folders; nothing where none are named."""
    paths = [file.path for file in files]
    lines = []
    for folder in dict.fromkeys(path.parent for path in paths):
        splits = label_splits(folder) if kind == "label maps" else image_splits(folder)
        counts = Counter(splits[path.resolve()] for path in paths if path.parent == folder and path.resolve() in splits)
        held_out = [split for split in counts if split not in TRAIN_SPLITS]
        warning = (
            f". A network that trains on these scans cannot be tested on {' or '.join(held_out)}: for that, leave out "
            f"the {kind} of {' and '.join(held_out)}"
        )
        listing = ", ".join(f"{count} of {split}" for split, count in counts.items())
        lines += [f"{kind}: {listing}{warning if held_out else ''}"] if counts else []
    return lines
