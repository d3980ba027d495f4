"""Feature extractors: what every one of them offers, how one is named, and how a user's own module becomes one."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import nn

from medgen.types import BadInputError

CLIP = "clip-vit-large-patch14-336"
# One module per extractor is imported only when it is asked for: MONAI's networks take seconds to import.
NAMES = ("efficientnet-lite0", "inception", "radimagenet", "medicalnet")


@runtime_checkable
class FeatureExtractor(Protocol):
    """What maps scans to features and says what it is.

    An extractor is called with scans ``(B, C, H, W[, D])`` and returns features ``(B, V, D)``.
    """

    @property
    def name(self) -> str:
        """Name, for the record of a result."""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weight file, or of the parameters where there is no file."""

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to a scan before and after the network."""

    @property
    def num_features(self) -> int | None:
        """D; None as long as it is not known."""

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the V vectors of a scan."""

    def __call__(self, image: torch.Tensor, /) -> torch.Tensor:
        """Features ``(B, V, D)`` of scans ``(B, C, H, W[, D])``."""


def stamp(extractor: FeatureExtractor) -> dict[str, Any]:
    """What has to be recorded beside a score, because scores compare only where all of it is equal.

    Args:
        extractor: Any extractor.

    Returns:
        Name, weight hash, number of features, views and preprocessing, as plain types.
    """
    return {
        "name": extractor.name,
        "weights_sha256": extractor.weights_hash,
        "num_features": extractor.num_features,
        "views": list(extractor.views),
        "preprocessing": dict(extractor.preprocessing),
    }


def published_name(distance: str, extractor: FeatureExtractor) -> str:
    """Name under which a distance may be reported: FID and KID are those of Inception features only, CMMD of CLIP.

    medgen has no CLIP extractor; a user's own that is named ``clip-vit-large-patch14-336``, the network of the paper,
    is taken at its word.

    Args:
        distance: Name of the distance, such as ``"frechet"``.
        extractor: Extractor of its features.

    Returns:
        ``"FID"``, ``"KID"``, ``"CMMD"``, or a name that says which features it rests on.
    """
    # The protocol of FID is 2D color pictures; slices of a volume are something else, even with its network.
    known = {"inception": {"frechet": "FID", "kernel": "KID"}, CLIP: {"gaussian_kernel": "CMMD"}}
    if extractor.views == ("image",) and distance in known.get(extractor.name, {}):
        return known[extractor.name][distance]
    words = {
        "frechet": "Fréchet distance",
        "kernel": "Kernel distance",
        "gaussian_kernel": "Gaussian kernel distance",
        "vendi": "Vendi score",
    }
    return f"{words.get(distance, distance.replace('_', ' ').capitalize())} ({extractor.name})"


def build_extractor(
    name: str,
    *,
    weights: str | Path | None = None,
    spatial_dims: Literal[2, 3] = 2,
    in_channels: int = 1,
    **settings: Any,
) -> nn.Module:
    """Extractor by name.

    Args:
        name: ``"efficientnet-lite0"`` (installed with medgen), ``"inception"`` (FID), ``"radimagenet"`` (ResNet50
            trained on radiology) or ``"medicalnet"`` (3D ResNet trained on volumes); the last three need `weights`.
        weights: Local weight file; nothing is ever downloaded.
        spatial_dims: 2 or 3.
        in_channels: Channels of the scans.
        **settings: Further arguments of the extractor's class.

    Returns:
        A module that is a :class:`FeatureExtractor`.

    Raises:
        BadInputError: If the name is not known, or weights are missing or not those of the network.
    """
    if name not in NAMES:
        raise BadInputError(f"feature: expected one of {', '.join(NAMES)} or a torch module, got {name!r}.")
    settings |= {"spatial_dims": spatial_dims, "in_channels": in_channels}
    if name == "efficientnet-lite0":
        from medgen.metrics.efficientnet_features import EfficientNetLite0Features

        if weights is not None:
            raise BadInputError(
                f"{name}: expected no weights, as its own are installed, got {weights}. Leave them out."
            )
        return EfficientNetLite0Features(**settings)
    if weights is None:
        raise BadInputError(
            f"{name}: expected a local weight file, got none. Pass weights=PATH; medgen downloads nothing."
        )
    if name == "inception":
        from medgen.metrics.inception import InceptionFeatures

        return InceptionFeatures(weights, **settings)
    if name == "radimagenet":
        from medgen.metrics.radimagenet import RadImageNetFeatures

        return RadImageNetFeatures(weights, **settings)
    from medgen.metrics.medicalnet import MedicalNetFeatures

    return MedicalNetFeatures(weights, **settings)


def sha256_state_dict(module: nn.Module) -> str:
    """Digest of the parameters and buffers of a module: their names, types, shapes and values.

    Args:
        module: Any module.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FixedFeatures(nn.Module):
    """Base of medgen's own extractors: fixed weights, made for scans of one dimension and number of channels.

    Args:
        spatial_dims: 2 or 3.
        in_channels: Channels of the scans.
    """

    def __init__(self, *, spatial_dims: Literal[2, 3], in_channels: int) -> None:
        super().__init__()
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims: expected 2 or 3, got {spatial_dims}.")
        if in_channels < 1:
            raise ValueError(f"in_channels: expected at least 1, got {in_channels}.")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, whatever the training loop around the extractor asks for.

        Args:
            mode: Ignored.

        Returns:
            This extractor.
        """
        return super().train(False)

    def _check_scans(self, image: torch.Tensor) -> None:
        """Refuse scans of another dimension or number of channels, or that are not finite."""
        if image.ndim != self.spatial_dims + 2 or image.shape[1] != self.in_channels:
            shape = ", ".join(("B", str(self.in_channels), "H", "W", "D")[: self.spatial_dims + 2])
            remedy = "Add the axes of batch and channels."
            if image.ndim in (4, 5):
                remedy = f"For such scans, pass spatial_dims={image.ndim - 2} and in_channels={image.shape[1]}."
            raise ValueError(f"image: expected shape ({shape}), got {tuple(image.shape)}. {remedy}")
        bad = int((~torch.isfinite(image)).flatten(1).any(dim=1).sum())
        if bad:
            raise ValueError(
                f"image: expected finite intensities, got NaN or infinity in {bad} of {len(image)} scans. "
                "Leave these out, or mend them."
            )


class ModuleFeatures(nn.Module):
    """Extractor from a user's module: run in eval mode and without gradient, with a name and a weight hash.

    The module keeps the mode that the user left it in, so that it may be a part of the network in training.

    Args:
        module: Maps scans ``(B, C, H, W[, D])`` to ``(B, D)`` or ``(B, V, D)``.
        name: Name for the record of a result. None: the name of the module's class.
        preprocessing: What the module does to a scan, for the record of a result.
        num_features: ``D``. None: the module's ``num_features`` if it has one, else None until the first scans.
        views: Names of the views. None: the module's ``views`` if it has them, else one view ``image``.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        preprocessing: dict[str, Any] | None = None,
        num_features: int | None = None,
        views: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.name = name or str(getattr(module, "name", type(module).__name__))
        declared = getattr(module, "preprocessing", None)
        self.preprocessing: dict[str, Any] = preprocessing or (declared if isinstance(declared, dict) else {})
        size = num_features or getattr(module, "num_features", None)
        self.num_features = size if isinstance(size, int) else None
        declared_views: Any = getattr(module, "views", ("image",))
        self.views: tuple[str, ...] = views or tuple(declared_views)

    @property
    def weights_hash(self) -> str:
        """SHA-256 over the state dict as it is now."""
        return sha256_state_dict(self.module)

    @torch.no_grad()
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Extract features.

        Args:
            image: ``(B, C, H, W[, D])``, as the module wants it.

        Returns:
            ``(B, V, D)``.

        Raises:
            ValueError: If the module gives another shape.
        """
        training = [part for part in self.module.modules() if part.training]
        self.module.eval()
        try:
            features: torch.Tensor = self.module(image)
        finally:
            for part in training:
                part.training = True
        features = by_view(features, len(image))
        self.num_features = self.num_features or features.shape[2]
        return features


def by_view(features: torch.Tensor, count: int) -> torch.Tensor:
    """Output of a module as one vector per scan and view.

    Args:
        features: ``(B, D)``, or ``(B, V, D)`` already.
        count: B.

    Returns:
        ``(B, V, D)``.

    Raises:
        ValueError: If the output has another shape.
    """
    if features.ndim == 2:
        features = features[:, None]
    if features.ndim != 3 or len(features) != count:
        raise ValueError(
            f"feature: expected output (B, D) or (B, V, D) for {count} scans, got {tuple(features.shape)}. "
            "Pool the output of the module."
        )
    return features


def wrap_module(module: nn.Module, *, num_features: int | None = None, num_views: int | None = None) -> nn.Module:
    """A module as an extractor; one that is an extractor already stays as it is.

    Args:
        module: Extractor, or any module that maps scans to features.
        num_features: ``D`` of a module without an attribute ``num_features``.
        num_views: ``V`` of a module without an attribute ``views``.

    Returns:
        A module that is a :class:`FeatureExtractor`.

    Raises:
        TypeError: If it is no module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"feature: expected one of {', '.join(NAMES)} or a torch module, got {module!r}. "
            "For the 2048 features of FID, pass feature='inception' and weights=PATH."
        )
    if isinstance(module, FeatureExtractor):
        return module
    views = tuple(f"view {index}" for index in range(num_views)) if num_views and num_views > 1 else None
    return ModuleFeatures(module, num_features=num_features, views=views)
