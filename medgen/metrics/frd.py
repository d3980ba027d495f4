"""Fréchet radiomic distance as a torchmetrics metric, by named protocol."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch

from medgen.metrics.protocols import PROTOCOLS, Protocol
from medgen.metrics.radiomic_distance import RadiomicDistance
from medgen.metrics.set_metric import SetMetric
from medgen.radiomics import luminance
from medgen.radiomics.extractor import extract_with_notes
from medgen.types import BadInputError

_CHANNELS = ("luminance", "each")


class FrechetRadiomicDistance(SetMetric):
    """Fréchet distance between radiomic features of real and synthetic scans.

    Protocols: ``frd-v0`` (Osuala et al. 2024) and ``frd-v1`` (Konz, Osuala et al. 2026, arXiv:2412.01496) are what
    frd-score 1.0.1 computes, so that values compare with published ones; ``frd-robust`` is symmetric, 0 for equal
    sets, near 0 for equal distributions at any number of scans, and comes with a p-value and an interval (see
    :func:`medgen.metrics.robust_distance.frd_robust`). Values of different protocols do not compare.

    Features are kept in float64, a few kilobytes a scan; states concatenate across processes.

    Args:
        protocol: Name of the protocol.
        spatial_dims: 2 or 3.
        channels: Colors become one gray image by ``luminance``, or ``each`` channel has features of its own.
        bad_scans: ``exclude`` counts a scan that has no features (constant, empty or tiny region) and goes on;
            ``raise`` stops there.
        workers: Threads that extract; None takes one per scan of a batch, up to the cores.
        **kwargs: As for :class:`medgen.metrics.set_metric.SetMetric`: ``reset_real_features`` and torchmetrics' own.

    Attributes:
        higher_is_better: False.
        real_features: Features of the real scans, float64: flat, so that processes without scans can join.
        synthetic_features: Features of the synthetic scans, likewise.
        real_excluded: Number of real scans without features.
        synthetic_excluded: Number of synthetic scans without features.
        excluded: How many scans this process excluded, by set and reason.
        last_result: What the last :meth:`compute` found, the same in every process; None before any.

    Example:
        >>> import torch
        >>> metric = FrechetRadiomicDistance()
        >>> scans = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> metric.update(scans, real=True)
        >>> metric.update(scans, real=False)
        >>> metric.compute().item()
        0.0
    """

    higher_is_better = False

    real_features: list[torch.Tensor]
    synthetic_features: list[torch.Tensor]
    real_excluded: torch.Tensor
    synthetic_excluded: torch.Tensor
    excluded: Counter[tuple[str, str]]
    last_result: RadiomicDistance | None

    def __init__(
        self,
        protocol: Literal["frd-robust", "frd-v1", "frd-v0"] = "frd-robust",
        *,
        spatial_dims: Literal[2, 3] = 2,
        channels: Literal["luminance", "each"] = "luminance",
        bad_scans: Literal["exclude", "raise"] = "exclude",
        workers: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}.")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims}.")
        if channels not in _CHANNELS:
            raise ValueError(f"channels: expected luminance or each, got {channels!r}.")
        if bad_scans not in ("exclude", "raise"):
            raise ValueError(f"bad_scans: expected exclude or raise, got {bad_scans!r}.")
        self.protocol = PROTOCOLS[protocol]
        self.spatial_dims = spatial_dims
        self.channels = channels
        self.bad_scans = bad_scans
        self.workers = workers
        self.excluded = Counter()
        self.last_result = None
        for name in ("real", "synthetic"):
            self._add_flat_state(f"{name}_features", torch.float64)
            self.add_state(f"{name}_excluded", default=torch.tensor(0), dist_reduce_fx="sum")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the features; with ``channels="each"`` once per channel."""
        names = self.protocol.columns(self.spatial_dims)
        count = int(self.kind[1])
        if self.channels == "luminance" or count <= 1:
            return names
        return tuple(f"channel{channel}_{name}" for channel in range(count) for name in names)

    def update(
        self,
        images: torch.Tensor,
        real: bool,
        mask: torch.Tensor | None = None,
        spacing: Sequence[float] | None = None,
    ) -> None:
        """Add a batch of scans.

        Args:
            images: ``(B, C, H, W[, D])`` intensities in any unit; volumes in the order (x, y, z).
            real: Whether the scans are real.
            mask: ``(B, H, W[, D])`` or ``(B, 1, H, W[, D])``; features are taken where it is 1. None takes whole scans.
            spacing: Voxel edges in mm, in the order of the axes; None stands for 1 mm.

        Raises:
            ValueError: If shapes, channels or dimensions do not fit.
            BadInputError: If a scan has no features and ``bad_scans="raise"``.
        """
        expected = f"(B, C, {'H, W' if self.spatial_dims == 2 else 'H, W, D'})"
        if images.ndim != self.spatial_dims + 2:
            raise ValueError(f"images: expected {expected}, got shape {tuple(images.shape)}. Set spatial_dims.")
        channels = images.shape[1]
        if self.channels == "luminance" and not (channels == 1 or (channels == 3 and self.spatial_dims == 2)):
            raise ValueError(
                f"images: expected 1 channel, or 3 colors in 2D, got {channels}. "
                "Pass channels='each' for features of every channel."
            )
        name = "real" if real else "synthetic"
        kind = self._check_kind(images, name)
        if spacing is not None and not (
            len(spacing) == self.spatial_dims and all(np.isfinite(step) and step > 0 for step in spacing)
        ):
            raise ValueError(
                f"spacing: expected {self.spatial_dims} positive lengths in mm, got {tuple(spacing)}. One per axis."
            )
        regions: list[np.ndarray | None] = [None] * len(images)
        if mask is not None:
            if mask.ndim == images.ndim and mask.shape[1] == 1:
                mask = mask[:, 0]
            if mask.shape != (len(images), *images.shape[2:]):
                raise ValueError(f"mask: expected shape {(len(images), *images.shape[2:])}, got {tuple(mask.shape)}.")
            regions = list(mask.detach().cpu().numpy())
        scans = images.detach().cpu().double().numpy()
        workers = min(len(scans), self.workers or torch.get_num_threads())
        with ThreadPoolExecutor(max(1, workers)) as pool:
            rows = list(pool.map(lambda pair: self._try(pair[0], pair[1], spacing), zip(scans, regions, strict=True)))
        self._keep(rows, name, images.device)
        self.kind = kind

    def compute(self) -> torch.Tensor:
        """Distance over everything that was added, by all processes; :meth:`result` has its details.

        Returns:
            Float64 scalar in the unit of the protocol.

        Raises:
            ValueError: If either set has fewer than two scans with features.
        """
        width = len(self.columns)
        sets = []
        for name in ("real", "synthetic"):
            rows = self._flat(f"{name}_features").reshape(-1, width)
            if len(rows) < 2:
                reasons = "; ".join(f"{n}x {why}" for (side, why), n in self.excluded.items() if side == name)
                raise ValueError(
                    f"FrechetRadiomicDistance: expected at least 2 {name} scans with features, got {len(rows)} and "
                    f"{int(getattr(self, f'{name}_excluded'))} excluded ({reasons or 'none here'}). Add scans."
                )
            sets.append(rows.cpu().double().numpy())
        self.last_result = self.protocol.distance(sets[0], sets[1], self.columns)
        for note in self.last_result.warnings:
            warnings.warn(f"FrechetRadiomicDistance: {note}", stacklevel=2)
        return torch.tensor(self.last_result.value, dtype=torch.float64)

    def result(self) -> RadiomicDistance:
        """What lies behind :meth:`compute`: as that, over all processes, which must all call it.

        Returns:
            Value, sizes, interval, p-value, dropped columns, strongest features, and warnings.

        Raises:
            ValueError: As for :meth:`compute`.
        """
        self.compute()  # remembered, unless scans were added since
        if self.last_result is None:
            raise RuntimeError("FrechetRadiomicDistance: expected compute to leave a result, got none.")
        return self.last_result

    def reset(self) -> None:
        """Forget the scans; the real ones only if ``reset_real_features``."""
        super().reset()
        for side, why in list(self.excluded):
            if side == "synthetic" or self.reset_real_features:
                del self.excluded[side, why]

    def _try(self, scan: np.ndarray, mask: np.ndarray | None, spacing: Sequence[float] | None) -> np.ndarray | str:
        """Features of one scan ``(C, *spatial)``, or why it has none."""
        try:
            return features(scan, mask, protocol=self.protocol, spacing=spacing, channels=self.channels)
        except BadInputError as error:
            if self.bad_scans == "raise":
                raise
            return str(error)

    def _keep(self, rows: Sequence[np.ndarray | str], name: str, device: torch.device) -> None:
        for row in rows:
            if isinstance(row, str):
                self.excluded[name, row.split(",")[0]] += 1
                count = getattr(self, f"{name}_excluded")
                setattr(self, f"{name}_excluded", count + 1)
                warnings.warn(f"FrechetRadiomicDistance: a {name} scan is excluded: {row}", stacklevel=3)
            else:
                getattr(self, f"{name}_features").append(torch.from_numpy(row).to(device))


def features(
    scan: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    protocol: Protocol,
    spacing: Sequence[float] | None = None,
    channels: str = "luminance",
) -> np.ndarray:
    """Features of one scan in the order of the protocol's columns.

    Args:
        scan: ``(C, H, W)`` or ``(C, X, Y, Z)`` intensities.
        mask: ``(H, W)`` or ``(X, Y, Z)``, region where it is 1; None takes the whole scan.
        protocol: The protocol.
        spacing: Voxel edges in mm; None stands for 1 mm.
        channels: ``luminance`` or ``each``.

    Returns:
        ``(D,)`` float64, or ``(C D,)`` with ``each``; NaN where a feature is not defined for this scan.

    Raises:
        BadInputError: If the scan has no features.
    """
    dims = scan.ndim - 1
    if protocol.name != "frd-robust":
        scan = scan.astype(np.float32)  # as frd-score reads every file
    planes = list(scan)
    if channels == "luminance" and len(planes) > 1:
        planes = [np.asarray(luminance(scan))]
    if mask is None:
        mask = protocol.whole_mask(scan.shape[1:])
    columns, parameters = protocol.columns(dims), protocol.parameters(dims)
    diagnostics = protocol.name == "frd-v1"
    rows = []
    for plane in planes:
        # What a small volume is left without becomes NaN, and the distance counts and names it.
        found, _ = extract_with_notes(plane, mask, [1], spacing=spacing, parameters=parameters, diagnostics=diagnostics)
        named = {name.removeprefix("original_"): value for name, value in found[1].items()}
        rows.append(np.asarray([named.get(name, np.nan) for name in columns]))
    return np.concatenate(rows)
