"""What a run will make: a fixed list of samples, known before the first one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from medgen.seeding import derive_seed
from medgen.types import BadInputError

LabelSource = Literal["files", "deform", "generate", "none"]
LabelSampling = Literal["in_turn", "rare"]


@dataclass(frozen=True)
class SourceFile:
    """A file of the user's that a sample is made from.

    Attributes:
        path: The file.
        sha256: Digest of its bytes.
        name: How a manifest calls it, within the folder that was given; empty takes the name of the file.
    """

    path: Path
    sha256: str
    name: str = ""

    @property
    def shown(self) -> str:
        """How a manifest calls it."""
        return self.name or self.path.name

    @property
    def named(self) -> dict[str, str]:
        """The same with its digest, as JSON values."""
        return {"file": self.shown, "sha256": self.sha256}


LabelFile = SourceFile


@dataclass(frozen=True)
class EdgeSource:
    """What the edges of a sample are taken from.

    Attributes:
        files: A scan, one file per channel or one for all, or an edge map.
        ready: Whether it is an edge map, so that nothing has to be extracted.
    """

    files: tuple[SourceFile, ...]
    ready: bool = False


@dataclass(frozen=True)
class ScanSource:
    """A scan that a sample is made from.

    Where no region is given, it is where the label map before differs from that of the sample, or else the whole scan.

    Attributes:
        files: The scan, one file per channel or one for all.
        strength: Share in (0, 1] of the noise process that is run.
        region: Map that is not 0 where the scan may change.
        label: Label map of the scan as it is.
    """

    files: tuple[SourceFile, ...]
    strength: float
    region: SourceFile | None = None
    label: SourceFile | None = None


@dataclass(frozen=True)
class SampleSpec:
    """One sample to make, complete: it does not depend on the rest of the run.

    Attributes:
        case: Identifier.
        index: Position in the plan.
        seed: Seed of all its draws.
        source: Where its label comes from; ``none`` makes a scan without a label map.
        file: Label map that is taken or deformed; None for ``generate`` and ``none``.
        outlines: Whether its label map steers by the outlines of its classes, as edges, and not by itself.
        edge: What its edges are taken from; None where no others steer it.
        scan: What it is made from; None makes it from noise.
        text: What it should show, in words; None where no text steers it.
        attributes: Facts that it should have, by name. A voxel size that is not among them is that of its grid.
    """

    case: str
    index: int
    seed: int
    source: LabelSource
    file: SourceFile | None = None
    outlines: bool = False
    edge: EdgeSource | None = None
    scan: ScanSource | None = None
    text: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.outlines and (self.file is None or self.edge is not None):
            got = "none" if self.file is None else "other edges too"
            raise BadInputError(
                f"label_outlines: expected label maps from files, and no edges but theirs, got {got}. Give --labels "
                "FOLDER, and leave --edges and --edge_maps out."
            )

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files that it is made from."""
        files = [self.file, *(() if self.edge is None else self.edge.files)]
        if self.scan is not None:
            files += [*self.scan.files, self.scan.region, self.scan.label]
        return tuple(file.path for file in files if file is not None)

    @property
    def conditions(self) -> dict[str, Any]:
        """What steers it besides its label map, and what it is made from, as JSON values without what is absent."""
        found: dict[str, Any] = {} if self.text is None else {"text": self.text}
        if self.outlines:
            found["label_outlines"] = True
        if self.edge is not None:
            found["edge_map" if self.edge.ready else "edge"] = [file.named for file in self.edge.files]
        if self.scan is not None:
            maps = {"region": self.scan.region, "label": self.scan.label}
            found["source"] = {
                "files": [file.named for file in self.scan.files],
                "strength": self.scan.strength,
                **{name: file.named for name, file in maps.items() if file is not None},
            }
        return found | ({"attributes": dict(self.attributes)} if self.attributes else {})


@dataclass(frozen=True)
class SamplingSettings:
    """What decides the voxels besides the plan.

    Attributes:
        sampler: Name of the sampler.
        sampler_spacing: Name of its timestep spacing.
        num_inference_steps: Network steps.
        guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond), for all conditions or by name; None,
            and a name that is missing, is the model's own, and so is one that the model has a scale of its own for
            where a single number is given.
        guidance_interval: Shares of the noise process between which guidance acts; 0 is the image, 1 pure noise.
        guidance_rescale: Share by which guidance gives back the standard deviation that it adds.
        temperature: Factor on the noise that an image starts from; None is the model's own.
        precision: ``"fp32"`` or ``"bf16"``.
        max_memory_gb: Bound for decoding; None decodes in one piece.
        controls: How control branches act, by condition: fields of :class:`medgen.generator.ControlUse`.
        minority_scale: w of the guidance towards rare samples (:class:`medgen.diffusion.minority.MinorityGuidance`);
            0 is off.
    """

    sampler: str = "dpm++2m"
    sampler_spacing: str = "default"
    num_inference_steps: int = 20
    guidance_scale: float | Mapping[str, float] | None = field(default=None, hash=False)
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    temperature: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    max_memory_gb: float | None = None
    controls: Mapping[str, Mapping[str, float]] = field(default_factory=dict, hash=False)
    minority_scale: float = 0.0


def plan_samples(
    num_samples: int,
    *,
    seed: int = 0,
    source: LabelSource = "generate",
    files: Sequence[SourceFile] = (),
    outlines: bool = False,
    edges: Sequence[EdgeSource] = (),
    scans: Sequence[ScanSource] = (),
    prompts: Sequence[str] = (),
    attributes: Mapping[str, str] | None = None,
    order: Sequence[int] = (),
) -> list[SampleSpec]:
    """List the samples of a run; what they are made from and steered by is taken in turn, each time with a new seed.

    Args:
        num_samples: How many.
        seed: Root seed; a sample's own seed depends on this and on its position only.
        source: Where the labels come from.
        files: Label maps for ``files`` and ``deform``.
        outlines: Whether these steer by their outlines.
        edges: Sources of edges; beside label maps one for each of them.
        scans: Scans that the samples are made from; beside label maps or edges one for each of them.
        prompts: Texts.
        attributes: Facts of every sample, by name.
        order: Which of the label maps, with its edges and scan, each sample takes; empty takes them in turn.

    Returns:
        The plan. A longer one begins with the same samples.

    Raises:
        BadInputError: If there is nothing to do, or source, files, edges and scans do not go together.
    """
    if (source in ("generate", "none")) == bool(files):
        needs = "no label files" if source in ("generate", "none") else "label files"
        raise BadInputError(
            f"label_source '{source}': expected {needs}, got {len(files)}. Give --labels FOLDER with 'files' or "
            "'deform', and none with 'generate' or 'none'."
        )
    if files and edges and len(files) != len(edges):
        raise BadInputError(f"edges: expected one for each of the {len(files)} label maps, got {len(edges)}.")
    if scans:
        check_label_source(source)
        if any(others and len(others) != len(scans) for others in (files, edges)):
            raise BadInputError(
                f"scans: expected one for each of the {len(files or edges)} label maps or edges, got {len(scans)}."
            )
    if source == "deform" and edges:
        raise BadInputError(
            "label_source 'deform': expected no edges, got some, which would contradict the deformed label maps. Leave "
            "the edges out, or take the label maps as they are."
        )
    return plan_rows(
        [
            {
                "source": source,
                "file": files[row % len(files)] if files else None,
                "outlines": outlines,
                "edge": edges[row % len(edges)] if edges else None,
                "scan": scans[row % len(scans)] if scans else None,
                "text": prompts[index % len(prompts)] if prompts else None,
                "attributes": dict(attributes or {}),
            }
            for index, row in enumerate(order or range(num_samples))
        ],
        num_samples,
        seed=seed,
    )


def plan_rows(rows: Sequence[Mapping[str, Any]], num_samples: int, *, seed: int = 0) -> list[SampleSpec]:
    """List the samples of a run, of which each has its own conditions.

    Args:
        rows: Fields of :class:`SampleSpec` from ``source`` on, taken in turn.
        num_samples: How many.
        seed: As for :func:`plan_samples`.

    Returns:
        The plan.

    Raises:
        BadInputError: If there is nothing to do.
    """
    if num_samples < 1:
        raise BadInputError(f"num_samples: expected at least 1, got {num_samples}.")
    return [
        SampleSpec(case=f"synthetic_{index:05d}", index=index, seed=derive_seed(seed, index), **rows[index % len(rows)])
        for index in range(num_samples)
    ]


def check_label_source(source: LabelSource | None) -> None:
    """Refuse a label map that is made up beside a scan that a sample is made from.

    Args:
        source: Where the label maps come from; None is as they are, where some are given.

    Raises:
        BadInputError: If they are deformed or generated.
    """
    if source in ("deform", "generate"):
        raise BadInputError(
            f"label_source '{source}': expected 'files' or 'none' beside source scans, which a label map made up would "
            "contradict. Give the label maps that the results are to have with --labels FOLDER, or none."
        )
