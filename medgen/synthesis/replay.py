"""Making an earlier run again from its manifest, voxel for voxel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from medgen.generator import Generator
from medgen.provenance import SampleRecord, read_manifest, sha256_file
from medgen.synthesis.plan import EdgeSource, SampleSpec, SamplingSettings, ScanSource, SourceFile
from medgen.types import BadInputError

# Folders that a run reads from, by argument, and what lies in them.
_KINDS = {
    "labels": "label map",
    "edges": "scan",
    "edge_maps": "edge map",
    "sources": "source scan",
    "source_labels": "label map",
    "regions": "region",
}
# What a replay may be told besides the manifest; all else is fixed by it.
_FREE = {*_KINDS, "output", "model", "edge_control", "device", "skip_bad", "overwrite", "replay"}


@dataclass(frozen=True)
class Batch:
    """Samples that go through the networks together.

    Attributes:
        specs: The samples.
        settings: How they are sampled.
        threads: Threads of the CPU kernels: their number decides how sums are split, and so their rounding. None takes
            those that the run began with.
        only: Cases to keep; None keeps all. The others run along because a batch decides the rounding.
    """

    specs: tuple[SampleSpec, ...]
    settings: SamplingSettings
    threads: int | None = None
    only: frozenset[str] | None = None

    @property
    def wanted(self) -> frozenset[str]:
        """Cases to keep."""
        return frozenset(spec.case for spec in self.specs) if self.only is None else self.only


def refuse_other_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Stop where an argument contradicts the manifest that is to be replayed.

    Args:
        function: The public function.
        values: Its arguments.

    Raises:
        BadInputError: If an argument that the manifest fixes is not at its default.
    """
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in _FREE and values[name] != parameter.default:
            raise BadInputError(
                f"{name}: expected none beside replay, which takes it from the manifest, got {values[name]!r}. "
                "Leave it out."
            )


@dataclass(frozen=True)
class Replay:
    """An earlier run, ready to be made again.

    Attributes:
        manifest: Where it is described.
        records: Its samples.
        batches: The same, as they went through the networks.
    """

    manifest: Path
    records: list[SampleRecord]
    batches: list[Batch]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.records[0].model

    @property
    def runtime(self) -> dict[str, Any]:
        """Device, threads and versions of the earlier run."""
        return self.records[0].runtime

    @property
    def device(self) -> str:
        """Kind of device that it ran on."""
        return "cpu" if self.runtime["device"] == "cpu" else "cuda"

    def load_model(self, name: str | None, device: torch.device, *, edge_control: str | None = None) -> Generator:
        """Load the model of the earlier run.

        Args:
            name: Its folder or name; None takes the name in the manifest.
            device: Where it goes.
            edge_control: ControlNet that steered it by edges, if one did.

        Returns:
            The model.

        Raises:
            BadInputError: If it is not found, is another one, or would be downloaded without anybody naming it.
        """
        if name is None and "/" in self.model:
            raise BadInputError(
                f"{self.manifest}: expected its model '{self.model}' to be named, because a Hub id may be downloaded, "
                f"got none. Give --model {self.model}, or the folder of the model with --model."
            )
        try:
            generator = Generator.from_pretrained(
                self.model if name is None else name, device=device, edge_control=edge_control
            )
        except BadInputError as error:
            if name is not None:
                raise
            raise BadInputError(
                f"{self.manifest}: expected its model '{self.model}' by that name, got none ({error}) Give the folder "
                "of the model with --model."
            ) from error
        expected = self.records[0].model_hash
        if generator.weights_hash != expected:
            raise BadInputError(
                f"{self.manifest}: expected the model with SHA-256 {expected[:12]}…, got '{generator.config.name}' "
                f"with {generator.weights_hash[:12]}…. Name the model that made the manifest with --model, and its "
                "ControlNet, if it had one, with --edge_control."
            )
        return generator

    def compare(self, again: Sequence[SampleRecord]) -> str:
        """Say whether the replay gave the same voxels, and if not what else was different.

        Args:
            again: Records of the replay.

        Returns:
            One sentence.
        """
        made = {record.case: (record.image_sha256, record.label_sha256) for record in again}
        differing = [
            record.case
            for record in self.records
            if made.get(record.case) != (record.image_sha256, record.label_sha256)
        ]
        total = len(self.records)
        sentence = f"{total - len(differing)} of {total} equal the replayed manifest voxel for voxel"
        if not differing:
            return sentence
        before, now = self.runtime, again[0].runtime
        changes = [f"{key} {before[key]} then, {now.get(key)} now" for key in before if before[key] != now.get(key)]
        return (
            f"WARNING: only {sentence}; different: {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''} "
            f"({'; '.join(changes) or 'same device, threads and versions'})"
        )


def read_replay(manifest: Path, folders: Mapping[str, Path | None]) -> Replay:
    """Rebuild the batches of a run from its manifest, or from any part of it.

    Args:
        manifest: The manifest.
        folders: Folders that the run read from, by the argument of :func:`medgen.synthesis.synthesize`; those that it
            did not use may be missing.

    Returns:
        The run.

    Raises:
        BadInputError: If the manifest is empty or mixed, or a file is missing or not the same any more.
    """
    records = read_manifest(manifest)
    if not records:
        raise BadInputError(f"{manifest}: expected at least one sample, got none. Name the manifest of a finished run.")
    models = {record.model_hash for record in records}
    if len(models) > 1:
        raise BadInputError(
            f"{manifest}: expected samples of one model, got {len(models)} different values of model_hash. Replay the "
            "parts one by one."
        )
    find = cache(partial(_find_file, manifest, folders))
    batches: dict[tuple[tuple[SampleSpec, ...], SamplingSettings, int], set[str]] = {}
    for record in records:
        values = {item.name: getattr(record, item.name) for item in fields(SamplingSettings)}
        settings = SamplingSettings(**{**values, "guidance_interval": tuple(record.guidance_interval)})
        try:
            specs = tuple(_read_spec(record, member, find) for member in record.batch)
        except KeyError as error:
            raise BadInputError(
                f"{manifest}: expected {error} in the record of {record.case}, got none. Replay it with the version of "
                f"medgen that made it ({record.runtime.get('versions', {}).get('medgen', 'unknown')})."
            ) from error
        batches.setdefault((specs, settings, record.runtime["threads"]), set()).add(record.case)
    rebuilt = [Batch(*key, only=frozenset(wanted)) for key, wanted in batches.items()]
    return Replay(manifest, records, rebuilt)


def _read_spec(
    record: SampleRecord, member: Mapping[str, Any], find: Callable[[str, str, str], SourceFile]
) -> SampleSpec:
    steered = member.get("conditions", {})  # records from before there were any have none
    edge = None
    for key, argument in (("edge", "edges"), ("edge_map", "edge_maps")):
        if key in steered:
            files = tuple(find(argument, file["file"], file["sha256"]) for file in steered[key])
            edge = EdgeSource(files, ready=key == "edge_map")
    scan = None
    if (made_from := steered.get("source")) is not None:
        maps = {
            name: find(argument, made_from[name]["file"], made_from[name]["sha256"])
            for name, argument in (("region", "regions"), ("label", "source_labels"))
            if name in made_from
        }
        files = tuple(find("sources", file["file"], file["sha256"]) for file in made_from["files"])
        scan = ScanSource(files, made_from["strength"], **maps)
    return SampleSpec(
        case=member["case"],
        index=member["index"],
        seed=member["seed"],
        source=record.label["source"],
        file=find("labels", member["file"], member["sha256"]) if member["file"] else None,
        outlines=steered.get("label_outlines", False),
        edge=edge,
        scan=scan,
        text=steered.get("text"),
        attributes=steered.get("attributes", {}),
    )


def _find_file(manifest: Path, folders: Mapping[str, Path | None], argument: str, name: str, sha256: str) -> SourceFile:
    """A file that a manifest names, by its place in the folder that is given or by its name alone."""
    folder, kind = folders.get(argument), _KINDS[argument]
    if folder is None:
        raise BadInputError(
            f"{manifest}: expected the folder of its {kind}s ({name}, ...), got none. Give it with --{argument} FOLDER."
        )
    place = PurePosixPath(name)
    inside = not place.is_absolute() and ".." not in place.parts
    path = Path(folder) / place if inside and (Path(folder) / place).is_file() else Path(folder) / place.name
    if not path.is_file():
        raise BadInputError(
            f"{path}: expected the {kind} that {manifest} names, got no such file. Give its folder with --{argument}."
        )
    if sha256_file(path) != sha256:
        raise BadInputError(
            f"{path}: expected the {kind} that {manifest} names (SHA-256 {sha256[:12]}…), got another. Restore the "
            f"file, or give the folder that holds it with --{argument}."
        )
    return SourceFile(path, sha256, name)
