"""Noise of detectors and of coherent waves."""

from __future__ import annotations

import numpy as np
import torch
from monai.transforms import RandGaussianNoise, RandRicianNoise

from medgen.transforms.physics.optics import smooth

# Variance of the electronics of a detector, in photons squared (Zeng et al., IEEE TNS 62(5), 2015, measured about 11).
_ELECTRONIC_VARIANCE = 11.0
# A radiograph spans thick and thin parts whose transmission differs by exp(3), about 20.
_RADIOGRAPH_DEPTH = 3.0
# Photons per pixel of a radiograph, where nothing attenuates.
_RADIOGRAPH_PHOTONS = 5_000.0


def rician(signal: torch.Tensor, std: float, rng: np.random.RandomState) -> torch.Tensor:
    """Magnitude of complex noise (Gudbjartsson & Patz, MRM 1995): sqrt((x + n1)^2 + n2^2); MONAI's RandRicianNoise.

    Args:
        signal: ``(C, H, W[, D])``, 0 in air.
        std: Standard deviation of each part, in signal units.
        rng: Source of the draws.

    Returns:
        ``(C, H, W[, D])``; in air its mean is std sqrt(pi / 2).
    """
    return RandRicianNoise(prob=1.0, std=std, sample_std=False).set_random_state(state=rng)(signal)


def gaussian(signal: torch.Tensor, std: float, rng: np.random.RandomState) -> torch.Tensor:
    """Noise of a camera's electronics (MONAI's RandGaussianNoise); what falls below zero is cut off.

    Args:
        signal: ``(C, H, W[, D])``.
        std: Standard deviation in signal units.
        rng: Source of the draws.

    Returns:
        ``(C, H, W[, D])``, at least 0.
    """
    return RandGaussianNoise(prob=1.0, std=std, sample_std=False).set_random_state(state=rng)(signal).clamp(min=0)


def shot(signal: torch.Tensor, photons: float, rng: np.random.RandomState) -> torch.Tensor:
    """Counting of emitted light: Poisson(N x) / N.

    Args:
        signal: ``(C, H, W[, D])``.
        photons: N, photons per voxel at signal 1.
        rng: Source of the draws.

    Returns:
        ``(C, H, W[, D])``; its variance is x / N.
    """
    counts = rng.poisson(signal.cpu().numpy().astype(np.float64) * photons)
    return torch.from_numpy(counts / photons).to(signal)


def speckle(signal: torch.Tensor, relative_std: float, rng: np.random.RandomState) -> torch.Tensor:
    """Interference of echoes: x (1 + n), where n is normal noise with grains about two voxels wide.

    Args:
        signal: ``(C, H, W[, D])``.
        relative_std: Standard deviation of n.
        rng: Source of the draws.

    Returns:
        ``(C, H, W[, D])``, at least 0.
    """
    field = torch.from_numpy(rng.normal(size=signal.shape)).to(signal)
    field = smooth(field, (0.7,) * (signal.ndim - 1))
    return (signal * (1 + relative_std * field / field.std())).clamp(min=0)


def thin(attenuation: torch.Tensor, photons: float, dose: float, rng: np.random.RandomState) -> torch.Tensor:
    """What a lower dose adds to measured line integrals p.

    Of the N exp(-p) photons that were counted each is kept with probability f. That leaves Poisson counts at the dose
    f, whose logarithm has the further variance (1 - f) / (f N exp(-p)) (Yu et al., J. Comput. Assist. Tomogr. 2012);
    the detector adds its own noise.

    Args:
        attenuation: p, of any shape; the logarithm of the sent over the counted photons.
        photons: N, photons that were sent to each detector element at full dose.
        dose: f in (0, 1], the part of the dose that is left.
        rng: Source of the draws.

    Returns:
        Change of p, in the same shape; 0 at full dose.
    """
    counted = np.rint(photons * np.exp(-attenuation.cpu().numpy().astype(np.float64)))
    kept = rng.binomial(counted.astype(np.int64), dose).astype(np.float64)
    kept += rng.normal(scale=np.sqrt(_ELECTRONIC_VARIANCE * (1 - dose**2)), size=kept.shape)
    # Where no photon arrives the logarithm ends: scanners put one in.
    change = np.log(np.maximum(counted, 1)) - np.log(np.maximum(kept, 1) / dose)
    return torch.from_numpy(change).to(attenuation)


def radiograph_low_dose(signal: torch.Tensor, dose: float, rng: np.random.RandomState) -> torch.Tensor:
    """A radiograph at a lower dose: Poisson-Gauss noise of the counts, strongest in the dense parts.

    Args:
        signal: ``(C, H, W)`` or, for several views, ``(C, H, W, views)``; bright where the body attenuates most.
        dose: Part of the dose that is left, in (0, 1].
        rng: Source of the draws.

    Returns:
        ``(C, H, W[, views])``.
    """
    return signal + thin(signal * _RADIOGRAPH_DEPTH, _RADIOGRAPH_PHOTONS, dose, rng) / _RADIOGRAPH_DEPTH
