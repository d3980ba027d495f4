"""One training loop for every stage: deterministic order, checkpoints that survive a kill, logs that people read."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from medgen.precision import is_out_of_memory
from medgen.provenance import explain_full_disk, write_text
from medgen.seeding import stream
from medgen.training.tensors import save_tensors
from medgen.types import BadInputError

KEPT_CHECKPOINTS = 2


class Stage(Protocol):
    """What the loop needs of a stage.

    Attributes:
        name: Name in logs and folders.
        steps: Optimizer steps in all.
        learning_rate: Peak rate; each optimizer's own `scale` entry multiplies it.
        ema_decay: Decay of the average of `averaged`.
        networks: Everything that is trained, by name.
        optimizers: By name.
        averaged: The network whose moving average is the result.
        can_save_memory: Whether `gradient_checkpointing` is there to be switched on.
    """

    name: str
    steps: int
    learning_rate: float
    ema_decay: float
    networks: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    averaged: nn.Module
    can_save_memory: bool

    def update(self, step: int, positions: list[int]) -> dict[str, torch.Tensor]:
        """Do one optimizer step on the samples at ``positions`` of the endless data order; return terms to log."""
        ...

    def validate(self, step: int, picture: Path) -> dict[str, float]:
        """Measure with the averaged weights in place, draw a picture, and keep the model."""
        ...


def sample_index(position: int, count: int, *seed: int | str) -> int:
    """Which sample stands at a position of the endless order, in which every epoch is a fresh permutation.

    Args:
        position: 0-based position over all processes and steps.
        count: Number of samples.
        *seed: Parts of the seed.

    Returns:
        Index in [0, count).
    """
    epoch, offset = divmod(position, count)
    return int(torch.randperm(count, generator=stream(*seed, "order", epoch))[offset])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rate at a step: linear warm-up over the first 5 % (at most 200 steps), then a cosine down to 2 % of the peak.

    Args:
        step: 0-based step.
        steps: Steps in all.
        peak: Highest rate.

    Returns:
        The rate.
    """
    warmup = max(1, min(200, steps // 20))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def average_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over the processes, in place, in one message.

    Done by hand instead of by a wrapped module, so that stages may call their networks in any order and part.

    Args:
        accelerator: Knows the processes.
        parameters: Whose gradients.
    """
    if accelerator.num_processes == 1:
        return
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            # A process whose samples had, say, no text has none for its encoder; all must send equal lengths.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), reduction="mean")
    for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def run_stage(
    stage: Stage,
    accelerator: Accelerator,
    folder: Path,
    *,
    batch_size: int,
    checkpoint_every: int,
    validate_every: int,
) -> None:
    """Train a stage to its end, from its last checkpoint if there is one.

    The samples, their order and all noise depend on seed and position alone, so that a checkpoint needs no random
    state, and neither a kill nor another number of processes changes what is learned.

    Args:
        stage: What is trained.
        accelerator: Device and processes.
        folder: Run folder; holds `checkpoints/`, `logs/` and `samples/`.
        batch_size: Samples a step over all processes.
        checkpoint_every: Steps between checkpoints.
        validate_every: Steps between validations.

    Raises:
        BadInputError: If the loss is no longer finite.
        MemoryError: If a batch does not fit; the message says what to change.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    parameters = [parameter for parameter in stage.averaged.parameters() if parameter.requires_grad]
    ema = EMAModel(parameters, decay=stage.ema_decay, use_ema_warmup=True, power=3 / 4, foreach=True)
    checkpoints = folder / "checkpoints" / stage.name
    start = _load(stage, ema, checkpoints)
    log_path = folder / "logs" / f"{stage.name}.jsonl"
    main = accelerator.is_main_process
    (folder / "samples").mkdir(exist_ok=True)
    writer = None
    if main:
        if start:
            print(f"stage {stage.name}: goes on after step {start} of {stage.steps}")
        _truncate_log(log_path, start)
        # Steps count from 1: what was logged at `start` is in the checkpoint and stays.
        writer = SummaryWriter(folder / "logs" / "tensorboard" / stage.name, purge_step=start + 1)
    began = time.monotonic()
    bar = tqdm(
        range(start, stage.steps), initial=start, total=stage.steps, desc=stage.name, disable=not main, smoothing=0.05
    )
    for step in bar:
        rate = learning_rate(step, stage.steps, stage.learning_rate)
        for optimizer in stage.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)
        first = step * batch_size
        try:
            terms = stage.update(step, list(range(first + rank, first + batch_size, world)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(_out_of_memory(stage, step, batch_size)) from error
        ema.step(parameters)
        done = step + 1
        values = _mean_terms(terms, accelerator)
        if not all(math.isfinite(value) for value in values.values()):
            shown = ", ".join(f"{name} {value:g}" for name, value in values.items())
            raise BadInputError(
                f"stage {stage.name}, step {step}: expected a finite loss, got {shown}. Lower learning_rate in the "
                f"plan's section {stage.name!r}, or set precision to fp32: that is another run, which needs another "
                "--output."
            )
        record: dict[str, Any] = {"step": done, "learning_rate": rate, **values}
        if done % validate_every == 0 or done == stage.steps:
            accelerator.wait_for_everyone()
            if main:
                ema.store(parameters)
                ema.copy_to(parameters)
                record |= stage.validate(done, folder / "samples" / f"{stage.name}_{done:06d}.png")
                ema.restore(parameters)
            accelerator.wait_for_everyone()
        if main and writer is not None:
            bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()}, refresh=False)
            record["seconds"] = round(time.monotonic() - began, 3)
            with explain_full_disk(log_path), log_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            for name, value in record.items():
                if name != "step":
                    writer.add_scalar(name, value, done)
            if done % checkpoint_every == 0 or done == stage.steps:
                _save(stage, ema, checkpoints, done)
    if writer is not None:
        writer.close()
    accelerator.wait_for_everyone()
    ema.copy_to(parameters)


def _out_of_memory(stage: Stage, step: int, batch_size: int) -> str:
    lower = "patch_size or batch_size" if stage.name == "autoencoder" else "size or batch_size"
    other_run = f"ower {lower} in the plan: that is another run, which needs another --output"
    if stage.can_save_memory:
        remedy = (
            f"Set gradient_checkpointing of {stage.name!r} to true in the plan and run the same command again: it goes "
            f"on from the last checkpoint, which is whole. Or l{other_run}."
        )
    else:
        remedy = f"L{other_run}. The last checkpoint of this one is whole."
    return f"stage {stage.name}, step {step}: expected memory for batches of {batch_size}, got too little. {remedy}"


def finished(folder: Path, stage: str, steps: int) -> bool:
    """Whether a stage has run to its end.

    Args:
        folder: Run folder.
        stage: Its name.
        steps: Its length.

    Returns:
        True if its last checkpoint is that of the last step.
    """
    return _latest(folder / "checkpoints" / stage) == steps


def _mean_terms(terms: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    values = {name: float(value.detach()) for name, value in terms.items()}
    if accelerator.num_processes == 1:
        return values
    rows = gather_object([values])
    return {name: sum(row[name] for row in rows) / len(rows) for name in values}


def _latest(folder: Path) -> int:
    return max((int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.safetensors")), default=0)


def _save(stage: Stage, ema: EMAModel, folder: Path, step: int) -> None:
    """One safetensors file per checkpoint, renamed into place: a kill leaves the one before."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {
        "ema": {name: value for name, value in ema.state_dict().items() if name != "shadow_params"}
    }
    for name, network in stage.networks.items():
        frozen = _frozen(network) if network is stage.averaged else set()
        own = {key: value for key, value in network.state_dict().items() if key not in frozen}
        tensors |= {f"network.{name}.{key}": value for key, value in own.items()}
    for name, optimizer in stage.optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{name}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors |= {f"ema.{index}": value for index, value in enumerate(ema.shadow_params)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:08d}.safetensors"
    save_tensors(tensors, path, {"scalars": json.dumps(scalars)})
    for old in sorted(folder.glob("step_*.safetensors"))[:-KEPT_CHECKPOINTS]:
        old.unlink()


def _frozen(network: nn.Module) -> set[str]:
    """Names of weights that are not trained, which need no checkpoint."""
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


def _load(stage: Stage, ema: EMAModel, folder: Path) -> int:
    step = _latest(folder)
    if not step:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    with safe_open(folder / f"step_{step:08d}.safetensors", framework="pt") as file:
        scalars = json.loads(file.metadata()["scalars"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for name, network in stage.networks.items():
        prefix = f"network.{name}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        frozen = _frozen(network) if network is stage.averaged else set()
        network.load_state_dict(own | {k: v for k, v in network.state_dict().items() if k in frozen})
    for name, optimizer in stage.optimizers.items():
        whole = optimizer.state_dict()
        prefix = f"optimizer.{name}."
        whole["state"] = {}
        for key, value in tensors.items():
            if key.startswith(prefix):
                index, entry = key.removeprefix(prefix).split(".", 1)
                whole["state"].setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict(whole)
        _follow_layout(optimizer)
    shadow = [tensors[f"ema.{index}"] for index in range(len(ema.shadow_params))]
    ema.load_state_dict({**scalars["ema"], "shadow_params": shadow})
    ema.to(next(stage.averaged.parameters()).device)
    return step


def _follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments the memory layout of their parameters: a fused step pairs elements as they lie in memory."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def load_averaged(network: nn.Module, folder: Path, stage: str) -> None:
    """Put the averaged weights of a stage's last checkpoint into its network.

    Args:
        network: Built as for the stage.
        folder: Run folder.
        stage: Its name.
    """
    checkpoints = folder / "checkpoints" / stage
    with (
        safe_open(checkpoints / f"step_{_latest(checkpoints):08d}.safetensors", framework="pt") as file,
        torch.no_grad(),
    ):
        for index, parameter in enumerate(network.parameters()):
            parameter.copy_(file.get_tensor(f"ema.{index}"))


def _truncate_log(path: Path, step: int) -> None:
    """Drop what was logged after the checkpoint, so that a resumed run's log reads as one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError):
                continue  # the line that a kill cut short
    write_text(path, "".join(line + "\n" for line in kept))
