"""A run of the synthesis: a folder that is filled, continued where it was left, and closed with its papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from tqdm import tqdm

from medgen.data.dataset import Rejection
from medgen.data.export import released_on_failure
from medgen.generator import Generator
from medgen.precision import Precision, resolve_precision
from medgen.provenance import (
    MANIFEST,
    SampleRecord,
    append_record,
    finalize_manifest,
    hide_folder,
    runtime_info,
    sha256_file,
)
from medgen.synthesis.folder import ARGUMENTS, open_folder, read_done, read_made, write_sample
from medgen.synthesis.gated import Filter, close_gated, draw_accepted
from medgen.synthesis.labels import prepare
from medgen.synthesis.papers import REJECTED, append_rejection, close_folder
from medgen.synthesis.plan import SampleSpec, SamplingSettings
from medgen.synthesis.processes import Alone, join_processes, threads
from medgen.synthesis.replay import Batch, read_replay, refuse_other_arguments
from medgen.synthesis.request import AttributeValue, Request, plan_request
from medgen.synthesis.sampling import sample_batch
from medgen.synthesis.steering import check_settings, describe_scales, planned_evaluations, resolve_scales
from medgen.types import BadInputError

if TYPE_CHECKING:
    from accelerate import PartialState

DEFAULT_MODEL = "hippocampus-mr-3d"


def synthesize(
    output: Path | None = None,
    *,
    model: str = DEFAULT_MODEL,
    labels: Path | None = None,
    label_source: Literal["files", "deform", "generate", "none"] | None = None,
    label_sampling: Literal["in_turn", "rare"] = "in_turn",
    label_outlines: bool = False,
    prompts: str | None = None,
    edges: Path | None = None,
    edge_maps: Path | None = None,
    edge_control: str | None = None,
    sources: Path | None = None,
    strength: float | None = None,
    regions: Path | None = None,
    source_labels: Path | None = None,
    attributes: dict[str, AttributeValue] | None = None,
    conditions: Path | None = None,
    num_samples: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    sampler: str = "dpm++2m",
    sampler_spacing: str = "default",
    num_inference_steps: int = 20,
    guidance_scale: float | dict[str, float] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_rescale: float = 0.0,
    controls: dict[str, dict[str, float]] | None = None,
    minority_scale: float = 0.0,
    temperature: float | None = None,
    precision: Precision = "auto",
    device: str = "auto",
    max_memory_gb: float | None = None,
    truncate_prompts: bool = False,
    skip_bad: bool = False,
    filter: Path | None = None,
    overwrite: bool = False,
    replay: Path | None = None,
) -> list[SampleRecord]:
    """Make labelled synthetic scans and write them as an nnU-Net v2 raw data set with a manifest.

    What steers them (label maps, prompts, edges, attributes) may be given in any combination that the model was trained
    for; what is not given is absent. They are made from noise, or from scans that are given (sources): the whole scan,
    or a region of it, beyond which every voxel stays. The same command on the same folder continues an interrupted run.
    Several processes (``accelerate launch``) share the work.

    Args:
        output: Folder to write; new, empty, or of the same run. A replay may leave it out: it then goes beside the
            manifest's folder, with `_replay` added to the name.
        model: Folder of a trained model, of a training run or of a Stable Diffusion 1.x or 2.x pipeline in diffusers'
            layout, name of an embedded model, or Hub id.
        labels: Label maps to make scans for: a data set, of which those of the training split are taken (where it names
            none, without the scans that medgen utility tests on); or a folder of label maps, all of which are.
        label_source: Where labels come from: 'files' as they are, 'deform' random deformations of them, 'generate' by
            the model, 'none' scans without a label map; by default 'files' if a folder is given, else 'generate', or
            'none' where edges are given or the model knows no label maps. Deformations keep the number of parts and
            holes of each class, unless a map, or the usual map of the model's training, has more than 8 parts (cells).
        label_sampling: 'in_turn' takes the label maps one after the other; 'rare' draws those more often whose classes
            or sizes of classes are rare among them, so that all sizes are shown alike; at least 6 maps.
        label_outlines: Let label maps that are given steer by the outlines of their classes and not by themselves: for
            a model that was trained on Canny's edges of all scans, and on label maps of few. They are guided as `edge`,
            and no other edges can stand beside.
        prompts: What the scans should show, in words: the prompt itself, a .txt file with one a line, or a .csv file
            with a column `text` or `prompt`; taken in turn.
        edges: Folder of scans whose edges the new scans follow, extracted as the model's training edges were. Beside
            label maps they are matched by file name.
        edge_maps: Folder of edge maps in place of scans: 8-bit or 16-bit PNG, or NIfTI with values from 0 to 1. A model
            that was trained on Canny's edges, as is usual, wants outlines of 0 and 1.
        edge_control: Folder or Hub id of a ControlNet in diffusers' layout (such as one for Canny edges) that lets
            edges steer a Stable Diffusion model. Edges of scans are then extracted by medgen's own settings (Canny);
            give edge maps where the ControlNet wants others. Edges are not guided further (1), unless asked.
        sources: Folder of scans to change, one file each or CASE_0000, CASE_0001 per channel, matched by file name with
            all other folders. Labels are then those that the results are to have.
        strength: How much of a source scan changes, in (0, 1]: the share of the noise process that is run. Little keeps
            it, 1 makes it from noise; by default 1 in regions and where labels differ.
        regions: Folder of maps that are not 0 where the source scans may change; by default where labels and source
            labels differ, widened by 2 voxels, or the whole scan. Three voxels around are blended. Beside labels they
            need source labels, which must equal these outside of the region.
        source_labels: Folder of label maps of the source scans as they are: a lesion that is in these and not in labels
            goes, and the other way round.
        attributes: Facts that every scan should have, such as '{view: PA, age: 60}'. A voxel size (`spacing`, in mm)
            that is not given is that of the scan's own grid.
        conditions: A .csv file with one row a sample instead of the arguments above: columns `label`, `edge`,
            `edge_map`, `source`, `source_label`, `region` (files, relative to it), `strength`, `text` or `prompt`, and
            one per attribute; empty cells are absent.
        num_samples: Scans to make; by default one per label map, prompt, scan that is given or row, whichever are most,
            or 8. More than there are takes them again.
        batch_size: Scans that go through the networks together; less needs less memory.
        seed: Root of all random draws.
        sampler: 'dpm++2m', 'unipc', 'heun', and 'euler' for flow or 'ddim' for other models.
        sampler_spacing: Spacing of the steps: 'default', 'lu', 'karras' or 'uniform'.
        num_inference_steps: Steps of the sampler; more is slower and more exact.
        guidance_scale: How strictly the scan follows its conditions (1: as trained), one number for all or by name such
            as '{mask: 1.5, text: 5}'; by default, and for names that are left out, the model's own. One number leaves
            conditions for which the model has a scale of their own, as for the edges of a ControlNet (1), at that.
        guidance_interval: Shares of the noise process between which guidance acts: 0 is the image, 1 pure noise.
        guidance_rescale: Share in [0, 1] by which the contrast that guidance adds is taken back.
        controls: How control branches act, where not as trained: their conditioning_scale, and the shares of the noise
            process, counted from pure noise, at which they start and end (in diffusers they are shares of the
            steps), such as '{edge: {conditioning_scale: 0.7, end: 0.6}}'.
        minority_scale: How far scans are led from what the model usually makes towards rare looks (0: off; 0.5 is
            clearly seen, as contrast above all; more, and in volumes already 0.5, also strays from the label maps).
            Costs a quarter more network evaluations, and gradients.
        temperature: Factor on the noise that a scan starts from; less makes cleaner scans that differ less from each
            other (1: as trained); by default the model's own.
        precision: 'bf16', 'fp32', or 'auto' for bf16 where the hardware is fast at it.
        device: 'auto', 'cpu', 'cuda' or another torch device.
        max_memory_gb: Bound on memory for decoding large scans, by tiles.
        truncate_prompts: Cut prompts that are longer than the text encoder takes, with a warning, instead of refusing
            them.
        skip_bad: Leave out label maps, edges, sources and rows that cannot be used, list them in rejected.jsonl, and go
            on.
        filter: Folder of labelled real scans, or of gates that ``medgen filter`` fitted: scans are drawn until
            num_samples of them pass its gates, and the others go to `rejected` with their reasons; gates.json and
            gates.png say how many. A run ends with an error after 10 draws for each scan that is asked for (and 20 at
            least), or where less than 5 % pass. What is fitted is kept beside the output, and holds small pictures of
            the real scans. Where the folder names no validation scans, those that ``medgen train`` holds out are left
            out.
        overwrite: Replace another run's output in the folder, with all that is in its imagesTr and labelsTr.
        replay: Manifest of an earlier run to make again, voxel for voxel. It names no folders: give --model where the
            model was a folder or a Hub id, and --labels, --edges, --edge_maps, --edge_control, --sources, --regions
            and --source_labels where such were used; all are checked by their SHA-256.

    Returns:
        The record of each scan, in order.

    Raises:
        BadInputError: If the model, a label map or other condition, an argument or the output folder cannot be used.
        MemoryError: If a batch does not fit; the message says which setting to lower.
    """
    given = dict(locals())
    output = _choose_output(output, replay)
    request = Request(**{item.name: given[item.name] for item in fields(Request)})
    _refuse_inputs_inside(output, replay=replay, filter=filter, **request.inputs)
    gates = None if filter is None or replay else Filter.find(filter, output, num_samples, overwrite=overwrite)
    again = None
    if replay is not None:
        refuse_other_arguments(synthesize, given)
        again = read_replay(Path(replay), request.inputs)
        device = again.device if device == "auto" else device
    state, chosen = join_processes(device)
    if again is not None:
        generator = again.load_model(None if model == DEFAULT_MODEL else model, chosen, edge_control=edge_control)
        name = again.model
        source = again.manifest.resolve()
        job = _Job(
            batches=again.batches,
            identity={"replay": sha256_file(again.manifest), "model_hash": generator.weights_hash},
            arguments={"replay": f"{source.parent.name}/{source.name}"},
        )
    else:
        generator = Generator.from_pretrained(model, device=chosen, edge_control=edge_control)
        # Files that people share say nothing of where things lie on this machine.
        name = generator.config.name if Path(model).exists() else model
        settings = SamplingSettings(
            sampler=sampler,
            sampler_spacing=sampler_spacing,
            num_inference_steps=num_inference_steps,
            guidance_scale=resolve_scales(generator, guidance_scale),
            guidance_interval=cast("tuple[float, float]", tuple(guidance_interval)),
            guidance_rescale=guidance_rescale,
            controls=controls or {},
            minority_scale=minority_scale,
            temperature=generator.config.temperature if temperature is None else temperature,
            precision=resolve_precision(precision, chosen),
            max_memory_gb=max_memory_gb,
        )
        drawn = request if gates is None else replace(request, num_samples=gates.most_draws)
        job = _plan_job(drawn, generator, settings, batch_size=batch_size)
        if gates is not None:
            gates.require_model(generator, {spec.source for batch in job.batches for spec in batch.specs})
            job.identity.update(filter=[gates.source.digest, *gates.options], num_samples=num_samples)
            job.arguments.update(filter=Path(filter).resolve().name if filter else None, num_samples=num_samples)
        for path in dict.fromkeys(path for batch in job.batches for spec in batch.specs for path in spec.paths):
            _refuse_inputs_inside(output, conditions=path)
        job.identity["model_hash"] = generator.weights_hash
    evaluations: set[int] = set()
    for batch in {batch.settings: batch for batch in job.batches}.values():
        specs = [spec for other in job.batches if other.settings == batch.settings for spec in other.specs]
        check_settings(generator, batch.settings, generate=any(spec.source == "generate" for spec in specs))
        evaluations |= set(planned_evaluations(generator, specs, batch.settings))
    arguments = {"model": name, "device": str(chosen), **job.arguments}
    if edge_control is not None:
        arguments["edge_control"] = Path(edge_control).resolve().name if Path(edge_control).exists() else edge_control
    claimed = False
    if state.is_main_process:
        claimed = open_folder(output, job.identity, arguments, job.rejected, overwrite=overwrite)
        why = " (auto)" if precision == "auto" and again is None else ""
        print(f"model {name} on {chosen} in {_describe(job.batches[0].settings, why, sorted(evaluations))}")
        if job.splits:
            print(job.splits)
    with released_on_failure(output, job.identity, claimed=claimed, papers=(ARGUMENTS, REJECTED)):
        state.wait_for_everyone()
        make = partial(_make, output, generator, name, state=state, skip_bad=skip_bad)
        if gates is None:
            make(job.batches)
        else:
            wait, main = state.wait_for_everyone, state.is_main_process
            draw_accepted(output, gates, generator, job.batches, make, wait, main=main)
        state.wait_for_everyone()
    if state.is_main_process:
        records = read_done(output)
        if gates is not None and not records:
            close_gated(output, gates, generator)
        if not records:
            raise BadInputError(f"{output}: expected at least one scan, got none. {output / REJECTED} says why.")
        records = finalize_manifest(output / MANIFEST, records)
        verdict = None if again is None else again.compare(records)
        close_folder(output, generator, records, verdict)
        labelled = "labelled " if all(record.label_sha256 for record in records) else ""
        scans = f"{labelled}scan" if len(records) == 1 else f"{labelled}scans"
        print(f"{len(records)} {scans} in {output}" + (f"; {verdict}" if verdict else ""))
        if gates is not None:
            close_gated(output, gates, generator)
    state.wait_for_everyone()
    return read_done(output)


def _choose_output(output: Path | None, replay: Path | None) -> Path:
    if output is not None:
        return Path(output)
    if replay is None:
        raise BadInputError("output: expected a folder to write to, got none. Give --output FOLDER.")
    source = Path(replay).resolve().parent
    return source.with_name(f"{source.name}_replay")


def _refuse_inputs_inside(output: Path, **inputs: Path | None) -> None:
    """An output folder may be cleared, so nothing that the run reads may lie in it."""
    for name, path in inputs.items():
        if path is not None and Path(path).resolve().is_relative_to(output.resolve()):
            raise BadInputError(
                f"{path}: expected {name} outside of the output folder, got it inside {output}. Choose another output "
                "folder."
            )


@dataclass(frozen=True)
class _Job:
    """What to make, what tells it from every other run, and the arguments that say it again."""

    batches: list[Batch]
    identity: dict[str, Any]
    arguments: dict[str, Any]
    rejected: list[Rejection] = field(default_factory=list)
    splits: str = ""


def _plan_job(request: Request, generator: Generator, settings: SamplingSettings, *, batch_size: int) -> _Job:
    if batch_size < 1:
        raise BadInputError(f"batch_size: expected at least 1, got {batch_size}.")
    planned = plan_request(request, generator)
    specs = planned.specs
    choice = {"label_source": planned.source, "label_sampling": request.label_sampling}
    options = {**choice, "num_samples": len(specs), "seed": request.seed, **asdict(settings)}
    # What does not fit into the memory may go on with less of it; each record holds its own batch and bound.
    memory = {"batch_size": batch_size, "max_memory_gb": options.pop("max_memory_gb")}
    return _Job(
        batches=[Batch(tuple(specs[at : at + batch_size]), settings) for at in range(0, len(specs), batch_size)],
        identity={**options, **planned.digests},
        arguments={**request.arguments, **options, **memory},
        rejected=planned.rejected,
        splits=planned.splits,
    )


def _describe(settings: SamplingSettings, why: str, evaluations: Sequence[int]) -> str:
    """What the user may want to change, and what a scan costs."""
    low, high = evaluations[0], evaluations[-1]
    words = f"{settings.precision}{why}, {settings.sampler}, {settings.num_inference_steps} steps, guidance "
    words += f"{describe_scales(settings.guidance_scale)}, temperature {settings.temperature:g}, "
    words += f"minority scale {settings.minority_scale:g}, " if settings.minority_scale else ""
    return f"{words}{low if low == high else f'{low} to {high}'} network evaluations a scan"


def _make(
    output: Path,
    generator: Generator,
    model: str,
    batches: Sequence[Batch],
    state: PartialState | Alone,
    *,
    skip_bad: bool,
) -> None:
    """Make what is missing of this process's share: every n-th batch, whatever is done already."""
    records = read_made(output)
    done = {record.case for record in records} & {case for batch in batches for case in batch.wanted}
    # On a run that goes on elsewhere, another number of threads would round otherwise.
    began_with = records[0].runtime["threads"] if records else torch.get_num_threads()
    if done and state.is_main_process:
        wanted = sum(len(batch.wanted) for batch in batches)
        print(f"{len(done)} of {wanted} scans are already there" + ("; going on" if len(done) < wanted else ""))
    share = batches[state.process_index :: state.num_processes]
    total = sum(len(batch.wanted) for batch in share)
    bar = tqdm(
        total=total,
        initial=sum(case in done for batch in share for case in batch.wanted),
        unit="scan",
        desc="synthesize",
        miniters=0,
        disable=not state.is_main_process,
    )

    def show(step: int) -> None:
        bar.set_postfix(step=step, refresh=False)
        bar.update(0)

    with bar:
        for batch in share:
            missing = batch.wanted - done
            if not missing:
                continue
            reject = partial(_reject, output, batch.wanted, skip_bad)
            prepared = []
            for spec in batch.specs:
                if spec.scan is not None and spec.case not in missing:
                    continue  # an edit does not depend on the others of its batch
                try:
                    prepared.append(prepare(spec, generator))
                except BadInputError as error:
                    reject(spec, error)
            if not any(item.spec.case in missing for item in prepared):
                continue  # an earlier run left these out, and so does this one
            with threads(batch.threads or began_with):
                runtime = runtime_info(generator.device)
                made = sample_batch(
                    generator,
                    prepared,
                    batch.settings,
                    on_step=show,
                    on_reject=reject,
                )
            for item in made:
                if item.spec.case in missing:
                    record = write_sample(output, generator, model, item, batch.settings, runtime)
                    append_record(output / MANIFEST, record)
                    bar.update()


def _reject(output: Path, wanted: frozenset[str], skip_bad: bool, spec: SampleSpec, error: BadInputError) -> None:
    if spec.case not in wanted:
        return  # a replay takes it along only because the run did, which left it out
    if not skip_bad:
        raise error
    reason = str(error)
    for path in spec.paths:
        reason = hide_folder(reason, path.parent)
    append_rejection(output, Rejection(spec.case, reason))
