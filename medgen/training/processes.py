"""The device or devices of a run, and the processes that share its batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator

from medgen.planning import Plan, StageName
from medgen.planning.machine import world_size
from medgen.precision import resolve_device
from medgen.types import BadInputError


def choose_accelerator(device: str) -> Accelerator:
    """The device or devices to train on.

    Args:
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        What knows device and processes.

    Raises:
        BadInputError: If the device is not there, or is not one that Accelerate can be told to take.
    """
    chosen, processes = resolve_device(device), world_size()
    if chosen.index is not None and processes > 1:
        raise BadInputError(
            f"device: expected {chosen.type!r} or 'auto' for {processes} processes, which take one device each, got "
            f"{device!r}. Choose the devices with CUDA_VISIBLE_DEVICES."
        )
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # the one that Accelerate then takes
    accelerator = Accelerator(cpu=chosen.type == "cpu")
    if accelerator.device.type != chosen.type:
        raise BadInputError(
            f"device: expected {accelerator.device.type!r}, which Accelerate takes here, got {device!r}. "
            "Give that, or start a new process."
        )
    return accelerator


def check_batches(plan: Plan, stages: Sequence[StageName]) -> None:
    """Refuse batches that the processes cannot share.

    Args:
        plan: The plan.
        stages: Which of its stages run.

    Raises:
        BadInputError: If a stage's batch size is no multiple of the number of processes.
    """
    processes = world_size()
    for stage in stages:
        own = getattr(plan, stage)
        if own is not None and own.batch_size % processes:
            fitting = -(-own.batch_size // processes) * processes
            raise BadInputError(
                f"{stage}.batch_size: expected a number that {processes} processes can share, got {own.batch_size}. "
                f"Set it to {fitting} in the plan, or start another number of processes."
            )
