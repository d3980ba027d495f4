"""Do synthetic scans follow the edges that they were given?

    python benchmarks/edge_fidelity.py --dataset cxr_text --model FOLDER

One synthetic scan is made for the edges of each real validation scan, and nothing else steers it. Its own edges, which
are extracted exactly as the given ones were, are held to those by the boundary F-score at a tolerance of 2 voxels. Two
figures stand beside it: the F-score of the real scan after encoding and decoding by the model's autoencoder, which no
scan of this model can be expected to exceed, and that of the synthetic scan of another patient, which is chance. The
goal is a ratio of at least 0.85 of the first. Soft edges (`sobel`, `laplacian`) count from a strength of 0.5 on. Writes
``benchmarks/results/edge_fidelity_DATASET.json``.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from common import WORKDIR, data_folder, describe_synthesis, link_files, save, table, verdict
from jsonargparse import auto_cli

from medgen.conditions.edge import boundary_f_score
from medgen.data.dataset import Case, read_dataset, split_cases
from medgen.data.export import write_case
from medgen.data.geometry import from_model, to_model
from medgen.data.io import read_image
from medgen.generator import Generator
from medgen.synthesis import SampleSpec, synthesize
from medgen.synthesis.inputs import check_edge
from medgen.synthesis.labels import LabelledGrid, prepare

GOAL = 0.85
TOLERANCE = 2.0  # voxels
STRENGTH = 0.5  # from which a soft edge counts


def place_scan(files: tuple[Path, ...], generator: Generator) -> LabelledGrid:
    """A scan's place on the model's grid and its edges there, by the code that makes a synthetic scan's condition."""
    source = check_edge(files, generator.config, ready=False)
    return prepare(SampleSpec(files[0].name, 0, 0, "none", edge=source), generator)


def binary(edge: torch.Tensor | None) -> torch.Tensor:
    """Edges as bool, ``(*spatial)``."""
    if edge is None:
        raise ValueError("expected edges, got none")
    return edge[0] >= STRENGTH


@torch.inference_mode()
def encode_and_decode(case: Case, placed: LabelledGrid, generator: Generator, folder: Path) -> tuple[Path, ...]:
    """A real scan through the autoencoder, written as a synthetic scan is; its files."""
    config, placement = generator.config, placed.placement
    image = torch.cat([read_image(path)[0] for path in case.images])
    image = to_model(config.normalization.fit(image).forward(image), placement, mode="linear", padding="reflect")
    # In float32, so that the figure does not depend on the machine.
    image = generator.decode(generator.encode(image[None]))[0]
    image = config.intensity.inverse(from_model(image, placement, mode="linear"))
    image = image if config.image_dtype == "float32" else image.round()
    return write_case(folder, case.case, image, None, placement.source, image_dtype=config.image_dtype).images


def shift_to_others(cases: list[Case]) -> int:
    """By how much to turn the list so that the fewest scans, at best none, meet one of their own patient."""
    groups = [case.group or case.case for case in cases]
    return min(
        range(1, len(groups)),
        key=lambda shift: sum(own == groups[i - shift] for i, own in enumerate(groups)),
    )


def summarize(scores: list[float]) -> dict[str, Any]:
    """Mean, its 95 % interval by the bootstrap, and every score."""
    values = torch.tensor(scores, dtype=torch.float64)
    draws = torch.randint(len(scores), (2000, len(scores)), generator=torch.Generator().manual_seed(0))
    interval = values[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return {"mean": float(values.mean()), "interval": interval.tolist(), "scans": [round(value, 4) for value in scores]}


def main(
    dataset: Literal["cardiac_acdc", "cxr_text"],
    model: str,
    guidance_scale: float | dict[str, float] | None = None,
    temperature: float | None = None,
    num_inference_steps: int = 20,
    batch_size: int = 8,
    seed: int = 0,
    limit: int | None = None,
    workdir: Path = WORKDIR,
) -> None:
    """Measure and print.

    Args:
        dataset: Real set whose validation scans lend their edges.
        model: As for `medgen synthesize`.
        guidance_scale: As for `medgen synthesize`; None is the model's own.
        temperature: As for `medgen synthesize`; None is the model's own.
        num_inference_steps: As for `medgen synthesize`.
        batch_size: As for `medgen synthesize`.
        seed: As for `medgen synthesize`.
        limit: Only so many validation scans (at least 2), spread over all of them, for a trial.
        workdir: Keeps the synthetic scans.
    """
    val = split_cases(read_dataset(data_folder(dataset)))[1]
    n = min(limit or len(val), len(val))
    val = [val[index * len(val) // n] for index in range(n)]
    generator = Generator.from_pretrained(model)
    sources = link_files([path for case in val for path in case.images], workdir / dataset / "edge_sources")
    output = workdir / dataset / f"edges-{generator.weights_hash[:8]}-s{num_inference_steps}-{seed}"
    records = synthesize(
        output,
        model=model,
        edges=sources,
        label_source="none",
        guidance_scale=guidance_scale,
        temperature=temperature,
        num_inference_steps=num_inference_steps,
        batch_size=batch_size,
        seed=seed,
        overwrite=True,
    )
    by_file = {case.images[0].name: case for case in val}
    val = [by_file[record.conditions["edge"][0]["file"]] for record in records]  # in the order of the synthetic scans
    placed = [place_scan(case.images, generator) for case in val]
    given = [binary(item.edge) for item in placed]
    made = [
        binary(place_scan(tuple(output / name for name in sorted(record.files)), generator).edge) for record in records
    ]
    folder = workdir / dataset / "re-encoded"
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    decoded = [encode_and_decode(case, item, generator, folder) for case, item in zip(val, placed, strict=True)]
    encoded = [binary(place_scan(files, generator).edge) for files in decoded]
    shift = shift_to_others(val)
    scores = {
        "synthetic": [boundary_f_score(own, edge, TOLERANCE) for own, edge in zip(made, given, strict=True)],
        "re-encoded real": [boundary_f_score(own, edge, TOLERANCE) for own, edge in zip(encoded, given, strict=True)],
        "chance": [boundary_f_score(made[index - shift], edge, TOLERANCE) for index, edge in enumerate(given)],
    }
    results = {name: summarize(values) for name, values in scores.items()}
    ratio = results["synthetic"]["mean"] / results["re-encoded real"]["mean"]
    table(
        ["edges of", "mean F", "95 % interval"],
        [[name, row["mean"], "{:.3f} to {:.3f}".format(*row["interval"])] for name, row in results.items()],
    )
    print(f"\nratio of synthetic to re-encoded: {ratio:.3f}, goal {GOAL:.2f}: {verdict(ratio >= GOAL)}")
    edge = generator.config.edge
    save(
        f"edge_fidelity_{dataset}",
        what="Boundary F-score between the edges given (those of real validation scans) and the edges of synthetic "
        "scans that they alone steered; of the real scans, encoded and decoded; of synthetic scans of other patients",
        n={"val": len(val)},
        seeds=[seed],
        model={"name": generator.config.name, "weights_hash": generator.weights_hash},
        synthesis=describe_synthesis(records),
        edge=asdict(edge) if edge else None,
        tolerance=TOLERANCE,
        strength=STRENGTH,
        edge_share={
            "given": sum(float(edge.double().mean()) for edge in given) / len(given),
            "synthetic": sum(float(edge.double().mean()) for edge in made) / len(made),
        },
        chance={
            "shift": shift,
            "same_patient": sum(case.group == val[index - shift].group for index, case in enumerate(val)),
        },
        goal=GOAL,
        ratio=ratio,
        reached=ratio >= GOAL,
        cases=[case.case for case in val],
        f_score=results,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
