"""One training run: its plan, its cached scans, its stages and the bundle that grows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from accelerate import Accelerator

from medgen.data.dataset import Dataset, split_cases
from medgen.generator import Generator
from medgen.generator.familiarity import fit_familiarity
from medgen.networks import Autoencoder, Denoiser, add_lora, merge_lora, save_lora
from medgen.planning import (
    DenoiserPlan,
    DiffusionPlan,
    Plan,
    StageName,
    cap_steps,
    learned_from,
    network_arguments,
)
from medgen.precision import resolve_precision
from medgen.provenance import write_text
from medgen.seeding import derive_seed
from medgen.training.autoencoder import AutoencoderStage
from medgen.training.cache import CachedScan, cache_scans, key_of, read_scan
from medgen.training.card import write_card
from medgen.training.control import ControlledDenoiser, new_control
from medgen.training.denoiser import DenoiserStage, balance_draws
from medgen.training.describe import describe_generator
from medgen.training.folder import (
    REJECTED,
    claim_folder,
    learned_settings,
    model_folder,
    record_run,
)
from medgen.training.latents import cache_latents, settle_latents
from medgen.training.loop import finished, load_averaged, run_stage
from medgen.training.preview import preview_images, preview_labels
from medgen.training.steering import Steering, build_text_encoder
from medgen.types import BadInputError

if TYPE_CHECKING:
    from medgen.training.control import AnyDenoiser

Network = TypeVar("Network", Autoencoder, Denoiser)
_Row = TypeVar("_Row")


def _identity(scan: CachedScan) -> str:
    """What a scan was learned from: its files, and what the metadata say of it."""
    return key_of(scan.source, scan.text, scan.facts) if scan.text or scan.facts else scan.source


class Run:
    """State of one training run: its plan, its cached scans and the bundle that grows.

    Args:
        dataset: The scans.
        plan: What is followed.
        folder: Run folder.
        accelerator: Device and processes.
        base: Finished model to go on from, or None.
        max_steps: Cap on the steps of each stage, or None.
        skip_bad: List unusable cases and go on.
        seed: Root of every random draw.

    Raises:
        BadInputError: If the scans cannot be used, or another run has begun in the folder.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        folder: Path,
        accelerator: Accelerator,
        base: Generator | None = None,
        *,
        max_steps: int | None,
        skip_bad: bool,
        seed: int,
    ) -> None:
        self.dataset, self.folder, self.accelerator, self.seed = dataset, folder, accelerator, seed
        self.plan = cap_steps(plan, max_steps)
        self.precision = resolve_precision(plan.precision, accelerator.device)
        identity: dict[str, Any] = {
            "plan": learned_settings(plan),
            "max_steps": max_steps,
            "seed": seed,
            "precision": self.precision,
        }
        if base is not None:
            identity["base"] = base.weights_hash
        if accelerator.is_main_process:
            print(f"training on {accelerator.device} in {self.precision}, {accelerator.num_processes} process(es)")
            claim_folder(folder, plan, identity)
        accelerator.wait_for_everyone()
        # Before the split, so that the validation scans are a share of those that can be used.
        useful = learned_from(plan, dataset)
        train_cases, val_cases = split_cases(useful)
        conditions, cases = plan.read_conditions, [*train_cases, *val_cases]
        self.texts = {"texts": conditions.text.source(cases)} if conditions.text is not None else {}
        if accelerator.is_main_process:
            print(f"steered by {conditions.describe(cases)}")
        unlabelled = len(dataset.cases) - len(useful.cases)
        if unlabelled and accelerator.is_main_process:
            print(f"{unlabelled} cases without a label are not used")
        with accelerator.main_process_first():
            common: dict[str, Any] = {"divisor": plan.divisor, "skip_bad": skip_bad}
            self.train = cache_scans(dataset, train_cases, plan, folder, title="training", **common)
            if not self.train:
                first = f"; the first bad one: {dataset.rejected[0].reason}" if dataset.rejected else "."
                raise BadInputError(
                    f"{dataset.root}: expected at least one training case with image and label, got none{first}"
                )
            self.val = cache_scans(dataset, val_cases, plan, folder, title="validation", **common)
        if accelerator.is_main_process:
            if dataset.rejected:
                rows = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in dataset.rejected)
                write_text(folder / REJECTED, rows)
                print(f"{len(dataset.rejected)} unusable cases skipped; see {folder / REJECTED}")
            # Not before all scans are read: until then nothing is learned, and plan and data may still be mended.
            parts = {"training scan": self.train, "validation scan": self.val}
            files = {part: {scan.case: _identity(scan) for scan in scans} for part, scans in parts.items()}
            record_run(folder, identity | {"data": files})
        accelerator.wait_for_everyone()

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

    def _is_done(self, stage: str, steps: int) -> bool:
        done = finished(self.folder, stage, steps)
        if done and self.accelerator.is_main_process:
            print(f"stage {stage}: all {steps} steps are already done")
        return done

    def train_autoencoder(self) -> None:
        """Stage `autoencoder`; its result is its last checkpoint."""
        plan = self.plan.autoencoder
        if plan is None or self._is_done("autoencoder", plan.steps):
            return
        stage = AutoencoderStage(
            self._build(Autoencoder, "autoencoder"),
            plan,
            self.train,
            self.val or self.train[:1],
            accelerator=self.accelerator,
            precision=self.precision,
            seed=self.seed,
        )
        self._loop(stage, plan.batch_size)

    def _autoencoder(self) -> Autoencoder | None:
        plan = self.plan.autoencoder
        if plan is None:
            return None
        self._require("autoencoder", plan.steps)
        network = self._build(Autoencoder, "autoencoder")
        load_averaged(network, self.folder, "autoencoder")
        return network.eval().to(self.accelerator.device)

    def _require(self, stage: StageName, steps: int) -> None:
        if not finished(self.folder, stage, steps):
            raise BadInputError(
                f"{self.folder}: expected the stage {stage!r} to have run to its end, got an unfinished one. "
                "Run it first, or leave --stages out."
            )

    def _save(self, generator: Generator) -> None:
        generator.save_pretrained(model_folder(self.folder))
        write_card(generator, model_folder(self.folder))

    def _has_model(self) -> bool:
        return (model_folder(self.folder) / "generator.json").is_file()

    def train_denoiser(self) -> None:
        """Stage `denoiser`; the run folder has a usable model from its first validation on."""
        plan = self.plan.denoiser
        if self._has_model() and self._is_done("denoiser", plan.steps):
            self._renew_defaults(plan)
            return
        denoiser = self._build(Denoiser, "denoiser")
        config = describe_generator(self.plan, self.dataset.root.name, self.train, len(self.val), seed=self.seed)
        config.training |= self.texts
        generator = Generator(config, denoiser, self._autoencoder())
        if plan.conditions.text is not None:
            generator.text_encoder = build_text_encoder(plan.conditions.text, self.train, self.seed)
        drawn = self._balanced(self.train, self.train)
        settle_latents(
            generator, drawn, self.folder, self.plan.size, precision=self.precision, accelerator=self.accelerator
        )
        self._train_denoiser("denoiser", denoiser, plan, generator)

    def _renew_defaults(self, plan: DenoiserPlan) -> None:
        """Take over what the plan says of synthesis, which may be changed after training."""
        if not self.accelerator.is_main_process:
            return
        generator = Generator.from_pretrained(model_folder(self.folder))
        names = ("guidance_scale", "temperature")
        if any(getattr(generator.config, name) != getattr(plan, name) for name in names):
            for name in names:
                setattr(generator.config, name, getattr(plan, name))
            self._save(generator)

    def train_label(self) -> None:
        """Stage `label`: adds a label generator to the model."""
        plan = self.plan.label
        if plan is None:
            return
        self._require("denoiser", self.plan.denoiser.steps)
        generator = Generator.from_pretrained(model_folder(self.folder), device=self.accelerator.device)
        if generator.label_denoiser is not None and self._is_done("label", plan.steps):
            return
        generator.config.label_objective = plan.objective
        generator.config.label_stride = self.plan.label_stride
        generator.label_denoiser = self._build(Denoiser, "label")
        self._train_denoiser("label", generator.label_denoiser, plan, generator)

    def train_on(self, generator: Generator) -> None:
        """Train a finished model further, or a control branch on it."""
        plan, control = self.plan, self.plan.control
        if self._has_model() and self._is_done("control" if control else "tuning", plan.denoiser.steps):
            return
        generator.to(self.accelerator.device)
        before = generator.config
        generator.config = dataclasses.replace(
            describe_generator(plan, self.dataset.root.name, self.train, len(self.val), seed=self.seed),
            latent_scale=before.latent_scale,
            latent_shift=before.latent_shift,
            text_padding=before.text_padding,
            guidance_scales=before.guidance_scales,
            label_objective=before.label_objective,
            label_stride=before.label_stride,
            familiarity=before.familiarity,
        )
        if plan.tuning is not None and not plan.read_conditions.mask:  # nothing was seen of the labels
            generator.config.constant_classes, generator.config.max_parts = before.constant_classes, before.max_parts
        # The ControlNet stays beside it, and so do its words where no texts are read.
        kept = {name: value for name, value in before.training.items() if name in ("edge_control", "texts")}
        generator.config.training |= {"base": before.name, "trained_before": before.training, **kept, **self.texts}
        text = plan.denoiser.conditions.text
        if generator.text_encoder is not None:
            generator.text_encoder.requires_grad_(bool(text and text.trainable and not control))
        if control is None:
            self._tune(generator)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "control", "weights"))
            branch = new_control(generator.denoiser, control, len(plan.class_names))
        generator.controls[control] = branch
        self._train_denoiser("control", ControlledDenoiser(generator.denoiser, branch), plan.denoiser, generator)

    def _tune(self, generator: Generator) -> None:
        tuning = self.plan.tuning
        denoiser = generator.denoiser.requires_grad_(True)
        branches = [generator.controls[name] for name in sorted(generator.controls)]
        steered = ControlledDenoiser(denoiser, *branches, tunes_base=True) if branches else denoiser
        if tuning is None or tuning.lora_rank is None:
            self._train_denoiser("tuning", steered, self.plan.denoiser, generator)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, "lora", "weights"))
            add_lora(denoiser, tuning.lora_rank, tuning.lora_targets or None)
        self._train_denoiser("tuning", steered, self.plan.denoiser, generator, saves=False)
        if self.accelerator.is_main_process:
            save_lora(denoiser, self.folder / "lora")
            merge_lora(denoiser)
            self._save(generator)
        self.accelerator.wait_for_everyone()

    def _balanced(self, rows: list[_Row], scans: list[CachedScan]) -> list[_Row]:
        """What was made of scans, each repeated as often as `balance` has it drawn."""
        column = self.plan.denoiser.balance
        if column is None:
            return rows
        meta = {case.case: case.meta for case in self.dataset.cases}
        empty = [scan.case for scan in scans if not meta[scan.case].get(column)]
        if empty:
            raise BadInputError(
                f"denoiser.balance: expected a value of {column!r} for every training scan, got none for {len(empty)} "
                f"of {len(scans)}, such as {empty[0]}. Fill the column in the metadata, or set it to null."
            )
        return balance_draws(rows, [meta[scan.case][column] for scan in scans])

    def _train_denoiser(
        self,
        name: Literal["denoiser", "label", "control", "tuning"],
        denoiser: AnyDenoiser | ControlledDenoiser,
        plan: DiffusionPlan,
        generator: Generator,
        *,
        saves: bool = True,
    ) -> None:
        device, is_image = self.accelerator.device, name != "label"
        train_scans, val_scans = (
            scans if is_image else [scan for scan in scans if scan.labelled] for scans in (self.train, self.val)
        )
        steering = Steering(
            self.plan.read_conditions if is_image else None,
            len(self.plan.class_names),
            [*train_scans, *val_scans],
            generator.text_encoder if is_image else None,
        )

        shown = val_scans or train_scans
        draw: Callable[..., None] = partial(preview_images, steering=steering) if is_image else preview_labels

        def preview(step: int, picture: Path) -> None:
            if saves:
                self._save(generator)
            draw(generator, shown, picture, precision=self.precision, seed=self.seed, device=device)

        if plan.gradient_checkpointing:
            denoiser.checkpoint_blocks()
        kind = "scans" if is_image else "labels"
        cached: Literal["denoiser", "label"] = "denoiser" if is_image else "label"
        common: dict[str, Any] = {
            "plan": self.plan,
            "folder": self.folder,
            "precision": self.precision,
            "device": device,
            "seed": self.seed,
        }
        with self.accelerator.main_process_first():
            train = cache_latents(train_scans, generator, cached, plan.variants, title=f"training {kind}", **common)
        with self.accelerator.main_process_first():
            val = cache_latents(val_scans, generator, cached, 1, title=f"validation {kind}", **common)
        if is_image:
            train = self._balanced(train, train_scans)
        stage = DenoiserStage(
            name,
            denoiser,
            plan,
            plan.objective,
            train,
            val,
            steering=steering,
            preview=preview,
            accelerator=self.accelerator,
            precision=self.precision,
            seed=self.seed,
        )
        self._loop(stage, plan.batch_size)
        if is_image and self.accelerator.is_main_process:
            known = fit_familiarity(generator, (read_scan(scan)["image"][None] for scan in train_scans))
            generator.config.familiarity = known or generator.config.familiarity  # few scans leave that of a base
        if saves and self.accelerator.is_main_process:
            self._save(generator)
        self.accelerator.wait_for_everyone()
