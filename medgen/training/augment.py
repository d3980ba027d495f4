"""Other versions of a training scan: turned, scaled and bent with its label map; never mirrored, since sides matter."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import AffineGrid, RandAffineGrid, Resample

from medgen.conditions import spline
from medgen.planning import DiffusionPlan
from medgen.seeding import stream

# Control points of the smooth displacement lie a quarter of the scan's mean edge apart: half an organ that fills it.
_CONTROL_SPACING = 1 / 4


def augment(
    tensors: dict[str, torch.Tensor], plan: DiffusionPlan, seed: int, spacing: tuple[float, ...]
) -> dict[str, torch.Tensor]:
    """Rotate, scale and, where the plan says so, bend a scan with its label by a small random amount.

    Args:
        tensors: As :func:`medgen.training.cache.read_scan` gives them.
        plan: Bounds of the draw.
        seed: Decides the draw.
        spacing: Voxel edges in mm: turned is the patient, not the array of voxels, which may be longer than wide.

    Returns:
        The same tensors, transformed alike; outside the field of view `valid` is False and `label` 0. A bent image is
        resampled by cubic splines, which keep most of its grain: four fifths of white noise, where linear
        interpolation keeps half.
    """
    size = tensors["label"].shape
    dims = len(size)
    angle = plan.rotation * torch.pi / 180
    random = RandAffineGrid(
        rotate_range=[(-angle, angle)] * (3 if dims == 3 else 1), scale_range=[(-plan.scaling, plan.scaling)] * dims
    )
    random.set_random_state(seed % 2**32)
    random.randomize()  # a second set of draws, below, is what MONAI's own RandAffine takes for this seed
    random(size)
    matrix = random.get_transformation_matrix()
    edges = torch.tensor(spacing, dtype=matrix.dtype)
    matrix[:dims, :dims] *= edges[None, :] / edges[:, None]  # in mm, then out of it
    grid, _ = AffineGrid(affine=matrix)(size)
    if plan.elastic:
        grid[:dims] += _displacement(size, spacing, plan.elastic, stream(seed, "elastic")).to(grid)
    resample = Resample()
    mode, padding = (3, "reflect") if plan.elastic else ("bilinear", "reflection")
    image = torch.as_tensor(resample(tensors["image"], grid, mode=mode, padding_mode=padding))
    out = {"image": image.clamp(-1, 1) if plan.elastic else image}  # splines overshoot
    for name in ("label", "valid"):
        moved = torch.as_tensor(resample(tensors[name][None].float(), grid, mode="nearest", padding_mode="zeros"))
        out[name] = moved[0].round().to(tensors[name].dtype)
    out["label"] = out["label"] * out["valid"]
    return out


def _displacement(
    size: torch.Size, spacing: tuple[float, ...], elastic: float, generator: torch.Generator
) -> torch.Tensor:
    """Smooth random displacement ``(dims, *size)``, in voxels."""
    edges = np.asarray(spacing)
    lengths = np.asarray(size) * edges
    control = _CONTROL_SPACING * float(lengths.prod() ** (1 / len(size)))
    bases = [spline.basis(np.arange(n) * edge, control) for n, edge in zip(size, spacing, strict=True)]
    counts = [basis.shape[1] for basis in bases]
    points = torch.randn(*counts, len(size), generator=generator, dtype=torch.float64).numpy()
    points *= elastic * control / spline.VARIANCE ** (len(size) / 2)
    return torch.from_numpy(spline.evaluate(points, bases) / edges).movedim(-1, 0)
