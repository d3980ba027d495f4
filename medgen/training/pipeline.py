"""`medgen train`: choose the plan, and run its stages one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medgen.data.dataset import Dataset, read_dataset
from medgen.generator import Generator
from medgen.networks import find_lora_layers, require_peft
from medgen.planning import (
    Plan,
    StageName,
    TuningPlan,
    cap_steps,
    check_plan,
    make_plan,
    summarize_plan,
)
from medgen.training.control import check_base, plan_on
from medgen.training.folder import (
    check_output,
    earlier_plan,
    model_folder,
    show_plan,
)
from medgen.training.processes import check_batches, choose_accelerator
from medgen.training.run import Run
from medgen.types import BadInputError


def train(
    data: Path,
    output: Path,
    *,
    plan: Plan | None = None,
    conditions: list[str] | None = None,
    base: str | None = None,
    lora_rank: int | None = None,
    stages: Sequence[StageName] = ("autoencoder", "denoiser", "label"),
    max_steps: int | None = None,
    dry_run: bool = False,
    skip_bad: bool = False,
    seed: int = 0,
    device: str = "auto",
) -> Path:
    """Train a generator on a folder of scans.

    Without a plan it follows `plan.yaml` in the output folder, or makes one from what it finds in the data; edit
    that file before the training, or pass it back with `--config` to a new folder. A run that was stopped, even killed,
    goes on from its last checkpoint when it is started again with the same arguments.

    Args:
        data: Folder of scans: MSD or nnU-Net `dataset.json`, `metadata.csv|jsonl`, or `images/` and `labels/`.
        output: Folder of the run. The model lies in its subfolder `model/`, which alone is to be shared: the run keeps
            copies and pictures of real scans too.
        plan: Plan to follow, as `plan.yaml` of another run; by default `plan.yaml` in the output folder, or else one
            that is made from the data.
        conditions: What is to steer the generator, where the plan is made from the data: mask (label maps), edge, text
            (column `text`, `caption` or `report` of the metadata, the first that is filled), spacing (voxel size), any
            column such as view or age, or none; by default mask. Each may be left out at synthesis. Scans without a
            label map are used where more than masks steer.
        base: Finished model to go on from: folder, embedded name or Hub id, also of a Stable Diffusion 1.x or 2.x
            pipeline. For mask or edge, if that does not steer it yet, a control branch is trained while the model stays
            as it is; again with the other, it gets a second one. For conditions that it has, it is tuned to the scans:
            its denoiser learns, beside its control branches, which stay as they are. Conditions that are not named are
            then not read of the scans and still steer the model: `none` reads neither label maps nor texts.
        lora_rank: Tune the base by low-rank changes of this rank, which take less memory and are also saved on their
            own in the folder lora/; by default all weights of its denoiser are tuned.
        stages: Which stages to run; what a stage needs from an earlier one must be there.
        max_steps: Cap on the steps of each stage, for a quick trial.
        dry_run: Show plan, parameters, memory and time, write the plan to `plan.yaml` in the output folder, and stop.
        skip_bad: List unusable cases in `rejected.jsonl` and go on, instead of stopping at the first.
        seed: Root of every random draw.
        device: `auto`, `cpu`, `cuda` or any torch device.

    Returns:
        The output folder.

    Raises:
        BadInputError: If the data or the plan cannot be used, the output folder holds another run, or peft is not
            installed and wanted.
        MemoryError: If a batch does not fit; the message says what to change.
    """
    folder = Path(output)
    check_output(folder)
    dataset = read_dataset(data)
    model = None if base is None else Generator.from_pretrained(base)
    earlier = plan or earlier_plan(folder, dataset)
    if earlier is not None and conditions is not None:
        _require_conditions(earlier, conditions)
    if lora_rank is not None and (
        model is None or (earlier and (earlier.tuning or TuningPlan()).lora_rank != lora_rank)
    ):
        raise BadInputError(
            f"lora_rank: expected a base to tune, and the rank of the plan that is followed, got {lora_rank}. Name the "
            "base, or choose another --output."
        )
    if earlier is None and model is not None:
        if conditions is None:
            raise BadInputError(
                "conditions: expected what the base is to learn: mask or edge for a control branch, or those that it "
                f"has, to tune it ({', '.join(model.conditions) or 'none'}). Name them."
            )
        earlier = plan_on(model, dataset, conditions, lora_rank=lora_rank, device=device)
    plan = earlier or make_plan(dataset, conditions=conditions, device=device)
    if plan.has_base != (model is not None):
        raise BadInputError(
            f"base: expected {'a model' if plan.has_base else 'none'}, as in the plan that is followed, got {base}. "
            "Name it, or choose another --output."
        )
    if model is not None:
        check_base(model, plan, dataset)
    check_plan(plan, dataset)
    if model is not None and plan.tuning is not None and plan.tuning.lora_rank is not None:
        require_peft()
        find_lora_layers(model.denoiser, plan.tuning.lora_targets or None)  # refuses targets that it lacks
    if dry_run:
        print(summarize_plan(cap_steps(plan, max_steps), dataset, device=device))
        show_plan(folder, plan)
        return folder
    check_batches(plan, stages)
    accelerator = choose_accelerator(device)
    run = Run(dataset, plan, folder, accelerator, model, max_steps=max_steps, skip_bad=skip_bad, seed=seed)
    if model is not None:
        run.train_on(model)
    else:
        if "autoencoder" in stages:
            run.train_autoencoder()
        if "denoiser" in stages:
            run.train_denoiser()
        if "label" in stages:
            run.train_label()
    if accelerator.is_main_process:
        print(_next_step(folder, dataset))
    return folder


def _require_conditions(plan: Plan, names: Sequence[str]) -> None:
    """Refuse conditions that contradict a plan."""
    planned = (plan.control,) if plan.control else plan.read_conditions.names
    if set(planned) != set(names) - {"none"}:
        raise BadInputError(
            f"conditions: expected {', '.join(planned) or 'none'}, as in the plan that is followed, got "
            f"{', '.join(names)}. Leave them out, or choose another --output to have a plan made."
        )


def _next_step(folder: Path, dataset: Dataset) -> str:
    model = model_folder(folder)
    if not (model / "generator.json").is_file():
        return f"no model yet. Next: medgen train --data {dataset.root} --output {folder}"
    labels, made = "", Generator.from_pretrained(model)
    if made.label_denoiser is None and "mask" in made.conditions:
        labels = f" --labels {dataset.root if any(case.label for case in dataset.cases) else 'FOLDER'}"
    return f"the model is in {model}. Next: medgen synthesize --model {folder}{labels} --output synthetic"
