"""Fréchet radiomic distance as a torchmetrics metric, by named protocol."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from medgen.metrics.protocols import PROTOCOLS, Protocol
from medgen.metrics.radiomic_distance import RadiomicDistance
from medgen.radiomics import luminance
from medgen.radiomics.extractor import extract_with_notes
from medgen.types import BadInputError

_CHANNELS = ("luminance", "each")


class FrechetRadiomicDistance(Metric):
    """Fréchet distance between radiomic features of real and synthetic scans.

    Protocols: ``frd-v0`` (Osuala et al. 2024) and ``frd-v1`` (Konz, Osuala et al. 2026, arXiv:2412.01496) are what
    frd-score 1.0.1 computes, so that values compare with published ones; ``frd-robust`` is symmetric, 0 for equal
    distributions at any number of scans, and comes with a p-value and an interval (see
    :func:`medgen.metrics.robust_distance.frd_robust`). Values of different protocols do not compare.

    Features are kept in float64, a few kilobytes a scan; states concatenate across processes.

    Args:
        protocol: Name of the protocol.
        spatial_dims: 2 or 3.
        channels: Colors become one gray image by ``luminance``, or ``each`` channel has features of its own.
        bad_scans: ``exclude`` counts a scan that has no features (constant, empty or tiny region) and goes on;
            ``raise`` stops there.
        workers: Threads that extract; None takes one per scan of a batch, up to the cores.
        reset_real_features: Whether :meth:`reset` forgets the real scans too; False keeps them through training.
        **kwargs: Passed to ``torchmetrics.Metric``.

    Attributes:
        higher_is_better: False.
        is_differentiable: False.
        full_state_update: False; an update needs only its own batch.
        real_features: Features of the real scans, float64: flat, so that processes without scans can join.
        synthetic_features: Features of the synthetic scans, likewise.
        real_excluded: Number of real scans without features.
        synthetic_excluded: Number of synthetic scans without features.
        num_channels: Channels of the scans; 0 before any.

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
    is_differentiable = False
    full_state_update = False

    real_features: list[torch.Tensor]
    synthetic_features: list[torch.Tensor]
    real_excluded: torch.Tensor
    synthetic_excluded: torch.Tensor
    num_channels: torch.Tensor

    def __init__(
        self,
        protocol: Literal["frd-robust", "frd-v1", "frd-v0"] = "frd-robust",
        *,
        spatial_dims: Literal[2, 3] = 2,
        channels: Literal["luminance", "each"] = "luminance",
        bad_scans: Literal["exclude", "raise"] = "exclude",
        workers: int | None = None,
        reset_real_features: bool = True,
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
        self.reset_real_features = reset_real_features
        self.excluded: Counter[tuple[str, str]] = Counter()
        self.last_result: RadiomicDistance | None = None
        self.add_state("num_channels", default=torch.tensor(0), dist_reduce_fx="max")
        for name in ("real", "synthetic"):
            self.add_state(f"{name}_features", default=[], dist_reduce_fx="cat")
            self.add_state(f"{name}_excluded", default=torch.tensor(0), dist_reduce_fx="sum")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the features; with ``channels="each"`` once per channel."""
        names = self.protocol.columns(self.spatial_dims)
        count = int(self.num_channels)
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
        known = int(self.num_channels)
        if not known:
            if self.channels == "luminance" and not (channels == 1 or (channels == 3 and self.spatial_dims == 2)):
                raise ValueError(
                    f"images: expected 1 channel, or 3 colors in 2D, got {channels}. "
                    "Pass channels='each' for features of every channel."
                )
            self.num_channels = torch.tensor(channels, device=self.num_channels.device)
        elif channels != known:
            raise ValueError(f"images: expected {known} channel(s) as before, got {channels}.")
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
        self._keep(rows, "real" if real else "synthetic", images.device)

    def compute(self) -> torch.Tensor:
        """Distance over everything that was added.

        Returns:
            Float64 scalar in the unit of the protocol.

        Raises:
            ValueError: If either set has fewer than two scans with features.
        """
        result = self.result()
        for note in result.warnings:
            warnings.warn(f"FrechetRadiomicDistance: {note}", stacklevel=2)
        return torch.tensor(result.value, dtype=torch.float64)

    def result(self) -> RadiomicDistance:
        """The distance with all that it rests on, over the scans of this process.

        What :meth:`compute` found over all processes stays in ``last_result``.

        Returns:
            Value, sizes, dropped columns, strongest features, and warnings.

        Raises:
            ValueError: If either set has fewer than two scans with features.
        """
        width = len(self.columns)
        sets = []
        for name in ("real", "synthetic"):
            state = getattr(self, f"{name}_features")
            flat = dim_zero_cat(state) if len(state) else torch.zeros(0)
            rows = flat.reshape(-1, width)
            if len(rows) < 2:
                reasons = "; ".join(f"{n}x {why}" for (side, why), n in self.excluded.items() if side == name)
                raise ValueError(
                    f"FrechetRadiomicDistance: expected at least 2 {name} scans with features, got {len(rows)} and "
                    f"{int(getattr(self, f'{name}_excluded'))} excluded ({reasons or 'none here'}). Add scans."
                )
            sets.append(rows.cpu().double().numpy())
        found = self.protocol.distance(sets[0], sets[1], self.columns)
        self.last_result = found
        return found

    def reset(self) -> None:
        """Forget the scans; the real ones only if ``reset_real_features``."""
        kept = {name: getattr(self, name) for name in self._defaults if name.startswith(("real_", "num_"))}
        counts = {key: number for key, number in self.excluded.items() if key[0] == "real"}
        kept = {name: list(value) if isinstance(value, list) else value for name, value in kept.items()}
        super().reset()
        self.excluded = Counter()
        if self.reset_real_features:
            return
        self.excluded.update(counts)
        for name, value in kept.items():
            setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: one batch holds one set only, so there is no value for it.

        Args:
            *args: Not used.
            **kwargs: Not used.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "FrechetRadiomicDistance: expected update(images, real=...) and then compute(), got a call of the metric. "
            "A batch holds scans of one set only, which has no distance."
        )

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all processes; called by ``compute``.

        Args:
            *args: As for ``torchmetrics.Metric.sync``.
            **kwargs: As for ``torchmetrics.Metric.sync``.
        """
        # An empty list would be gathered as float32, which the other processes do not hold.
        for name in ("real_features", "synthetic_features"):
            if not getattr(self, name):
                setattr(self, name, [torch.zeros(0, dtype=torch.float64, device=self.device)])
        super().sync(*args, **kwargs)

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
