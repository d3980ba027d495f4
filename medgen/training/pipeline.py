"""`medgen train`: plan, cache, and run the stages one after the other."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator

from medgen.data.dataset import Dataset, read_dataset, split_cases
from medgen.data.intensity import IntensityMap
from medgen.generator import Generator, GeneratorConfig
from medgen.networks import Autoencoder, Denoiser
from medgen.planning import (
    DenoiserPlan,
    Plan,
    check_plan,
    make_plan,
    network_arguments,
    read_plan,
    summarize_plan,
    write_plan,
)
from medgen.precision import autocast, resolve_device, resolve_precision
from medgen.provenance import write_text
from medgen.seeding import derive_seed
from medgen.training.autoencoder import AutoencoderStage
from medgen.training.cache import CachedScan, cache_scans, cache_variants, crop_to, key_of, read_scan
from medgen.training.card import write_card
from medgen.training.denoiser import DenoiserStage
from medgen.training.loop import finished, run_stage
from medgen.training.preview import preview_images, preview_labels
from medgen.types import BadInputError

StageName = Literal["autoencoder", "denoiser", "label"]
Network = TypeVar("Network", Autoencoder, Denoiser)


def train(
    data: Path,
    output: Path,
    *,
    plan: Plan | None = None,
    stages: Sequence[StageName] = ("autoencoder", "denoiser", "label"),
    max_steps: int | None = None,
    dry_run: bool = False,
    skip_bad: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Train a generator on a folder of labelled scans.

    Without a plan it makes one from what it finds in the folder and writes it to `plan.yaml` in the output folder; edit
    that file and pass it back with `--config` to change anything. A run that was stopped, even killed, goes on from its
    last checkpoint when it is started again with the same arguments.

    Args:
        data: Folder of scans: MSD or nnU-Net `dataset.json`, `metadata.csv|jsonl`, or `images/` and `labels/`.
        output: Folder of the run; at the end it is the model.
        plan: What to train and how; None plans from the data.
        stages: Which stages to run; what a stage needs from an earlier one must be there.
        max_steps: Cap on the steps of each stage, for a quick trial.
        dry_run: Show plan, parameters, memory and time, and stop.
        skip_bad: List unusable cases in `rejected.jsonl` and go on, instead of stopping at the first.
        seed: Root of every random draw.
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        The output folder.

    Raises:
        BadInputError: If the data or the plan cannot be used, or the output folder holds another run.
    """
    dataset = read_dataset(data)
    plan = plan or _earlier_plan(output) or make_plan(dataset, device=device)
    check_plan(plan, dataset)
    if max_steps is not None:
        plan = _cap(plan, max_steps)
    if dry_run:
        print(summarize_plan(plan, dataset, device=device))
        return Path(output)
    accelerator = Accelerator(cpu=resolve_device(device).type == "cpu")
    run = _Run(dataset, plan, Path(output), accelerator, skip_bad=skip_bad, seed=seed)
    if "autoencoder" in stages and plan.autoencoder is not None:
        run.train_autoencoder()
    if "denoiser" in stages:
        run.train_denoiser()
    if "label" in stages and plan.label is not None:
        run.train_label()
    return Path(output)


def _cap(plan: Plan, steps: int) -> Plan:
    """The plan with no stage longer than ``steps``."""
    short = {}
    for name in ("autoencoder", "denoiser", "label"):
        stage = getattr(plan, name)
        if stage is not None:
            short[name] = dataclasses.replace(stage, steps=min(stage.steps, steps))
    if plan.autoencoder is not None:
        start = min(plan.autoencoder.adversarial_start, steps // 2)
        short["autoencoder"] = dataclasses.replace(short["autoencoder"], adversarial_start=start)
    return dataclasses.replace(plan, **short)


def _earlier_plan(output: Path) -> Plan | None:
    path = Path(output) / "plan.yaml"
    return read_plan(path) if path.exists() else None


class _Run:
    """State of one training run: its plan, its cached scans and the bundle that grows."""

    def __init__(
        self, dataset: Dataset, plan: Plan, folder: Path, accelerator: Accelerator, *, skip_bad: bool, seed: int
    ) -> None:
        self.dataset, self.plan, self.folder, self.accelerator, self.seed = dataset, plan, folder, accelerator, seed
        self.precision = resolve_precision(plan.precision, accelerator.device)
        if accelerator.is_main_process:
            print(f"training on {accelerator.device} in {self.precision}, {accelerator.num_processes} process(es)")
            self._claim_folder()
        accelerator.wait_for_everyone()
        train_cases, val_cases = (
            [case for case in cases if case.label is not None] for cases in split_cases(dataset, seed=seed)
        )
        unlabelled = sum(case.label is None for case in dataset.cases)
        if unlabelled and accelerator.is_main_process:
            print(f"{unlabelled} cases without a label are not used")
        with accelerator.main_process_first():
            common: dict[str, Any] = {"divisor": self._divisor(), "skip_bad": skip_bad}
            self.train = cache_scans(dataset, train_cases, plan, folder, title="training", **common)
            self.val = cache_scans(dataset, val_cases, plan, folder, title="validation", **common)
        if not self.train:
            raise BadInputError(f"{dataset.root}: expected at least one training case with image and label, got none.")
        if accelerator.is_main_process and dataset.rejected:
            rows = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in dataset.rejected)
            write_text(folder / "rejected.jsonl", rows)
            print(f"{len(dataset.rejected)} unusable cases skipped; see {folder / 'rejected.jsonl'}")

    def _divisor(self) -> int:
        compression = 2 ** (len(self.plan.autoencoder.channels) - 1) if self.plan.autoencoder else 1
        stride = self.plan.label_stride if self.plan.label else 1
        return max(compression, stride)

    def _claim_folder(self) -> None:
        path = self.folder / "plan.yaml"
        if path.exists():
            if key_of(read_plan(path)) != key_of(self.plan):
                raise BadInputError(
                    f"{self.folder}: expected an empty folder or this very run, got a run with another plan ({path}). "
                    "Choose another output folder, or pass that plan with --config to go on."
                )
            return
        if self.folder.exists() and any(self.folder.iterdir()):
            raise BadInputError(
                f"{self.folder}: expected an empty or new folder, got one with other files. Choose another --output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_plan(self.plan, path)

    def _build(self, kind: type[Network], stage: StageName) -> Network:
        """A network whose first weights depend on the seed and its stage alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, stage, "weights"))
            return kind(**network_arguments(self.plan, stage))

    def _loop(self, stage: AutoencoderStage | DenoiserStage, batch_size: int) -> None:
        run_stage(
            stage,
            self.accelerator,
            self.folder,
            batch_size=batch_size,
            checkpoint_every=self.plan.checkpoint_every,
            validate_every=self.plan.validate_every,
        )

    def train_autoencoder(self) -> None:
        """Stage `autoencoder`; its result lies in `autoencoder/` of the run folder."""
        plan = self.plan.autoencoder
        if plan is None or (
            finished(self.folder, "autoencoder", plan.steps) and (self.folder / "autoencoder" / "config.json").exists()
        ):
            return
        network = self._build(Autoencoder, "autoencoder")
        stage = AutoencoderStage(
            network,
            plan,
            self.train,
            self.val or self.train[:1],
            accelerator=self.accelerator,
            precision=self.precision,
            seed=self.seed,
        )
        self._loop(stage, plan.batch_size)
        if self.accelerator.is_main_process:
            # Renamed into place whole: its presence is what says that the stage is done.
            temporary, final = self.folder / ".autoencoder.partial", self.folder / "autoencoder"
            shutil.rmtree(temporary, ignore_errors=True)
            stage.averaged.to(memory_format=torch.contiguous_format).save_pretrained(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        self.accelerator.wait_for_everyone()

    def _autoencoder(self) -> Autoencoder | None:
        if self.plan.autoencoder is None:
            return None
        path = self.folder / "autoencoder"
        if not (path / "config.json").exists():
            raise BadInputError(f"{path}: expected a trained autoencoder, got none. Run stage `autoencoder` first.")
        network = Autoencoder.from_pretrained(path, use_safetensors=True).eval().to(self.accelerator.device)
        return network

    def _config(self) -> GeneratorConfig:
        scales = torch.tensor([scan.scale for scan in self.train]).median(dim=0).values
        shifts = torch.tensor([scan.shift for scan in self.train]).median(dim=0).values
        constant = set.intersection(*(set(scan.classes) for scan in self.train)) - {0}
        plan = self.plan
        return GeneratorConfig(
            name=plan.name,
            spatial_dims=plan.spatial_dims,
            channel_names=plan.channel_names,
            class_names=plan.class_names,
            size=plan.size,
            objective=plan.denoiser.objective,
            normalization=plan.normalization,
            intensity=IntensityMap(tuple(scales.tolist()), tuple(shifts.tolist())),
            image_dtype=plan.image_dtype,
            modality=plan.modality,
            spacing=plan.spacing,
            orientation=plan.orientation,
            label_objective=plan.label.objective if plan.label else None,
            label_stride=plan.label_stride,
            guidance_scale=plan.denoiser.guidance_scale,
            shapes=tuple(scan.shape for scan in self.train),
            constant_classes=tuple(sorted(constant)),
            max_parts=int(np.quantile([scan.parts for scan in self.train], 0.95, method="higher")),
            training={
                "data": self.dataset.root.name,
                "training_cases": len(self.train),
                "validation_cases": len(self.val),
                "seed": self.seed,
                "steps": {
                    name: getattr(plan, name).steps
                    for name in ("autoencoder", "denoiser", "label")
                    if getattr(plan, name) is not None
                },
                "versions": {name: version(name) for name in ("medgen", "torch", "monai", "diffusers")},
                "python": platform.python_version(),
            },
        )

    def _variants(
        self, scans: list[CachedScan], generator: Generator, kind: str, plan: DenoiserPlan, variants: int, title: str
    ) -> list[Path]:
        """Cache of clean samples for one denoiser; its folder's name tells everything that it was computed from."""
        device = self.accelerator.device

        @torch.no_grad()
        def encode(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
            if kind == "label":
                return generator.encode_label(tensors["label"].long())
            with autocast(device, self.precision):
                return generator.encode(tensors["image"][None].to(device))[0].float().cpu()

        weights = ""
        if kind == "denoiser" and generator.autoencoder is not None:
            weights = str(
                float(sum(value.double().abs().sum() for value in generator.autoencoder.state_dict().values()))
            )
        key = key_of(
            weights,
            plan.variants,
            plan.rotation,
            plan.scaling,
            self.plan.size,
            self.plan.label_stride,
            self.seed,
            variants,
        )
        with self.accelerator.main_process_first():
            return cache_variants(
                scans,
                encode,
                plan,
                self.folder / "cache" / f"{kind}-{key}",
                size=self.plan.size,
                variants=variants,
                seed=self.seed,
                title=title,
            )

    def _measure_latents(self, generator: Generator) -> None:
        """Per-channel mean and scale of the training latents, so that the denoiser sees unit variance."""
        if generator.autoencoder is None:
            return
        total = torch.zeros(2, generator.denoiser.config["in_channels"], dtype=torch.float64)
        count = 0
        for scan in self.train[:64]:
            image = crop_to({"image": read_scan(scan)["image"]}, self.plan.size, None)["image"]
            with torch.no_grad(), autocast(self.accelerator.device, self.precision):
                latents = generator.autoencoder.encode(image[None].to(self.accelerator.device))[0]
            flat = latents[0].flatten(1).double().cpu()
            total += torch.stack([flat.sum(1), flat.square().sum(1)])
            count += flat.shape[1]
        mean = total[0] / count
        std = (total[1] / count - mean.square()).sqrt()
        generator.config.latent_shift = tuple(mean.tolist())
        generator.config.latent_scale = tuple((1 / std).tolist())

    def train_denoiser(self) -> None:
        """Stage `denoiser`; the run folder is a usable model from its first validation on."""
        plan = self.plan.denoiser
        autoencoder = self._autoencoder()
        denoiser = self._build(Denoiser, "denoiser")
        generator = Generator(self._config(), denoiser, autoencoder)
        self._measure_latents(generator)
        val_scans, device = self.val or self.train, self.accelerator.device

        def preview(step: int, picture: Path) -> None:
            generator.save_pretrained(self.folder)
            write_card(generator, self.folder)
            preview_images(generator, val_scans, picture, precision=self.precision, seed=self.seed, device=device)

        self._train_denoiser("denoiser", denoiser, plan, generator, preview)

    def train_label(self) -> None:
        """Stage `label`: adds a label generator to the model in the run folder."""
        plan = self.plan.label
        if plan is None:
            return
        val_scans, device = self.val or self.train, self.accelerator.device
        generator = Generator.from_pretrained(self.folder, device=device)
        generator.config.label_objective = plan.objective
        generator.config.label_stride = self.plan.label_stride
        denoiser = generator.label_denoiser = self._build(Denoiser, "label")

        def preview(step: int, picture: Path) -> None:
            generator.save_pretrained(self.folder)
            write_card(generator, self.folder)
            preview_labels(generator, val_scans, picture, precision=self.precision, seed=self.seed, device=device)

        self._train_denoiser("label", denoiser, plan, generator, preview)

    def _train_denoiser(
        self,
        name: Literal["denoiser", "label"],
        denoiser: Denoiser,
        plan: DenoiserPlan,
        generator: Generator,
        preview: Callable[[int, Path], None],
    ) -> None:
        if plan.gradient_checkpointing:
            denoiser.checkpoint_blocks()
        kind = "scans" if name == "denoiser" else "labels"
        train = self._variants(self.train, generator, name, plan, plan.variants, f"training {kind}")
        val = self._variants(self.val, generator, name, plan, 1, f"validation {kind}")
        stage = DenoiserStage(
            name,
            denoiser,
            plan,
            plan.objective,
            train,
            val,
            num_classes=len(self.plan.class_names) if name == "denoiser" else 1,
            preview=preview,
            accelerator=self.accelerator,
            precision=self.precision,
            seed=self.seed,
        )
        self._loop(stage, plan.batch_size)
