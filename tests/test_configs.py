"""The recipes in `configs/` that follow papers: read, fitting their data, and each run at toy size."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medgen import cli
from medgen.conditions.attributes import fit_spacing
from medgen.conditions.condition import Condition
from medgen.data.dataset import load_cases, read_dataset
from medgen.data.io import read_label
from medgen.generator import Generator
from medgen.networks import Vocabulary
from medgen.planning import Plan, check_plan, choose_conditions, read_plan, summarize_plan
from medgen.synthesis import synthesize
from medgen.training import train
from medgen.types import BadInputError

RECIPES = {
    "roentgen_text_cxr": {"text"},
    "diffboost_text_edge": {"text", "edge"},
    "mrgen_text_mask": {"text", "edge"},
    "segguided_mask": {"mask"},
    "maisi_3d_mask_spacing": {"mask", "spacing"},
}
SIDE = 32
NETWORK: dict[str, Any] = {
    "channels": (8, 16),
    "attention_levels": (False, True),
    "num_head_channels": 8,
    "mask_channels": 4,
    "batch_size": 2,
    "steps": 2,
    "variants": 2,
}


@pytest.fixture
def recipe(repository: Path) -> Callable[..., Plan]:
    """A recipe as the command line reads it, with other words behind it."""

    def parse(name: str, *words: str) -> Plan:
        plan: Plan = cli.parse("train", ["--config", str(repository / "configs" / f"{name}.yaml"), *words])["plan"]
        return plan

    return parse


@pytest.fixture
def one_modality(repository: Path) -> Callable[[Path, Path], Path]:
    """Runs the script that prepares the data of `mrgen_text_mask`."""

    def run(data: Path, output: Path) -> Path:
        command = [sys.executable, str(repository / "benchmarks" / "one_modality.py"), "--output", str(output)]
        environment = {**os.environ, "MEDGEN_DATA": str(data), "PYTHONPATH": str(repository)}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        return output

    return run


@pytest.fixture
def all_sets(repository: Path, tmp_path: Path) -> Callable[[Path], Path]:
    """Runs the script that stands in the comment of `diffboost_text_edge`."""

    def run(data: Path) -> Path:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "data").symlink_to(data)
        (tmp_path / "work").mkdir()
        comment = (repository / "configs" / "diffboost_text_edge.yaml").read_text()
        script = comment.partition("<<'END'\n")[2].partition("#   END\n")[0]
        script = "".join(line.removeprefix("#   ") for line in script.splitlines(keepends=True))
        environment = {**os.environ, "PYTHONPATH": str(repository)}
        subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path / "work", env=environment)
        return tmp_path / "work" / "runs" / "all_sets"

    return run


def _shrink(plan: Plan) -> Plan:
    """The plan with everything that makes it slow made small, and all that makes it what it is left alone."""
    autoencoder, side = plan.autoencoder, (SIDE if plan.spatial_dims == 2 else 16,) * plan.spatial_dims
    assert autoencoder is not None
    text = plan.denoiser.conditions.text
    conditions = replace(plan.denoiser.conditions, text=text and replace(text, width=16, depth=1))
    changes: dict[str, Any] = {
        "channels": (8,) * len(autoencoder.channels),
        "patch_size": side,
        "batch_size": 2,
        "steps": 2,
    }
    return replace(
        plan,
        size=side,
        autoencoder=replace(autoencoder, **changes, adversarial_start=1, discriminator_channels=4),
        denoiser=replace(plan.denoiser, **NETWORK, conditions=conditions),
        label=plan.label and replace(plan.label, **NETWORK),
        precision="fp32",
    )


def _write(folder: Path, rows: Iterable[dict[str, str]], *, classes: int = 1, dims: int = 2) -> Path:
    """A data set of balls in noise with these columns, every third scan for validation."""
    rng, table = np.random.default_rng(0), []
    for index, row in enumerate(rows):
        shape, ending = ((SIDE, SIDE), "png") if dims == 2 else ((16, 14, 12), "nii.gz")
        axes = np.meshgrid(*(np.arange(length) - length / 2 + rng.uniform(-2, 2) for length in shape), indexing="ij")
        label = (classes - np.linalg.norm(axes, axis=0) // 2).clip(0, None)
        image = (rng.normal(80, 10, shape) + 40 * label).clip(1, 250)
        if row.get("channels") == "3":
            image = np.stack([image, image / 2, 250 - image], axis=-1)
        case = {"id": f"case_{index}", "group": f"patient_{index}", "split": "val" if index % 3 == 2 else "train"}
        for key, array in (("image", image), ("label", label)):
            if row.get(key) == "":
                continue
            case[key] = f"{key}s/case_{index}.{ending}"
            path = folder / case[key]
            path.parent.mkdir(parents=True, exist_ok=True)
            if dims == 2:
                Image.fromarray(array.astype(np.uint8)).save(path)
            else:
                nib.save(nib.Nifti1Image(array.astype(np.float32 if key == "image" else np.uint8), np.eye(4)), path)
        table.append(case | row)
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    return folder


def _chest(folder: Path) -> Path:
    """As `cxr_text`: notes, ages and lung masks of some, view and finding of all."""
    rows = []
    for index in range(6):
        view, finding, age = ("AP", "PA")[index % 2], ("COVID-19", "No Finding")[index // 3], ("", "50")[index % 2]
        caption = f"Chest X-ray, {view} view. Finding: {finding}."
        notes = "" if index % 2 else "small consolidation"
        row = {"view": view, "age": age, "finding": finding, "caption": caption, "text": notes}
        rows.append(row | ({"label": ""} if index % 2 else {}))
    return _write(folder, rows)


def _heart(folder: Path) -> Path:
    return _write(folder, [{"caption": f"short-axis cardiac MRI, {end}"} for end in ("ED", "ES") * 3], classes=3)


def _nuclei(folder: Path) -> Path:
    sites = ("fluorescence", "histology", "brightfield")
    rows = [
        {"site": site, "channels": "3" if site == "histology" else "1", "caption": f"{site} microscopy, 1 cell nuclei"}
        for site in sites
        for _ in range(3)
    ]
    return _write(folder, rows)


def _hippocampus(folder: Path) -> Path:
    return _write(folder, [{"dtype": "float32"}] * 5, classes=2, dims=3)


def _responds(generator: Generator, name: str, *parts: torch.Tensor) -> bool:
    """Whether two values of a condition give two outputs."""
    shape = generator.latent_shape(generator.config.size)
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = (generator.denoise(x, torch.tensor([500.0]), Condition({name: part})) for part in parts)
    return not torch.equal(one, other)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_whole_command_that_says_what_its_paper_did(name: str, repository: Path) -> None:
    path = repository / "configs" / f"{name}.yaml"
    arguments = cli.parse("train", ["--config", str(path)])
    assert {"data", "output", "plan"} <= set(arguments)
    assert arguments["plan"] == read_plan(path)
    assert set(read_plan(path).denoiser.conditions.names) == RECIPES[name]
    text = path.read_text()
    assert f"medgen train --config configs/{name}.yaml" in text
    assert text.count("# Paper: ") >= 3
    assert max(map(len, text.splitlines())) <= 120


def test_what_makes_each_recipe_its_own(recipe: Callable[..., Plan]) -> None:
    plans = {name: recipe(name) for name in RECIPES}
    assert {name: plan.compression for name, plan in plans.items()} == {
        "roentgen_text_cxr": 8,
        "diffboost_text_edge": 8,
        "mrgen_text_mask": 4,
        "segguided_mask": 4,
        "maisi_3d_mask_spacing": 2,
    }
    assert plans["segguided_mask"].denoiser.conditions.class_dropout == 0.5
    edge = plans["diffboost_text_edge"].denoiser.conditions.edge
    assert edge is not None
    assert edge.method == "sobel"
    maisi = plans["maisi_3d_mask_spacing"]
    assert (maisi.spatial_dims, maisi.denoiser.objective.prediction, maisi.spacing) == (3, "flow", None)
    text = plans["roentgen_text_cxr"].denoiser.conditions.text
    assert text is not None
    assert text.encoder == "small"


def test_a_recipe_fits_its_real_data(
    real_data: Path,
    recipe: Callable[..., Plan],
    one_modality: Callable[[Path, Path], Path],
    all_sets: Callable[[Path], Path],
    tmp_path: Path,
) -> None:
    folders = {
        "roentgen_text_cxr": real_data / "cxr_text",
        "diffboost_text_edge": all_sets(real_data.resolve()),
        "mrgen_text_mask": one_modality(real_data, tmp_path / "one_modality"),
        "segguided_mask": real_data / "cardiac_acdc",
        "maisi_3d_mask_spacing": real_data / "hippocampus3d",
    }
    sets = {name: read_dataset(folder) for name, folder in folders.items()}
    for name, dataset in sets.items():
        plan = recipe(name)
        check_plan(plan, dataset)
        if plan.denoiser.conditions.text is not None:
            texts = [plan.denoiser.conditions.text.text_of(case) for case in dataset.cases]
            words = [len(Vocabulary.split(text)) for text in texts]
            assert min(words) > 0
            assert max(words) <= plan.denoiser.conditions.text.length
    maisi = recipe("maisi_3d_mask_spacing")
    assert maisi.denoiser.conditions.attributes["spacing"].features == fit_spacing([(1, 1, 1), (1, 1, 2)]).features
    with pytest.raises(BadInputError, match="expected scans of different voxel sizes, got 1 x 1 x 1 mm everywhere"):
        choose_conditions(sets["maisi_3d_mask_spacing"], ["mask", "spacing"])  # as the recipe's comments say
    # 213 + 416 + 101 + 12 gray ones for training
    counts = [sum(case.split == split for case in sets["diffboost_text_edge"].cases) for split in ("train", "val")]
    assert counts == [742, 159]
    labelled = [case for case in sets["mrgen_text_mask"].cases if case.label is not None]
    assert len(labelled) == 101
    assert "steered by edge, text" in summarize_plan(recipe("mrgen_text_mask"), sets["mrgen_text_mask"], device="cpu")


def test_x_rays_are_learned_from_texts(recipe: Callable[..., Plan], tmp_path: Path) -> None:
    plan = _shrink(recipe("roentgen_text_cxr"))
    generator = Generator.from_pretrained(train(_chest(tmp_path / "data"), tmp_path / "run", plan=plan, device="cpu"))
    assert generator.conditions == ("text",)
    encoder = generator.text_encoder
    assert encoder is not None
    words = encoder.encode(["Chest X-ray, PA view. Finding: COVID-19.", "Chest X-ray, AP view. Finding: COVID-19."])
    assert not torch.equal(words[0], words[1])  # both views are words that it knows
    assert _responds(generator, "text", words[:1], words[1:])


def test_the_text_encoder_of_a_pipeline_is_tuned_by_the_edited_plan(saved_pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    words: dict[str, Any] = {
        "base": str(saved_pipeline),
        "conditions": ["text"],
        "lora_rank": 2,
        "max_steps": 2,
        "device": "cpu",
    }
    data, output = _chest(tmp_path / "data"), tmp_path / "run"
    train(data, output, dry_run=True, **words)
    plan = output / "plan.yaml"
    assert plan.read_text().count("trainable: false") == 1
    plan.write_text(plan.read_text().replace("trainable: false", "trainable: true"))
    tuned, base = Generator.from_pretrained(train(data, output, **words)), Generator.from_pretrained(saved_pipeline)
    encoders = [generator.text_encoder for generator in (tuned, base)]
    assert all(encoder is not None for encoder in encoders)
    one, other = (encoder.encode(["chest"]) for encoder in encoders if encoder is not None)
    assert not torch.equal(one, other)
    assert list((output / "lora").glob("*.safetensors"))


def test_a_base_of_all_sets_is_adapted_to_one(
    recipe: Callable[..., Plan], all_sets: Callable[[Path], Path], tmp_path: Path
) -> None:
    real = tmp_path / "real"
    for name, make in (("cxr_text", _chest), ("cardiac_acdc", _heart), ("nuclei_dsb2018", _nuclei)):
        make(real / name)
    listed = read_dataset(all_sets(real))
    assert len(listed.cases) == 6 + 6 + 6  # without the three in color
    texts = {case.text for case in listed.cases}
    assert {"short-axis cardiac MRI, ED", "brightfield microscopy, 1 cell nuclei"} < texts
    base = train(listed.root, tmp_path / "base", plan=_shrink(recipe("diffboost_text_edge")), device="cpu")
    conditions = ["text", "edge"]
    adapted = train(
        real / "cardiac_acdc", tmp_path / "run", base=str(base), conditions=conditions, max_steps=2, device="cpu"
    )
    before, after = Generator.from_pretrained(base), Generator.from_pretrained(adapted)
    assert set(after.conditions) == set(before.conditions) == set(conditions)
    assert before.weights_hash != after.weights_hash
    edge = torch.zeros(1, 2, SIDE, SIDE)
    edge[:, 1] = 1
    lines = edge.clone()
    lines[:, 0, ::4] = 1
    assert _responds(after, "edge", edge, lines)


def test_only_the_training_scans_of_one_modality_keep_their_masks(
    one_modality: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    folder = one_modality(_nuclei(tmp_path / "real" / "nuclei_dsb2018").parent, tmp_path / "one")
    dataset = read_dataset(folder)
    assert [case.case for case in dataset.cases if case.label is not None] == ["case_0", "case_1"]
    assert dataset.class_names == {0: "background", 1: "nucleus"}
    assert {case.text for case in dataset.cases} == {
        f"{site} microscopy, cell nuclei" for site in ("fluorescence", "histology", "brightfield")
    }
    assert {case.split for case in dataset.cases} == {"train", "val"}
    copied = {path.name for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}
    assert copied == {"metadata.csv", "classes.json"}
    assert {path.name for path in (folder / "labels").iterdir()} == {"case_0.png", "case_1.png"}
    with pytest.raises(subprocess.CalledProcessError) as error:
        one_modality(tmp_path / "real", folder)
    assert b"expected a new or empty folder" in error.value.stderr


def test_modalities_without_masks_are_learned_beside_one_with(
    recipe: Callable[..., Plan], one_modality: Callable[[Path, Path], Path], tmp_path: Path
) -> None:
    folder = one_modality(_nuclei(tmp_path / "real" / "nuclei_dsb2018").parent, tmp_path / "one")
    output = train(folder, tmp_path / "run", plan=_shrink(recipe("mrgen_text_mask")), device="cpu")
    generator = Generator.from_pretrained(output)
    assert set(generator.conditions) == {"edge", "text"}
    assert generator.config.training["training_cases"] == 6
    prompts = "histology microscopy, cell nuclei"
    given: dict[str, Any] = {"model": str(output), "prompts": prompts, "num_inference_steps": 2, "device": "cpu"}
    records = synthesize(tmp_path / "pairs", labels=folder / "labels", label_outlines=True, **given)
    assert [record.label["file"] for record in records] == ["case_0.png", "case_1.png"]
    assert [record.conditions for record in records] == 2 * [{"text": prompts, "label_outlines": True}]
    made = read_dataset(tmp_path / "pairs")
    for sample, name in zip(load_cases(made, made.cases), ("case_0.png", "case_1.png"), strict=True):
        assert sample.label is not None
        assert torch.equal(sample.label, read_label(folder / "labels" / name)[0])


def test_a_class_alone_steers_where_masks_lost_classes_in_training(recipe: Callable[..., Plan], tmp_path: Path) -> None:
    output = train(_heart(tmp_path / "data"), tmp_path / "run", plan=_shrink(recipe("segguided_mask")), device="cpu")
    generator = Generator.from_pretrained(output)
    assert generator.conditions == ("mask",)
    assert generator.label_denoiser is not None
    mask = torch.zeros(1, 4, SIDE, SIDE)
    mask[:, 3, 8:16] = 1  # one class alone, the others unsaid
    assert _responds(generator, "mask", mask, mask.flip(2))


def test_volumes_are_learned_from_voxel_size_and_mask(recipe: Callable[..., Plan], tmp_path: Path) -> None:
    data = _hippocampus(tmp_path / "data")
    output = train(data, tmp_path / "run", plan=_shrink(recipe("maisi_3d_mask_spacing")), device="cpu")
    generator = Generator.from_pretrained(output)
    assert set(generator.conditions) == {"mask", "spacing"}
    spacing = generator.config.attributes["spacing"]
    assert spacing.encode([1, 1, 1], name="spacing").tolist() == [1, 0, 0, 0]  # known, and typical
    assert spacing.encode(json.dumps([2, 1, 0.5]), name="spacing").tolist() == [1, 1, 0, -1]
    sizes = [spacing.encode(row, name="spacing")[None] for row in ([1, 1, 1], [1, 1, 2])]
    assert _responds(generator, "spacing", *sizes)


def test_the_mask_becomes_a_branch_on_the_base_as_the_paper_has_it(recipe: Callable[..., Plan], tmp_path: Path) -> None:
    data = _hippocampus(tmp_path / "data")
    plan = recipe("maisi_3d_mask_spacing", "--plan.denoiser.conditions.mask", "false", "--plan.label", "null")
    base = train(data, tmp_path / "base", plan=_shrink(plan), device="cpu")
    assert Generator.from_pretrained(base).conditions == ("spacing",)
    output = train(data, tmp_path / "run", base=str(base), conditions=["mask"], max_steps=2, device="cpu")
    generator = Generator.from_pretrained(output)
    assert set(generator.conditions) == {"mask", "spacing"}
    assert list(generator.controls) == ["mask"]


@pytest.mark.parametrize("line", ["--plan.denoiser.conditions.{} null", "--plan.denoiser.conditions.{}=null"])
@pytest.mark.parametrize("key", ["edge", "text"])
def test_the_line_leaves_out_a_condition_that_the_file_has(key: str, line: str, recipe: Callable[..., Plan]) -> None:
    whole = recipe("cxr_text_mask_edge")
    plan = recipe("cxr_text_mask_edge", *line.format(key).split(), "--plan.denoiser.steps", "7")
    conditions = replace(whole.denoiser.conditions, **{key: None})
    assert plan == replace(whole, denoiser=replace(whole.denoiser, conditions=conditions, steps=7))
