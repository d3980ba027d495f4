"""What is fixed of a sample before its image is drawn: grid, edges, facts, its label map, and what it is made from.

The label map is taken from a file, deformed from a file, drawn by the label generator, or absent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import nibabel as nib
import numpy as np
import torch

from medgen.conditions.attributes import SPACING
from medgen.conditions.deformation import deform_label
from medgen.conditions.topology import count_parts
from medgen.data.dataset import load_label
from medgen.data.geometry import Placement, from_model, place, to_model, valid_mask
from medgen.data.io import read_grid
from medgen.diffusion.objective import Objective
from medgen.diffusion.sampler import sample, sampler_names
from medgen.generator import Generator, GeneratorConfig
from medgen.seeding import derive_seed, seeded_noise, stream
from medgen.synthesis.inpainting import Inpainting
from medgen.synthesis.inputs import outline_classes, place_edges
from medgen.synthesis.plan import SampleSpec, SamplingSettings, check_label_source
from medgen.synthesis.sources import read_source
from medgen.types import BadInputError, Grid

MAX_ATTEMPTS = 20
# Organs come in fewer parts per map; beyond this parts are a crowd (cells, lesions) that touch and part by chance.
MOST_PARTS = 8


@dataclass(frozen=True, eq=False)
class LabelledGrid:
    """A sample before its image exists.

    Attributes:
        spec: What was planned.
        placement: How its grid lies on the model's.
        label: ``(H, W[, D])`` int16 values as in files, on its own grid; None until drawn, or where it has none.
        index: The same on the model's grid, as class indices; 0 in the padding.
        record: For the manifest: how the label arose.
        edge: ``(1, H, W[, D])`` strength in [0, 1] on the model's grid; None where no edges steer it.
        facts: Value of each attribute that steers it.
        scan: What it is made from; None makes it from noise.
    """

    spec: SampleSpec
    placement: Placement
    label: torch.Tensor | None
    index: torch.Tensor | None
    record: dict[str, Any]
    edge: torch.Tensor | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    scan: Inpainting | None = None

    @property
    def conditions(self) -> dict[str, Any]:
        """What steers it besides its label map, and what it is made from, as JSON values."""
        found = {**self.spec.conditions, **({"attributes": dict(self.facts)} if self.facts else {})}
        if self.scan is not None and "source" in found:
            found["source"] |= {"voxels": int(self.scan.region.sum()), "band": self.scan.band}
        return found


def prepare(spec: SampleSpec, generator: Generator) -> LabelledGrid:
    """Fix a sample's grid, its edges, what it is made from, and its label where that comes from a file.

    The grid is that of the source scan, else of the label map, else of the edges, else a field of view of the training
    set.

    A deformed label keeps the number of parts and holes of each class, unless the map or the model's training maps (95
    of 100 of them) have more than 8 parts: a crowd of cells that touch and part by chance.

    Args:
        spec: What was planned.
        generator: The model, for its grid.

    Returns:
        The sample; without label if that is to be generated.

    Raises:
        BadInputError: If the file cannot be used or no deformation keeps its topology.
    """
    config = generator.config
    if spec.scan is not None:
        check_label_source(spec.source)
    item = _label(spec, generator)
    edge = None if spec.edge is None else place_edges(spec.edge, item.placement, config)
    if spec.outlines and item.index is not None:
        edge = outline_classes(item.index, valid_mask(item.placement), config)
    scan = None if spec.scan is None else read_source(spec.scan, spec.file, config)
    return replace(item, edge=edge, facts=steering_facts(spec, item.placement, config), scan=scan)


def steering_facts(spec: SampleSpec, placement: Placement, config: GeneratorConfig) -> dict[str, str]:
    """Value of each attribute that steers a sample.

    Args:
        spec: What was planned.
        placement: How its grid lies on the model's.
        config: Of the model.

    Returns:
        The values by name; a voxel size that is not given is that of the model grid.
    """
    facts = dict(spec.attributes)
    if SPACING in config.attributes and SPACING not in facts and placement.source.known:
        facts[SPACING] = json.dumps(list(placement.grid.spacing))
    return facts


def _label(spec: SampleSpec, generator: Generator) -> LabelledGrid:
    config = generator.config
    if spec.file is None:
        return LabelledGrid(spec, place_on_model(_grid(spec, config), generator), None, None, {"source": spec.source})
    source = load_label(spec.file.path, config.class_names)
    label = source.label
    if label is None:
        raise BadInputError(f"{spec.file.path}: expected a label map, got none. Check the file.")
    shown = [int(value) for value in label.unique().tolist() if value]
    record: dict[str, Any] = {
        "source": spec.source,
        "file": spec.file.shown,
        "sha256": spec.file.sha256,
        "classes": shown,
    }
    if spec.source == "deform":
        crowd = max(count_parts(label), config.max_parts) > MOST_PARTS
        try:
            label, deformation = deform_label(
                label,
                generator=stream(spec.seed, "deformation"),
                spacing=source.grid.spacing,
                keep_components=not crowd,
            )
        except BadInputError as error:
            raise BadInputError(f"{spec.file.path}: {error}") from error
        record |= {"deformation": asdict(deformation), "keep_components": not crowd}
    placement = place_on_model(source.grid if spec.scan is None else _grid(spec, config), generator)
    index = to_model(generator.label_to_index(label), placement, mode="nearest", padding="constant")
    return LabelledGrid(spec, placement, label.to(torch.int16), index, record)


def steering_names(spec: SampleSpec, config: GeneratorConfig) -> tuple[str, ...]:
    """Names of the conditions that steer a sample.

    Args:
        spec: What was planned.
        config: Of the model.

    Returns:
        The names; headers of files are read where the voxel size steers.
    """
    names = [] if spec.source == "none" or spec.outlines else ["mask"]
    names += ["edge"] if spec.outlines or spec.edge is not None else []
    names += ["text"] if spec.text is not None else []
    names += list(spec.attributes)
    if SPACING in config.attributes and SPACING not in names and _grid(spec, config).known:
        names.append(SPACING)
    return tuple(names)


def generate_labels(
    group: Sequence[LabelledGrid],
    generator: Generator,
    denoise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    settings: SamplingSettings,
    on_reject: Callable[[SampleSpec, BadInputError], object] | None = None,
) -> list[LabelledGrid]:
    """Draw the label maps of samples that share one model grid; maps that cannot be are drawn again.

    Args:
        group: Samples without label.
        generator: The model.
        denoise: Its label denoiser, ``(x, t, valid) -> output``, in the precision of the run.
        settings: How to sample.
        on_reject: Called with a sample for which no draw is acceptable, and the reason; None raises it.

    Returns:
        The samples with their labels, without those rejected; the record says which attempt was accepted.

    Raises:
        BadInputError: If the model has no label generator, or no draw is acceptable.
    """
    config, device = generator.config, generator.device
    objective, sampler = label_sampling(generator, settings.sampler)
    values = sorted(config.class_names)
    required = {values.index(value) for value in config.constant_classes if value != 0}
    done: dict[int, LabelledGrid] = {}
    for attempt in range(MAX_ATTEMPTS):
        pending = [item for item in group if item.spec.index not in done]
        if not pending:
            break
        valid = torch.stack([valid_mask(item.placement) for item in pending])
        seeds = [derive_seed(item.spec.seed, "label", attempt) for item in pending]
        noise = seeded_noise(generator.label_shape(pending[0].placement.shape), seeds).to(device)
        inside = valid[:, None].to(device, torch.float32)
        distances = sample(
            partial(_bind_valid, denoise, inside),
            noise,
            objective=objective,
            sampler=sampler,
            spacing=settings.sampler_spacing,
            num_inference_steps=settings.num_inference_steps,
        )
        drawn = generator.decode_label(distances).cpu() * valid
        for item, index in zip(pending, drawn, strict=True):
            present = set(index.unique().tolist()) - {0}
            whole = config.max_parts == 0 or count_parts(index) <= config.max_parts
            if present and required <= present and whole:
                index = index.to(torch.int16)
                label = from_model(generator.index_to_label(index), item.placement, mode="nearest")
                record = {**item.record, "attempt": attempt + 1}
                done[item.spec.index] = replace(item, label=label, index=index, record=record)
    for item in group:
        if item.spec.index in done:
            continue
        names = ", ".join(config.class_names[values[index]] for index in sorted(required))
        wanted = f"the classes that all training scans have ({names})" if required else "a class"
        steps = config.training.get("steps", {}).get("label")
        trained = f", trained for {steps} steps" if steps else ""
        error = BadInputError(
            f"{item.spec.case}: expected a label map with {wanted}, in no more parts than real ones, got none in "
            f"{MAX_ATTEMPTS} draws of the model's own label generator{trained}. Train the stage 'label' for longer, or "
            "give label maps with --labels FOLDER."
        )
        if on_reject is None:
            raise error
        on_reject(item.spec, error)
    return [done[item.spec.index] for item in group if item.spec.index in done]


def label_sampling(generator: Generator, sampler: str) -> tuple[Objective, str]:
    """What the label generator was trained for, and the sampler by the name that goes with it.

    Args:
        generator: The model.
        sampler: Name of the sampler for its images.

    Returns:
        Objective and name.

    Raises:
        BadInputError: If the model has no label generator.
    """
    objective = generator.config.label_objective
    if generator.label_denoiser is None or objective is None:
        raise BadInputError(
            f"model '{generator.config.name}': expected one with a label generator, got one without. Give --labels "
            "FOLDER, or train the stage 'label'."
        )
    if sampler not in sampler_names(objective):
        sampler = {"ddim": "euler", "euler": "ddim"}.get(sampler, sampler)  # two names of one step
    return objective, sampler


def _bind_valid(
    denoise: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    valid: torch.Tensor,
    x: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    return denoise(x, t, valid)


def place_on_model(grid: Grid, generator: Generator) -> Placement:
    """Plan how a scan comes onto the grid of a model.

    Args:
        grid: Of the scan.
        generator: The model.

    Returns:
        The placement.
    """
    config = generator.config
    return place(
        grid,
        spacing=config.spacing,
        orientation=config.orientation,
        min_size=config.size,
        divisor=generator.divisor,
    )


def _grid(spec: SampleSpec, config: GeneratorConfig) -> Grid:
    """Where the voxels of a sample lie."""
    if spec.scan is not None:
        return read_grid(spec.scan.files[0].path)
    if spec.file is not None:
        return read_grid(spec.file.path)
    return _draw_grid(spec, config) if spec.edge is None else read_grid(spec.edge.files[0].path)


def _draw_grid(spec: SampleSpec, config: GeneratorConfig) -> Grid:
    """A field of view of the training set, drawn by the sample's seed, centered at the origin of the scanner.

    A model without a voxel size of its own gives it the one that the sample is steered by.
    """
    shapes = config.shapes or (config.size,)
    choice = int(torch.randint(len(shapes), (1,), generator=stream(spec.seed, "shape")))
    shape = tuple(shapes[choice])
    asked = spec.attributes.get(SPACING) if config.spacing is None else None
    spacing = tuple(json.loads(asked)) if asked else config.spacing or (1.0,) * len(shape)
    affine = np.eye(4)
    if config.orientation is not None and len(shape) == 3:
        # Shapes are in the model's axis order: the file then needs no turning.
        turn = nib.orientations.axcodes2ornt(config.orientation)
        for axis, (world, sign) in enumerate(turn.astype(int)):
            affine[:3, axis] = sign * np.eye(3)[world]
    affine[:3, : len(shape)] *= np.asarray(spacing)
    affine[:3, 3] = -affine[:3, : len(shape)] @ ((np.asarray(shape) - 1) / 2)
    return Grid(shape, affine, known=config.spacing is not None or asked is not None)
