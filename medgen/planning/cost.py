"""What a plan costs: each stage, from a network without numbers in it, so that nothing is computed; and the disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medgen.data.case import Case
from medgen.data.geometry import place
from medgen.data.io import read_grid
from medgen.planning.plan import AutoencoderPlan, Plan, StageName, network_arguments
from medgen.types import BadInputError, Shape

# Weights, gradient, two moments of AdamW and the moving average, in float32.
BYTES_PER_PARAMETER = 20
TRAINING_PASSES = 3  # the backward pass costs about two forward passes


class Cost(NamedTuple):
    """Cost of a network.

    Attributes:
        parameters: Trainable numbers.
        operations: Floating point operations of one forward pass of one sample.
        activation_bytes: Kept for the backward pass of one sample, with room for work space.
    """

    parameters: int
    operations: int
    activation_bytes: float


@cache
def _measure_cost(key: tuple[Any, ...]) -> Cost:
    stage, size, text = key
    arguments = json.loads(text)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    # Fake tensors have shapes and types like real ones, but no numbers.
    with FakeTensorMode(), torch.enable_grad():
        network = build_network(stage, arguments)
        inputs = example_inputs(stage, arguments, size, 1)
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, saving:
            network(*inputs)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    stored = sum(storage.nbytes() for storage in kept.values())
    return Cost(parameters, counter.get_total_flops(), 1.3 * stored)


def stage_cost(plan: Plan, stage: StageName, size: Shape | None = None) -> Cost:
    """Cost of the network of a stage.

    Args:
        plan: The plan.
        stage: `autoencoder`, `denoiser` or `label`.
        size: Voxels per axis of a sample; None takes what the stage trains on.

    Returns:
        The cost for one sample.

    Raises:
        ValueError: If the network cannot be built, or the plan leaves the stage out.
        RuntimeError: If the network cannot take such a sample.
    """
    own = getattr(plan, stage)
    size = size or (own.patch_size if isinstance(own, AutoencoderPlan) else plan.size)
    cost = _measure_cost((stage, tuple(size), json.dumps(network_arguments(plan, stage))))
    if getattr(own, "gradient_checkpointing", False):
        cost = cost._replace(operations=cost.operations * 4 // 3, activation_bytes=cost.activation_bytes / 4)
    return cost


def step_operations(plan: Plan, stage: StageName) -> float:
    """Floating point operations of one training step of a stage.

    Args:
        plan: The plan.
        stage: `autoencoder`, `denoiser` or `label`.

    Returns:
        Operations of all processes together.
    """
    return float(TRAINING_PASSES * stage_cost(plan, stage).operations * getattr(plan, stage).batch_size)


def cache_bytes(plan: Plan, train: Iterable[Case], val: Iterable[Case]) -> int:
    """Size of the cache of a run: its scans on the model's grid, and the versions of them that the denoisers see.

    Args:
        plan: The plan.
        train: Scans for training; of each only the header is read. Those with a damaged one do not count.
        val: Scans for validation, of which one version is kept.

    Returns:
        Bytes, without the headers of the files.
    """
    pixels = len(plan.channel_names)
    # Numbers per voxel of a scan: float16 is 2 bytes; label and field of view take 1 byte each.
    latents = plan.autoencoder.latent_channels / plan.compression**plan.spatial_dims if plan.autoencoder else pixels
    versions = [(plan.denoiser.variants, latents)]
    if plan.label is not None:
        versions.append((plan.label.variants, len(plan.class_names) / plan.label_stride**plan.spatial_dims))
    total = 0.0
    for cases, is_train in ((train, True), (val, False)):
        for case in cases:
            try:
                grid = read_grid(case.images[0])
            except BadInputError:
                continue
            shape = place(
                grid, spacing=plan.spacing, orientation=plan.orientation, min_size=plan.size, divisor=plan.divisor
            ).shape
            crop = prod(min(have, most) for have, most in zip(shape, plan.size, strict=True))
            total += prod(shape) * (2 * pixels + 2)
            total += sum((count if is_train else 1) * crop * (2 * numbers + 2) for count, numbers in versions)
            total += (versions[0][0] if is_train else 1) * crop * (plan.read_conditions.edge is not None)
    return round(total)


def build_network(stage: StageName, arguments: Mapping[str, Any]) -> Any:
    """The network of a stage, untrained.

    Args:
        stage: `autoencoder`, `denoiser` or `label`.
        arguments: What :func:`medgen.planning.network_arguments` gives.

    Returns:
        The network.
    """
    from medgen.networks import Autoencoder, Denoiser  # heavy to import, and reading a plan does not need it

    return Autoencoder(**arguments) if stage == "autoencoder" else Denoiser(**arguments)


def example_inputs(stage: StageName, arguments: Mapping[str, Any], size: Shape, batch: int) -> tuple[Any, ...]:
    """Noise in the shape of a training batch.

    Args:
        stage: `autoencoder`, `denoiser` or `label`.
        arguments: What :func:`medgen.planning.network_arguments` gives.
        size: Voxels per axis of a scan.
        batch: Samples.

    Returns:
        Positional inputs of the network: ``image (B, C, *size)``, or ``x (B, c, *size / stride)``, ``t (B,)`` and its
        conditions.
    """
    if stage == "autoencoder":
        return (torch.randn(batch, arguments["in_channels"], *size),)
    stride = arguments["mask_stride"]
    x = torch.randn(batch, arguments["in_channels"], *(n // stride for n in size))
    with torch.device("meta"):
        shapes = build_network(stage, arguments).condition_shapes(x.shape[2:])
    return x, torch.full((batch,), 500.0), {name: torch.randn(batch, *shape) for name, shape in shapes.items()}
