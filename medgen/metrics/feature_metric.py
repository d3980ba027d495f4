"""What the torchmetrics metrics over features share: scans in, features of both sets kept or summed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from medgen.metrics.extractor import build_extractor, by_view, wrap_module
from medgen.metrics.set_metric import SetMetric

_SETS = ("real", "synthetic")


class FeatureMetric(SetMetric):
    """Base of the metrics that compare real with synthetic scans by their features.

    A subclass adds its states, whose names begin with ``real_`` and ``synthetic_``, and says how features enter them.

    Args:
        feature: Name of an extractor (see :func:`medgen.metrics.extractor.build_extractor`), or a module that maps
            ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``, which is used in eval mode and without gradient.
        spatial_dims: 2 or 3; for a named extractor.
        in_channels: Channels of the scans; for a named extractor.
        weights: Local weight file; for a named extractor that has none of its own.
        num_features: ``D`` of a module without an attribute ``num_features``.
        num_views: ``V`` of a module without an attribute ``views``; 1 for ``(B, D)`` output.
        **kwargs: As for :class:`medgen.metrics.set_metric.SetMetric`: ``reset_real_features`` and torchmetrics' own.
    """

    def __init__(
        self,
        feature: str | nn.Module = "efficientnet-lite0",
        *,
        spatial_dims: int = 2,
        in_channels: int = 1,
        weights: str | Path | None = None,
        num_features: int | None = None,
        num_views: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(feature, str):
            if spatial_dims not in (2, 3):
                raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims}.")
            dims = cast(Literal[2, 3], spatial_dims)
            self.feature: nn.Module = build_extractor(
                feature, spatial_dims=dims, in_channels=in_channels, weights=weights
            )
        else:
            self.feature = wrap_module(feature, num_features=num_features, num_views=num_views)

    def update(self, images: torch.Tensor, real: bool) -> None:
        """Add a batch of scans.

        Args:
            images: ``(B, C, H, W[, D])``, in [0, 1] for the named extractors.
            real: Whether the scans are real.

        Raises:
            ValueError: If the scans differ in channels or dimension from those before, or their features have another
                shape than was declared, or are not finite.
        """
        name = "real" if real else "synthetic"
        kind = self._check_kind(images, name)
        with torch.no_grad():
            features = by_view(self.feature(images).double(), len(images))
        if not torch.isfinite(features).all():
            raise ValueError(f"feature: expected finite features, got NaN or infinity. Check the {name} scans.")
        self._add(features, name)
        self.kind = kind

    def _add(self, features: torch.Tensor, name: str) -> None:
        """Take ``(B, V, D)`` float64 features into the states of the set `name`."""
        raise NotImplementedError


class FeatureSetMetric(FeatureMetric):
    """Base of the metrics that need the features of every scan at once.

    States concatenate across processes, each of which may hold any number of scans, or none. Keywords as for
    :class:`FeatureMetric`.

    Args:
        feature: Name of an extractor, or a module.
        **kwargs: As for :class:`FeatureMetric`.

    Attributes:
        real_features: Features of the real scans, float64: flat, so that processes without scans can join.
        synthetic_features: Features of the synthetic scans.
        feature_shape: ``(2,)`` views and features of one scan; zeros until a scan was added.
    """

    real_features: list[torch.Tensor]
    synthetic_features: list[torch.Tensor]
    feature_shape: torch.Tensor

    def __init__(self, feature: str | nn.Module = "efficientnet-lite0", **kwargs: Any) -> None:
        super().__init__(feature, **kwargs)
        for name in _SETS:
            self._add_flat_state(f"{name}_features", torch.float64)
        self.add_state("feature_shape", default=torch.zeros(2, dtype=torch.int64), dist_reduce_fx="max")

    def _add(self, features: torch.Tensor, name: str) -> None:
        shape = torch.tensor(features.shape[1:], device=self.feature_shape.device)
        if bool((self.feature_shape > 0).any()) and not torch.equal(shape, self.feature_shape):
            raise ValueError(
                f"feature: expected {tuple(self.feature_shape.tolist())} views and features of {name} scans, "
                f"as of those before, got {tuple(shape.tolist())}. Compare scans of one shape, or pool the output."
            )
        self.feature_shape = shape
        getattr(self, f"{name}_features").append(features.flatten())

    def _features(self, name: str) -> torch.Tensor:
        """Features ``(N, V, D)`` of the set `name`, N 0 before any scan."""
        views, size = (max(int(value), 1) for value in self.feature_shape)
        return self._flat(f"{name}_features").view(-1, views, size)

    def _mean_over_views(
        self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *, minimum: int = 2
    ) -> torch.Tensor:
        """Mean over the views of `function` of real ``(N, D)`` and synthetic ``(M, D)`` features."""
        real, synthetic = (self._features(name) for name in _SETS)
        if min(len(real), len(synthetic)) < minimum:
            raise ValueError(
                f"{type(self).__name__}: expected at least {minimum} real and {minimum} synthetic scans, "
                f"got {(len(real), len(synthetic))}. Call update with more scans."
            )
        return torch.stack(
            [function(x, y) for x, y in zip(real.unbind(dim=1), synthetic.unbind(dim=1), strict=True)]
        ).mean(dim=0)
