"""MRI is measured line by line in k-space: motion, ghosts and truncation all happen there.

TorchIO has motion and ghosting too, but draws from torch's global generator and knows no part at rest.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import GibbsNoise
from scipy import ndimage

from medgen.types import Shape, Spacing

# Lines about the middle of k-space, of all, that are measured at rest: they hold most of the signal, so that the scan
# stays where its label is (Reguig et al. 2022, arXiv:2204.03522, on the shift that motion in the middle causes).
_AT_REST = 0.08
# Poses on either side of the middle.
_POSES = 3


@dataclass(frozen=True)
class Pose:
    """Where the body was while some lines of k-space were measured.

    Attributes:
        first: First line, by frequency: 0 is the most negative one.
        stop: Line after the last.
        rotation: Degrees; one angle in 2D, angles about array axes 0, 1, 2 (applied in this order) in 3D.
        translation: Per array axis, in units of the shortest voxel edge.
    """

    first: int
    stop: int
    rotation: tuple[float, ...]
    translation: tuple[float, ...]


def phase_axis(shape: Shape, rng: np.random.RandomState) -> int:
    """Draw the direction of phase encoding: one of the two longest axes.

    Args:
        shape: ``(H, W[, D])`` voxels.
        rng: Source of the draw.

    Returns:
        The array axis, counted without the channels.
    """
    longest = sorted(range(len(shape)), key=lambda axis: -shape[axis])[:2]
    return longest[rng.randint(2)]


def draw_poses(lines: int, spatial_dims: int, movement: float, rng: np.random.RandomState) -> list[Pose]:
    """Draw how the body moved during the scan: at rest in the middle of k-space, three poses before and three after.

    Args:
        lines: Lines of k-space.
        spatial_dims: 2 or 3.
        movement: Length of each translation in units of the shortest voxel edge, and largest rotation in degrees.
        rng: Source of the draw; the same draws, scaled, for every movement.

    Returns:
        The poses, without the one at rest.
    """
    rest = max(1, round(lines * _AT_REST))
    low, high = (lines - rest) // 2, (lines + rest + 1) // 2
    poses = []
    for first, stop in ((0, low), (high, lines)):
        cuts = np.sort(rng.uniform(first, stop, _POSES - 1)).round().astype(int)
        edges = [first, *cuts.tolist(), stop]
        for start, end in itertools.pairwise(edges):
            angles = rng.uniform(-1, 1, 1 if spatial_dims == 2 else 3) * movement
            direction = rng.normal(size=spatial_dims)
            direction *= movement / np.linalg.norm(direction)
            poses.append(Pose(start, end, tuple(angles.tolist()), tuple(direction.tolist())))
    return poses


def move(signal: torch.Tensor, poses: list[Pose], axis: int, spacing: Spacing) -> torch.Tensor:
    """Motion between the lines of k-space (Shaw et al., MIDL 2019): each line sees the body in its pose.

    Args:
        signal: ``(C, H, W[, D])``.
        poses: Poses and their lines; the lines of none are measured at rest.
        axis: Direction of phase encoding, counted without the channels.
        spacing: Edge lengths of a voxel, in units of the shortest.

    Returns:
        Magnitude, ``(C, H, W[, D])``.
    """
    # All frequencies along the other axes belong to one line, so only the phase encoding needs the transform.
    image = signal.cpu().numpy()
    kspace = np.fft.fft(image, axis=axis + 1)
    lines = np.fft.fftshift(np.arange(image.shape[axis + 1]))
    splines = [ndimage.spline_filter(channel, output=np.float32, mode="nearest") for channel in image]
    for pose in poses:
        rows = (slice(None),) * (axis + 1) + (lines[pose.first : pose.stop],)
        kspace[rows] = np.fft.fft(_rigid(splines, pose, spacing), axis=axis + 1)[rows]
    return torch.from_numpy(np.abs(np.fft.ifft(kspace, axis=axis + 1))).to(signal)


def motion(signal: torch.Tensor, movement: float, rng: np.random.RandomState, spacing: Spacing) -> torch.Tensor:
    """The body moves a few times while it is scanned.

    Args:
        signal: ``(C, H, W[, D])``.
        movement: As for :func:`draw_poses`.
        rng: Source of the draws.
        spacing: Edge lengths of a voxel, in units of the shortest.

    Returns:
        Magnitude, ``(C, H, W[, D])``.
    """
    axis = phase_axis(tuple(signal.shape[1:]), rng)
    count = signal.shape[axis + 1]
    # k-space takes the scan for periodic: a body that the border cuts would ring there, so it fades out beyond.
    margin = math.ceil(count / 8)
    fade = np.cos(np.linspace(0, math.pi / 2, margin + 2)[1:-1]) ** 2
    window = torch.from_numpy(np.concatenate([fade[::-1], np.ones(count), fade])).to(signal)
    place = torch.arange(-margin, count + margin).clamp(0, count - 1).to(signal.device)
    padded = signal.index_select(axis + 1, place) * window.view(-1, *(1,) * (signal.ndim - axis - 2))
    poses = draw_poses(len(window), signal.ndim - 1, movement, rng)
    return move(padded, poses, axis, spacing).narrow(axis + 1, margin, count)


def ghost(signal: torch.Tensor, amplitude: float, shift: int, phase: float, axis: int) -> torch.Tensor:
    """Periodic change of the signal while it is measured (Wood & Henkelman, Med. Phys. 1985).

    The line of frequency f is measured as K(f) (1 + 2a cos(2 pi f d / N + phi)), which is the scan and two ghosts:
    x(y) + a exp(i phi) x(y + d) + a exp(-i phi) x(y - d). It is scaled so that the mean signal stays.

    Args:
        signal: ``(C, H, W[, D])``.
        amplitude: a, the brightness of each ghost; below 1/2.
        shift: d, voxels between the scan and each ghost.
        phase: phi in radians.
        axis: Direction of phase encoding, counted without the channels.

    Returns:
        Magnitude, ``(C, H, W[, D])``.
    """
    turn = amplitude * complex(math.cos(phase), math.sin(phase))
    before, after = signal.roll(-shift, axis + 1), signal.roll(shift, axis + 1)
    return (signal + turn * before + turn.conjugate() * after).abs() / (1 + 2 * turn.real)


def ghosting(signal: torch.Tensor, amplitude: float, rng: np.random.RandomState) -> torch.Tensor:
    """Ghosts of breathing or pulsation, a sixth to two fifths of the field of view to either side.

    Args:
        signal: ``(C, H, W[, D])``.
        amplitude: Brightness of each ghost, in parts of the scan.
        rng: Draws direction, distance and phase.

    Returns:
        Magnitude, ``(C, H, W[, D])``.
    """
    axis = phase_axis(tuple(signal.shape[1:]), rng)
    shift = max(1, round(signal.shape[axis + 1] * rng.uniform(1 / 6, 2 / 5)))
    return ghost(signal, amplitude, shift, rng.uniform(0, math.pi / 2), axis)


def gibbs(signal: torch.Tensor, kept: float) -> torch.Tensor:
    """Ringing beside edges, as k-space is cut off (MONAI's GibbsNoise).

    Args:
        signal: ``(C, H, W[, D])``.
        kept: Radius that is kept, as a part of the highest frequency of the longest axis.

    Returns:
        Magnitude, ``(C, H, W[, D])``.
    """
    return GibbsNoise(alpha=1 - kept / math.sqrt(2))(signal).abs()


def _rigid(splines: list[np.ndarray], pose: Pose, spacing: Spacing) -> np.ndarray:
    """The channels turned about their middle, then shifted; beyond its border a scan goes on as at the border."""
    dims = splines[0].ndim
    turn = np.eye(dims)
    planes = [(0, 1)] if dims == 2 else [(1, 2), (2, 0), (0, 1)]
    for angle, (first, second) in zip(np.deg2rad(pose.rotation), planes, strict=True):
        step = np.eye(dims)
        step[[first, second], [first, second]] = np.cos(angle)
        step[first, second], step[second, first] = -np.sin(angle), np.sin(angle)
        turn = step @ turn
    edges, middle = np.asarray(spacing), (np.asarray(splines[0].shape) - 1) / 2
    # A voxel of the moved scan at p shows what was at turn^-1 (p - translation).
    back = turn.T * edges / edges[:, None]
    offset = middle - back @ middle - turn.T @ np.asarray(pose.translation) / edges
    return np.stack(
        [ndimage.affine_transform(spline, back, offset, mode="nearest", prefilter=False) for spline in splines]
    )
