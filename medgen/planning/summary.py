"""Whether a plan fits a data set, and what it would cost on this machine."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from medgen.data.dataset import RGB, Dataset, split_cases
from medgen.planning.cost import (
    BYTES_PER_PARAMETER,
    TRAINING_PASSES,
    build_network,
    cache_bytes,
    example_inputs,
    stage_cost,
    step_operations,
)
from medgen.planning.machine import read_machine, world_size
from medgen.planning.plan import STAGES, AutoencoderPlan, Plan, StageName, by_axis, network_arguments
from medgen.precision import autocast, memory_format, resolve_device, resolve_precision
from medgen.types import BadInputError

# What `medgen.data` calls channels and classes that the folder does not name.
_GIVEN_BY_READER = re.compile(r"image|(channel|class)_\d+")


def check_plan(plan: Plan, dataset: Dataset) -> None:
    """Make sure that a plan, which may come from another folder or an editor, fits a data set.

    Args:
        plan: The plan.
        dataset: The scans that it is to be followed on.

    Raises:
        BadInputError: If dimension, channels or classes differ in number or name, or the networks cannot be built.
    """
    if plan.spatial_dims != dataset.spatial_dims:
        raise BadInputError(
            f"{dataset.root}: expected {plan.spatial_dims}D scans as in the plan, got {dataset.spatial_dims}D ones. "
            "Choose another plan, or leave it out to have one made."
        )
    # A folder without dataset.json names no channels: its one channel is called after the scanner.
    declared = dataset.channel_names if dataset.format in ("msd", "nnunet") or dataset.channel_names == RGB else {}
    if len(plan.channel_names) != len(dataset.channel_names) or _renamed(plan.channel_names, declared):
        named = [", ".join(names.values()) for names in (plan.channel_names, dataset.channel_names)]
        raise BadInputError(
            f"{dataset.root}: expected {len(plan.channel_names)} channel(s) ({named[0]}) as in the plan, got "
            f"{len(dataset.channel_names)} ({named[1]}). Correct channel_names in the plan, or the data set."
        )
    dataset = learned_from(plan, dataset)
    renamed = _renamed(plan.class_names, dataset.class_names)
    if renamed:
        value, (expected, got) = next(iter(renamed.items()))
        raise BadInputError(
            f"{dataset.root}: expected class {value} to be {expected!r} as in the plan, got {got!r}. "
            "Correct class_names in the plan, or the data set."
        )
    unknown = {value: name for value, name in dataset.class_names.items() if value not in plan.class_names}
    if unknown:
        raise BadInputError(
            f"{dataset.root}: expected the classes {plan.class_names} of the plan, got {unknown} too. "
            "Add them to class_names in the plan."
        )
    for stage in STAGES:
        if getattr(plan, stage) is None or plan.has_base:
            continue
        try:
            stage_cost(plan, stage)
        except (ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BadInputError(f"{stage}: expected a network that can be built, got: {reason}. Change it.") from error


def learned_from(plan: Plan, dataset: Dataset) -> Dataset:
    """The scans that a plan has a use for: all of them, or those with a label map where nothing else steers.

    A model that is tuned to a folder without any label map learns how its scans look. Where it is tuned by other
    conditions than label maps, those of the scans are passed over as if there were none.

    Args:
        plan: The plan.
        dataset: The scans.

    Returns:
        The data set with these cases.
    """
    conditions = plan.read_conditions
    if plan.tuning is not None and not conditions.mask:
        return without_labels(dataset)
    labels = conditions.needs_labels
    if plan.tuning is not None and all(case.label is None for case in dataset.cases):
        labels = False
    return dataclasses.replace(dataset, cases=[case for case in dataset.cases if case.label is not None or not labels])


def without_labels(dataset: Dataset) -> Dataset:
    """The scans as if they had no label maps.

    Args:
        dataset: The scans.

    Returns:
        The data set, with the background as its only class.
    """
    cases = [dataclasses.replace(case, label=None) for case in dataset.cases]
    return dataclasses.replace(dataset, cases=cases, class_names={0: dataset.class_names[0]})


def _renamed(planned: Mapping[int, str], found: Mapping[int, str]) -> dict[int, tuple[str, str]]:
    """Names that differ, where the folder gives names at all and the reader did not number what it found."""
    pairs = {key: (planned[key], name) for key, name in found.items() if key in planned}
    return {
        key: (mine, other)
        for key, (mine, other) in pairs.items()
        if not _GIVEN_BY_READER.fullmatch(other) and _plain(mine) != _plain(other)
    }


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def summarize_plan(plan: Plan, dataset: Dataset, *, device: str = "auto") -> str:
    """What a plan would do, and what it would cost.

    Args:
        plan: The plan.
        dataset: The scans that it is to be followed on.
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        Text of several lines: data, choices, and for each stage parameters, memory and time.

    Raises:
        BadInputError: If the plan does not fit the data set, or the device is not there.
    """
    check_plan(plan, dataset)
    machine = read_machine(device)
    train, val = split_cases(learned_from(plan, dataset))
    left_out = len(dataset.cases) - len(train) - len(val)
    grid = f"{by_axis(plan.size)} voxels" + (f" of {by_axis(plan.spacing)} mm" if plan.spacing else "")
    normalization = plan.normalization
    bounds = "" if normalization.method == "zscore" else f" {normalization.low:g} to {normalization.high:g}"
    lines = [
        f"plan       {plan.name}: {plan.spatial_dims}D {plan.modality or 'scans'}, "
        f"channels {', '.join(plan.channel_names.values())}; classes {', '.join(plan.class_names.values())}",
        f"data       {dataset.root}: {len(train)} scans for training, {len(val)} for validation"
        + (f", {left_out} left out (no label, or another split)" if left_out else ""),
        f"steered by {plan.read_conditions.describe([*train, *val])}",
        f"grid       {grid}; compressed {plan.compression}x per axis",
        f"intensity  by {normalization.method}{bounds}; synthetic scans as {plan.image_dtype}",
        f"machine    {machine.name}, {machine.cores} CPU cores, {machine.memory_gb:.0f} GB, "
        f"{resolve_precision(plan.precision, machine.device)}",
        *(f"note       {note}" for note in dict.fromkeys([*plan.fingerprint.get("notes", []), *dataset.notes])),
        "",
    ]
    disk = (
        f"Disk: {_size(cache_bytes(plan, train, val))} of scans and latents, made ready for training once, in the "
        "subfolder cache/ of the run; it may be deleted afterwards."
    )
    if plan.has_base:
        pace = f"{plan.denoiser.steps} steps of {plan.denoiser.batch_size} samples"
        return "\n".join([*lines, f"{pace}; what a step takes depends on the base: --max_steps 20 shows it.", disk])
    lines.append(f"{'stage':<12}{'parameters':>12}{'steps x batch':>16}{'memory':>10}{'time':>12}")
    seconds, memory = 0.0, 0.0
    for stage in STAGES:
        own = getattr(plan, stage)
        if own is None:
            continue
        cost, world = stage_cost(plan, stage), world_size()
        need = 0.7 + (BYTES_PER_PARAMETER * cost.parameters + cost.activation_bytes * own.batch_size / world) / 1e9
        work = own.steps * step_operations(plan, stage)
        took = work / (_measured_throughput(plan, stage, device) * (world if machine.device != "cpu" else 1))
        seconds, memory = seconds + took, max(memory, need)
        steps = f"{own.steps} x {own.batch_size}"
        lines.append(f"{stage:<12}{cost.parameters / 1e6:>10.2f} M{steps:>16}{need:>7.1f} GB{_duration(took):>12}")
    lines += [
        f"{'all':<12}{'':>28}{memory:>7.1f} GB{_duration(seconds):>12}",
        "",
        disk,
        "Time: operations of the networks, at the speed of two training steps that were just timed on this machine; "
        "reading, encoding and validation come on top.",
        "Memory: weights, optimizer and what the backward pass keeps, in float32; bfloat16 needs less.",
    ]
    if memory > machine.memory_gb:
        lines.append(f"This does not fit into {machine.memory_gb:.0f} GB: lower batch_size, or size, in the plan.")
    return "\n".join(lines)


def _measured_throughput(plan: Plan, stage: StageName, device: str) -> float:
    """Operations per second of a real training step, on a piece of a scan that takes about a second."""
    chosen, own = resolve_device(device), getattr(plan, stage)
    size = list(own.patch_size if isinstance(own, AutoencoderPlan) else plan.size)
    unit = plan.compression if stage != "label" else plan.label_stride
    while stage_cost(plan, stage, tuple(size)).operations > 2e10 and max(size) > 8 * unit:
        axis = size.index(max(size))
        size[axis] = max(4 * unit, size[axis] // 2 // (4 * unit) * 4 * unit)
    arguments = network_arguments(plan, stage)
    precision = resolve_precision(plan.precision, chosen)
    operations = stage_cost(plan, stage, tuple(size)).operations
    batch = int(np.clip(2e10 // operations, 1, own.batch_size))
    with torch.random.fork_rng(devices=[]), torch.device(chosen):
        network: Any = build_network(stage, arguments)
        network.to(memory_format=memory_format(plan.spatial_dims))
        inputs = example_inputs(stage, arguments, tuple(size), batch)
    marks = [time.perf_counter()]
    for _ in range(2):
        with autocast(chosen, precision):
            output = network(*inputs)
        loss = (output[0] if isinstance(output, tuple) else output).float().square().mean()
        loss.backward()
        if chosen.type == "cuda":
            torch.cuda.synchronize(chosen)
        marks.append(time.perf_counter())
    # The first step also prepares kernels.
    fastest = min(late - early for early, late in pairwise(marks))
    return TRAINING_PASSES * operations * batch / fastest


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{max(1, minutes)} min"
