"""The closest real scan of each scan, whatever flip, turn, shift or crop lies between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from medgen.metrics.descriptor import band_pass
from medgen.metrics.pose import starting_poses

# Pyramid: cells that are pooled, blur that removes noise, candidates kept, steps of the fit, pairs fitted together.
_LEVELS = ((4, 0.0, 6, 4, 128), (2, 0.0, 3, 4, 64), (1, 1.0, 1, 5, 32))
_BROAD = 4.0  # cells; broader structure than this is subtracted
_RADIUS = 0.95  # of the ellipsoid that is compared: corners are empty after a turn
_QUERIES = 1024  # scans searched together, which bounds memory
_LONGEST_STEP = 0.1  # of the box: beyond it the linear model of the fit does not hold


@dataclass(frozen=True, eq=False)
class Matches:
    """The closest reference scan of each query.

    Attributes:
        index: ``(Q,)`` rows of the reference.
        similarity: ``(Q,)`` float64 correlation in [-1, 1] of the two scans once they are aligned.
        pose: ``(Q, dims, dims + 1)`` float64, where the closest scan lies: see :func:`medgen.metrics.pose.apply_pose`.
    """

    index: torch.Tensor
    similarity: torch.Tensor
    pose: torch.Tensor


@torch.no_grad()
def closest(query: torch.Tensor, reference: torch.Tensor, *, exclude: torch.Tensor | None = None) -> Matches:
    """Closest reference scan of each query, with the pose and the correlation that the two reach in it.

    First every reference scan in every starting pose (all flips, rotations, shifts, crops) is correlated with every
    query on a grid of a quarter of the cells, as one matrix product per pose. Then the pose of the best candidates is
    fitted as a full affine map, from coarse to fine, and the fewer of them the finer. The similarity is the normalized
    correlation, over all channels and inside the ellipsoid of the box, of descriptors whose noise and broad structure
    are filtered out; the fit climbs it as ECC image alignment does, with the template's linear model.

    Args:
        query: ``(Q, C, G, G[, G])`` descriptors of :func:`medgen.metrics.descriptor.describe`.
        reference: ``(N, C, G, G[, G])`` descriptors of the scans to search.
        exclude: ``(Q, N)`` True for pairs that must not be matched, such as a scan and itself; no row all True.

    Returns:
        The matches.

    Raises:
        ValueError: If the sets differ in dimension, channels or grid, a set is empty, or a query has nothing to match.

    References:
        Evangelidis and Psarakis 2008, Parametric image alignment using enhanced correlation coefficient maximization,
        IEEE TPAMI 30(10); Baker and Matthews 2004, Lucas-Kanade 20 years on, IJCV 56(3), section 3.2.
    """
    if query.ndim not in (4, 5) or query.shape[1:] != reference.shape[1:] or not (len(query) and len(reference)):
        raise ValueError(
            "closest: expected two sets (Q, C, G, G[, G]) and (N, C, G, G[, G]) of one dimension, channels and grid, "
            f"got {tuple(query.shape)} and {tuple(reference.shape)}. Describe both sets with the same settings."
        )
    if exclude is not None and bool(exclude.all(dim=1).any()):
        raise ValueError("closest: expected something to match for every scan, got a scan that excludes all others.")
    poses = starting_poses(query.ndim - 2).to(query.device)
    coarse = _level(reference, 0)
    parts = []
    for rows in torch.arange(len(query), device=query.device).split(_QUERIES):
        chosen = None if exclude is None else exclude[rows]
        candidates, start, counts = _search(_level(query[rows], 0), coarse, poses, chosen, _LEVELS[0][2])
        parts.append(_fit_candidates(query[rows], reference, candidates, poses[start], counts))
    return Matches(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _level(descriptors: torch.Tensor, level: int) -> torch.Tensor:
    """Descriptors at one level of the pyramid, float32."""
    pooled, low = _LEVELS[level][:2]
    values = descriptors.float()
    pool = F.avg_pool2d if values.ndim == 4 else F.avg_pool3d
    return band_pass(pool(values, pooled) if pooled > 1 else values, low=low, high=_BROAD)


def _search(
    query: torch.Tensor, reference: torch.Tensor, poses: torch.Tensor, exclude: torch.Tensor | None, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the best references ``(Q, K)``, of the poses in which they are best, and which of them count."""
    inside, points = _inside(query)
    wanted = _unit(query.flatten(2)[..., inside]).flatten(1)
    best = wanted.new_full((len(query), len(reference)), -2.0)
    which = torch.zeros(best.shape, dtype=torch.int16, device=best.device)
    for number, pose in enumerate(poses):
        posed = _unit(_sample(reference, pose.expand(len(reference), -1, -1), points))
        similarity = wanted @ posed.flatten(1).T
        better = similarity > best
        best = torch.where(better, similarity, best)
        which[better] = number
    if exclude is not None:
        best[exclude] = -3.0
    values, candidates = best.topk(min(count, len(reference)), dim=1)
    return candidates, which.gather(1, candidates).long(), values > -3.0


def _fit_candidates(
    query: torch.Tensor,
    reference: torch.Tensor,
    candidates: torch.Tensor,
    pose: torch.Tensor,
    counts: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit the poses ``(Q, K, dims, dims + 1)`` of the candidates ``(Q, K)`` down the pyramid; the last one stays.

    Where fewer are left than are looked at, some are among the candidates that do not count ``(Q, K)``, and go first.
    """
    similarity = torch.zeros(candidates.shape, dtype=torch.float64, device=query.device)
    for level, (_, _, count, steps, together) in enumerate(_LEVELS):
        if level:
            keep = similarity.topk(min(count, candidates.shape[1]), dim=1).indices
            candidates, counts = candidates.gather(1, keep), counts.gather(1, keep)
            similarity = similarity.gather(1, keep)
            pose = pose[torch.arange(len(query), device=query.device)[:, None], keep]
        pose = pose.clone()
        pairs = torch.cartesian_prod(*(torch.arange(size, device=query.device) for size in candidates.shape))
        for pair in pairs.view(-1, 2).split(together):
            rows, columns = pair.unbind(dim=1)
            template, moving = _level(query[rows], level), _level(reference[candidates[rows, columns]], level)
            similarity[rows, columns], pose[rows, columns] = _fit(template, moving, pose[rows, columns], steps)
        similarity = torch.where(counts, similarity, -4.0)
    return candidates[:, 0], similarity[:, 0], pose[:, 0]


def _fit(
    template: torch.Tensor, moving: torch.Tensor, pose: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Climb the correlation from the given poses ``(B, dims, dims + 1)``; the best on the way is returned."""
    dims = template.ndim - 2
    inside, points = _inside(template)
    jacobian, inverse = _linear_model(template, inside, points)
    wanted = _unit(template.flatten(2)[..., inside]).flatten(1)
    bottom = torch.eye(dims + 1, dtype=torch.float64, device=pose.device)[-1:].expand(len(pose), 1, -1)
    best, best_pose = torch.full((len(pose),), -2.0, dtype=torch.float64, device=pose.device), pose
    for step in range(steps + 1):
        posed = _unit(_sample(moving, pose, points)).flatten(1)
        similarity = (wanted * posed).sum(dim=1).double()
        better = similarity > best
        best, best_pose = torch.where(better, similarity, best), torch.where(better[:, None, None], pose, best_pose)
        if step == steps:
            break
        change = (inverse @ (jacobian @ posed[:, :, None]).double())[:, :, 0] / similarity.clamp(min=0.2)[:, None]
        change = change * (_LONGEST_STEP / change.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        warp = torch.cat([change.view(-1, dims, dims + 1), 0 * bottom], dim=1) + torch.eye(dims + 1).to(change)
        pose = (torch.cat([pose, bottom], dim=1) @ torch.linalg.inv(warp))[:, :dims]
    return best, best_pose


def _linear_model(
    template: torch.Tensor, inside: torch.Tensor, points: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivative ``J`` ``(B, P, C * n)`` of the unit template by its P affine parameters, and ``(J J^T)^-1``.

    What brightness and contrast explain is taken out of it. The template stays where it is, and so does its J.
    """
    dims = template.ndim - 2
    slopes = torch.gradient(template, dim=list(range(2, 2 + dims)), spacing=2 / template.shape[-1])
    slope = torch.stack(slopes, dim=1).flatten(3)[..., inside]
    along = torch.cat([points, torch.ones_like(points[:, :1])], dim=1)
    values = template.flatten(2)[..., inside]
    norm = (values - values.mean(dim=-1, keepdim=True)).norm(dim=-1, keepdim=True)
    scale = norm.clamp(min=1e-6) * (norm > 1e-6).sum(dim=1, keepdim=True).clamp(min=1).sqrt()
    unit = _unit(values)
    slope = slope / scale[:, None]
    jacobian = (slope[:, :, None] * along.T[:, None]).flatten(1, 2)
    jacobian = jacobian - jacobian.mean(dim=-1, keepdim=True)
    jacobian = jacobian - (jacobian * unit[:, None]).sum(dim=(2, 3), keepdim=True) * unit[:, None]
    rows = jacobian.flatten(2)
    normal = rows @ rows.mT
    # A template without structure along an axis has no unique answer; this picks the small one.
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=1e-12)
    eye = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    return rows, torch.linalg.inv((normal + ridge[:, None, None] * eye).double())


def _inside(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells ``(n,)`` of the ellipsoid and their places ``(n, dims)``, the box reaching from -1 to 1."""
    dims, size = images.ndim - 2, images.shape[-1]
    axis = (2 * torch.arange(size, device=images.device) + 1) / size - 1
    points = torch.stack(torch.meshgrid(*[axis] * dims, indexing="ij"), dim=-1).reshape(-1, dims)
    inside = torch.nonzero(points.norm(dim=1) <= _RADIUS).flatten()
    return inside, points[inside]


def _sample(images: torch.Tensor, pose: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Values ``(B, C, n)`` at the points ``(n, dims)`` as the poses place them; 0 outside, which band-passed means."""
    dims = images.ndim - 2
    matrix, shift = pose.to(images.dtype).split([dims, 1], dim=2)
    # grid_sample counts axes from the last to the first, and wants as many axes of points as the images have.
    places = (points @ matrix.mT + shift.mT).flip(2).view(len(images), *[1] * (dims - 1), len(points), dims)
    return F.grid_sample(images, places, align_corners=False).flatten(2)


def _unit(values: torch.Tensor) -> torch.Tensor:
    """Cells ``(B, C, n)`` at mean 0 and one norm for each channel that varies, norm 1 altogether."""
    values = values - values.mean(dim=-1, keepdim=True)
    values = values / values.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return values / values.flatten(1).norm(dim=1).clamp(min=1e-6)[:, None, None]
