"""What steers training: scans with and without labels, words, attributes and edges, and branches on a frozen model."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from medgen import cli
from medgen.conditions.assemble import assemble
from medgen.conditions.attributes import Attribute
from medgen.conditions.condition import Condition
from medgen.conditions.edge import EdgeSettings
from medgen.conditions.mask import class_distances
from medgen.data.dataset import read_dataset
from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.networks import TextEncoder
from medgen.planning import (
    ConditionsPlan,
    DenoiserPlan,
    TextPlan,
    TuningPlan,
    choose_conditions,
    make_plan,
    read_plan,
    write_plan,
)
from medgen.synthesis import synthesize
from medgen.training import train
from medgen.training.cache import CachedScan
from medgen.training.card import _describe
from medgen.training.control import ControlledDenoiser, plan_on
from medgen.training.denoiser import DenoiserStage, balance_draws
from medgen.training.steering import Steering, build_text_encoder
from medgen.types import BadInputError

ALL = ConditionsPlan(
    mask=True,
    edge=EdgeSettings(),
    text=TextPlan(length=8, width=16, depth=1, min_count=1),
    attributes={"view": Attribute("category", values=("AP", "PA")), "age": Attribute("number", mean=50, std=10)},
    drop_all=0.1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Six pictures of a ball; two have no label, one no text, one no age."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir()
    rows = []
    for index in range(6):
        grid = np.indices((16, 16)) - rng.uniform(6, 9, size=(2, 1, 1))
        label = (grid**2).sum(0) < 16
        noise = ndimage.gaussian_filter(rng.normal(size=(16, 16)), 1)
        image = (100 + 40 * noise + 90 * label).clip(1, 250)
        Image.fromarray(image.astype(np.uint8)).save(root / "images" / f"case_{index}.png")
        if index not in (1, 5):
            Image.fromarray(label.astype(np.uint8)).save(root / "labels" / f"case_{index}.png")
        rows.append(
            {
                "id": f"case_{index}",
                "image": f"images/case_{index}.png",
                "label": "" if index in (1, 5) else f"labels/case_{index}.png",
                "split": "val" if index > 3 else "train",
                "text": "" if index == 2 else f"a {'large' if index % 2 else 'small'} ball",
                "view": "PA" if index % 2 else "AP",
                "age": "" if index == 3 else str(40 + index),
            }
        )
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return root


def _steered(tiny_plan, conditions: ConditionsPlan, **changes):
    return tiny_plan(denoiser={"conditions": conditions}, class_names={0: "background", 1: "class_1"}, **changes)


@pytest.fixture(scope="module")
def branched(folder, tmp_path_factory, tiny_plan) -> Path:
    """A model that label maps steer, with a branch for edges."""
    root = tmp_path_factory.mktemp("branched")
    train(folder, root / "base", plan=_steered(tiny_plan, ConditionsPlan(), label=None), device="cpu")
    return train(folder, root / "run", conditions=["edge"], base=str(root / "base"), max_steps=4, device="cpu")


def test_a_run_with_every_condition_keeps_them_all(folder, tmp_path, tiny_plan, capsys):
    plan = _steered(tiny_plan, ALL)
    train(folder, tmp_path / "run", plan=plan, device="cpu")
    told = capsys.readouterr().out
    assert "not used" not in told  # unlabelled scans teach the other conditions
    assert "\nsteered by mask, edge, text (column text), view, age\n" in told
    made = Generator.from_pretrained(tmp_path / "run")
    assert made.conditions == ("mask", "edge", "text", "age", "view")
    assert isinstance(made.text_encoder, TextEncoder)
    assert set(made.text_encoder.vocabulary.words) == {"a", "ball", "small", "large"}
    assert made.config.edge == EdgeSettings()
    assert made.config.attributes == ALL.attributes
    initial = build_text_encoder(
        ALL.text, [CachedScan("x", "", "", (), (), (), (), (), 0, text="a small ball large")], seed=0
    )
    assert not torch.equal(initial.positions, made.text_encoder.positions)  # it learned with the denoiser
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    for line in (
        "- `mask`: label maps of these classes; without any, the model draws its own",
        "- `edge`: edges of scans (canny)",
        "- `text`: words, in training from the column text",
        "- `age`: a number in the unit of that column, in training 50 ± 10",
        "- `view`: one of `AP`, `PA`",
    ):
        assert f"\n{line}\n" in card
    assert "large ball" not in card and str(folder) not in card
    (command,) = re.findall(r"^medgen (synthesize .*--prompts.*)", card, flags=re.MULTILINE)
    files = {
        "FOLDER_OF_THIS_CARD": str(tmp_path / "run" / "model"),
        "FOLDER_OF_LABEL_MAPS": str(folder / "labels"),
        "FOLDER_OF_SCANS": str(folder / "images"),
        "TEXT": "a ball",
        "synthetic": str(tmp_path / "synthetic"),
    }
    quick = ["--num_samples", "1", "--num_inference_steps", "2", "--device", "cpu"]
    assert cli.main([*(files.get(word, word) for word in shlex.split(command)), *quick]) == 0
    (record,) = map(json.loads, (tmp_path / "synthetic" / "manifest.jsonl").read_text().splitlines())
    assert record["conditions"]["attributes"].keys() == {"age", "view"}
    before = made.weights_hash
    train(folder, tmp_path / "run", plan=plan, device="cpu")
    assert Generator.from_pretrained(tmp_path / "run").weights_hash == before


def test_a_model_of_texts_alone_has_no_label_generator(folder, tmp_path, tiny_plan):
    plan = tiny_plan(
        denoiser={"conditions": dataclasses.replace(ALL, mask=False)}, label=None, class_names={0: "background"}
    )
    # The folder's labels name a class that such a plan leaves out.
    with pytest.raises(BadInputError, match="expected the classes"):
        train(folder, tmp_path / "refused", plan=plan, device="cpu")
    plan = _steered(tiny_plan, dataclasses.replace(ALL, mask=False), label=None)
    train(folder, tmp_path / "run", plan=plan, device="cpu")
    made = Generator.from_pretrained(tmp_path / "run")
    assert made.conditions == ("edge", "text", "age", "view")
    assert made.label_denoiser is None


@pytest.mark.parametrize("as_branch", [False, True])
def test_masks_may_steer_as_signed_distances(folder, tmp_path, tiny_plan, as_branch):
    distances = ConditionsPlan(mask_form="signed_distance")
    plan, base = _steered(tiny_plan, distances, label=None), None
    if as_branch:
        base = train(
            folder, tmp_path / "base", plan=_steered(tiny_plan, ConditionsPlan(mask=False), label=None), device="cpu"
        )
        plan = plan_on(Generator.from_pretrained(base), read_dataset(folder), ["mask"])
        plan = dataclasses.replace(
            plan, denoiser=dataclasses.replace(plan.denoiser, conditions=distances, steps=3, batch_size=2)
        )
    run = train(folder, tmp_path / "run", plan=plan, base=base and str(base), device="cpu")
    made = Generator.from_pretrained(run)
    assert made.config.mask_form == "signed_distance"
    tuned = plan_on(made, read_dataset(folder), ["mask"]) if not as_branch else None
    assert tuned is None or tuned.denoiser.conditions.mask_form == "signed_distance"
    steering = Steering(distances, 2, [_scan()])
    label = torch.zeros(16, 16, dtype=torch.uint8)
    label[5:11, 4:9] = 1
    learned, _ = steering.read("a", {"label": label, "valid": torch.ones(16, 16, dtype=torch.bool)}, None)
    assert torch.equal(learned.parts["mask"][0], class_distances(label, 2))
    records = synthesize(
        tmp_path / "out", model=str(run), labels=folder / "labels", num_samples=2, num_inference_steps=2, device="cpu"
    )
    assert len(records) == 2


def test_changed_metadata_are_another_run(folder, tmp_path, tiny_plan):
    plan = _steered(tiny_plan, ALL)
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "labels"):
        (data / name).symlink_to(folder / name)
    table = (folder / "metadata.csv").read_text()
    (data / "metadata.csv").write_text(table)
    train(data, tmp_path / "run", plan=plan, device="cpu", max_steps=1)
    (data / "metadata.csv").write_text(table.replace("small", "tiny"))
    with pytest.raises(BadInputError, match="training scan case_0 has changed"):
        train(data, tmp_path / "run", plan=plan, device="cpu", max_steps=1)


def test_rare_values_of_a_column_are_drawn_as_often_as_common_ones(folder, tmp_path, tiny_plan, monkeypatch):
    files = [Path(name) for name in "abcdefg"]
    drawn = Counter(path.name for path in balance_draws(files, list("xxxxxyy")))
    assert drawn == {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1, "f": 3, "g": 2}
    seen: Counter[str] = Counter()
    read = DenoiserStage._read

    def counted(stage: DenoiserStage, path: Path, seed: int | None) -> object:
        seen[path.stem] += seed is not None
        return read(stage, path, seed)

    monkeypatch.setattr(DenoiserStage, "_read", counted)
    table = (folder / "metadata.csv").read_text()
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "labels"):
        (data / name).symlink_to(folder / name)
    (data / "metadata.csv").write_text(table.replace("train,a small ball,AP", "train,a small ball,PA"))  # case_0
    plan = tiny_plan(
        denoiser={"balance": "view", "steps": 12, "batch_size": 2},
        autoencoder=None,
        label=None,
        class_names={0: "background", 1: "class_1"},
    )
    train(data, tmp_path / "run", plan=plan, device="cpu")
    assert +seen == {"case_0": 6, "case_2": 12, "case_3": 6}  # case_1 has no label map
    plan.denoiser.balance = "age"
    with pytest.raises(BadInputError, match="expected a value of 'age' for every training scan, got none for 1 of 3"):
        train(data, tmp_path / "refused", plan=plan, device="cpu")


def _write_volumes(folder: Path) -> Path:
    """Three volumes of a ball, all with labels."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    rows = ["id,image,label,split"]
    for index in range(3):
        grid = np.indices((16, 16, 16)) - rng.uniform(6, 9, size=(3, 1, 1, 1))
        label = (grid**2).sum(0) < 16
        image = (100 + 40 * ndimage.gaussian_filter(rng.normal(size=label.shape), 1) + 90 * label).clip(1, 250)
        files = [f"{name}/case_{index}.nii.gz" for name in ("images", "labels")]
        for name, array in zip(files, (image, label), strict=True):
            nib.save(nib.Nifti1Image(array.astype(np.uint8), np.eye(4)), folder / name)
        rows.append(f"case_{index},{files[0]},{files[1]},{'val' if index == 2 else 'train'}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_branches_are_trained_one_after_the_other_on_a_frozen_model(folder, tmp_path, tiny_plan, spatial_dims):
    if spatial_dims == 3:
        folder = _write_volumes(tmp_path / "volumes")
    bare = _steered(tiny_plan, ConditionsPlan(mask=False), label=None, spatial_dims=spatial_dims)
    train(folder, tmp_path / "base", plan=bare, device="cpu")
    base = Generator.from_pretrained(tmp_path / "base")
    assert base.conditions == ()
    assert "## Steered by\n\nNothing: scans are" in (tmp_path / "base" / "model" / "README.md").read_text()
    for condition, before, after in (("mask", "base", "one"), ("edge", "one", "two")):
        plan = plan_on(Generator.from_pretrained(tmp_path / before), read_dataset(folder), [condition], device="cpu")
        short = dataclasses.replace(plan.denoiser, steps=4, batch_size=2, variants=2)
        plan = dataclasses.replace(plan, denoiser=short, validate_every=2, checkpoint_every=2, precision="fp32")
        train(folder, tmp_path / after, plan=plan, base=str(tmp_path / before), device="cpu")
    made = Generator.from_pretrained(tmp_path / "two")
    assert made.conditions == ("edge", "mask")
    assert made.config.spatial_dims == spatial_dims
    for name, value in base.denoiser.state_dict().items():
        assert torch.equal(value, made.denoiser.state_dict()[name])
    zeros = made.controls["edge"].network.controlnet_mid_block.conv.weight
    assert zeros.abs().max() > 0  # it began at zero
    assert (tmp_path / "two" / "samples" / "control_000004.png").is_file()


@pytest.mark.parametrize(
    ("conditions", "rank", "message"),
    [
        (
            ["text"],
            None,
            r"expected mask or edge alone, for a control branch, or some of those .* \(none\), .* got text",
        ),
        (["mask", "edge"], None, "Add one branch after the other"),
        (["mask"], 4, "lora_rank: expected none for a control branch, got 4"),
        (None, None, "conditions: expected what the base is to learn"),
    ],
)
def test_bases_that_cannot_be_gone_on_from_are_refused(folder, tmp_path, tiny_plan, conditions, rank, message):
    train(folder, tmp_path / "base", plan=_steered(tiny_plan, ConditionsPlan(mask=False), label=None), max_steps=1)
    with pytest.raises(BadInputError, match=message):
        train(
            folder, tmp_path / "more", conditions=conditions, base=str(tmp_path / "base"), lora_rank=rank, device="cpu"
        )


def test_classes_and_conditions_that_the_base_lacks_are_refused_at_once(branched, folder, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    path = data / "labels" / "case_0.png"
    label = np.asarray(Image.open(path)).copy()
    label[0, 0] = 2
    Image.fromarray(label).save(path)
    words = {"base": str(branched), "device": "cpu"}
    # Neither a look nor a plan that is edited to have them gets past this.
    message = (
        r"data: expected the classes .*base 'tiny-edge' are built for, got \{2: 'class_2'\} too\. Take another base"
    )
    plan = plan_on(Generator.from_pretrained(branched), read_dataset(data), ["mask"], device="cpu")
    wider = dataclasses.replace(plan, class_names={**plan.class_names, 2: "class_2"})
    for given in ({"conditions": ["mask"], "dry_run": True}, {"plan": plan}, {"plan": wider}):
        with pytest.raises(BadInputError, match=message):
            train(data, tmp_path / "run", **words, **given)
    with pytest.raises(
        BadInputError, match=r"class_names: expected the classes .*, got .* in the plan\. Put them back"
    ):
        train(folder, tmp_path / "run", plan=wider, dry_run=True, **words)
    steered = dataclasses.replace(plan.denoiser.conditions, attributes={"age": Attribute("number")})
    more = dataclasses.replace(plan, denoiser=dataclasses.replace(plan.denoiser, conditions=steered))
    with pytest.raises(
        BadInputError, match=r"expected what steers the base .* \(mask, edge\), got age too in the plan"
    ):
        train(folder, tmp_path / "run", plan=more, dry_run=True, **words)
    assert not (tmp_path / "run").exists()


def test_a_branch_for_masks_takes_the_classes_of_its_scans(folder, tmp_path, tiny_plan):
    bare = _steered(tiny_plan, ConditionsPlan(mask=False), label=None)
    train(folder, tmp_path / "base", plan=bare, max_steps=1, device="cpu")
    base, dataset = Generator.from_pretrained(tmp_path / "base"), read_dataset(folder)
    three = dataclasses.replace(dataset, class_names={0: "background", 1: "class_1", 2: "class_2"})
    assert plan_on(base, three, ["mask"], device="cpu").class_names == three.class_names


@pytest.mark.parametrize("rank", [None, 2])
def test_a_model_is_tuned_by_what_steers_it(folder, tmp_path, tiny_plan, rank):
    train(folder, tmp_path / "base", plan=_steered(tiny_plan, ALL, label=None), device="cpu")
    base = Generator.from_pretrained(tmp_path / "base")
    train(
        folder,
        tmp_path / "tuned",
        conditions=["text", "mask"],
        base=str(tmp_path / "base"),
        lora_rank=rank,
        max_steps=3,
        device="cpu",
    )
    made = Generator.from_pretrained(tmp_path / "tuned")
    assert made.conditions == base.conditions
    before, after = base.denoiser.state_dict(), made.denoiser.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attention = {name for name in before if ".to_q." in name}
    assert attention <= changed
    assert (len(changed) < len(before) / 2) == (rank is not None)  # low-rank changes touch the attention alone
    assert (tmp_path / "tuned" / "lora").is_dir() == (rank is not None)
    assert torch.equal(base.text_encoder.positions, made.text_encoder.positions)  # as planned: the words stay


@pytest.mark.parametrize(
    ("conditions", "rank"), [(["mask", "edge"], None), (["mask"], None), (["edge"], None), (["mask", "edge"], 2)]
)
def test_a_model_with_a_branch_is_tuned_and_keeps_it(folder, branched, tmp_path, conditions, rank):
    if rank:
        pytest.importorskip("peft")
    words = {"conditions": conditions, "base": str(branched), "lora_rank": rank, "max_steps": 3, "device": "cpu"}
    tuned = train(folder, tmp_path / "tuned", **words)
    before, after = Generator.from_pretrained(branched), Generator.from_pretrained(tuned)
    assert after.conditions == before.conditions == ("mask", "edge")
    changed = [
        {name for name, weight in new.state_dict().items() if not torch.equal(weight, old.state_dict()[name])}
        for new, old in ((after.denoiser, before.denoiser), (after.controls["edge"], before.controls["edge"]))
    ]
    assert {name for name in before.denoiser.state_dict() if name.endswith("to_q.weight")} <= changed[0]
    assert not changed[1]
    records = synthesize(
        tmp_path / "out",
        model=str(tuned),
        labels=folder / "labels",
        edges=folder / "images",
        num_samples=1,
        num_inference_steps=2,
        device="cpu",
    )
    assert len(records) == 1


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_missing_peft_is_told_before_anything_is_written(folder, branched, tmp_path, monkeypatch, capsys, dry_run):
    monkeypatch.setitem(sys.modules, "peft", None)
    words = {"conditions": ["mask"], "base": str(branched), "device": "cpu", "dry_run": dry_run}
    with pytest.raises(BadInputError, match=r"expected the package peft, got none\. Run: pip install 'medgen\[lora\]'"):
        train(folder, tmp_path / "run", lora_rank=2, **words)
    assert not (tmp_path / "run").exists()
    assert "training on" not in capsys.readouterr().out
    train(folder, tmp_path / "run", **{**words, "dry_run": True})  # all weights are tuned without it


@pytest.mark.parametrize("dry_run", [True, False])
def test_unknown_lora_targets_are_told_before_anything_is_written(folder, branched, tmp_path, dry_run):
    pytest.importorskip("peft")
    plan = plan_on(Generator.from_pretrained(branched), read_dataset(folder), ["mask"], lora_rank=2, device="cpu")
    plan = dataclasses.replace(plan, tuning=dataclasses.replace(plan.tuning, lora_targets=("to_query",)))
    with pytest.raises(BadInputError, match=r"LoRA targets: expected ends of names of layers .*, got to_query\. There"):
        train(folder, tmp_path / "run", plan=plan, base=str(branched), device="cpu", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


def test_what_is_tuned_learns_beside_the_branch_as_it_is_used(branched):
    made = Generator.from_pretrained(branched)
    draw = torch.Generator().manual_seed(0)
    parts = {"mask": torch.rand(2, 2, 16, 16, generator=draw), "edge": torch.rand(2, 2, 16, 16, generator=draw)}
    x, t = torch.randn(2, 2, 8, 8, generator=draw), torch.tensor([500.0, 500.0])
    steered = ControlledDenoiser(made.denoiser, *made.controls.values(), tunes_base=True)
    outputs = []
    for names in ((), ("mask",), ("edge",), ("mask", "edge")):
        given = {name: parts[name] for name in names}
        outputs.append(steered(x, t, given))
        assert torch.equal(outputs[-1], made.denoise(x, t, Condition(given)))
    assert not torch.equal(outputs[1], outputs[3])  # the branch adds something
    outputs[3].square().mean().backward()
    assert all(weight.grad is not None for weight in made.denoiser.parameters())
    assert all(weight.grad is None for weight in made.controls["edge"].parameters())


def test_a_model_with_a_branch_follows_new_scans_after_tuning(branched, tmp_path):
    data = tmp_path / "data"
    for name in ("images", "labels"):
        (data / name).mkdir(parents=True)
    rows, columns = np.indices((16, 16))
    for index in range(6):
        label = (abs(rows - 7) < 4) & (abs(columns - 5 - index % 3) < 3)
        stripes = 120 + 100 * (-1.0) ** columns * ~label
        Image.fromarray(stripes.astype(np.uint8)).save(data / "images" / f"scan_{index}.png")
        Image.fromarray(label.astype(np.uint8)).save(data / "labels" / f"scan_{index}.png")
    plan = plan_on(Generator.from_pretrained(branched), read_dataset(data), ["mask", "edge"], device="cpu")
    quick = dataclasses.replace(plan.denoiser, batch_size=4, variants=1, learning_rate=3e-3, ema_decay=0.9)
    losses = []
    for steps in (1, 60):
        plan = dataclasses.replace(plan, denoiser=dataclasses.replace(quick, steps=steps), precision="fp32")
        run = train(data, tmp_path / str(steps), plan=plan, base=str(branched), device="cpu")
        losses.append(json.loads((run / "logs" / "tuning.jsonl").read_text().splitlines()[-1])["val_loss"])
    assert losses[1] < 0.7 * losses[0]  # of scans with their labels and edges


def test_a_model_is_adapted_to_scans_without_labels_and_learns_to_know_them(folder, tmp_path, tiny_plan):
    train(folder, tmp_path / "base", plan=tiny_plan(label=None), device="cpu")
    (tmp_path / "target" / "images").mkdir(parents=True)
    for index in range(12):
        picture = ndimage.gaussian_filter(np.random.default_rng(index).normal(size=(16, 16)), 2)
        Image.fromarray((120 + 300 * picture).clip(0, 255).astype(np.uint8)).save(
            tmp_path / "target" / "images" / f"scan_{index}.png"
        )
    for dry_run in (True, False, False):  # after a look at it, and again
        train(
            tmp_path / "target",
            tmp_path / "adapted",
            conditions=["none"],
            base=str(tmp_path / "base"),
            lora_rank=2,
            max_steps=3,
            device="cpu",
            dry_run=dry_run,
        )
    base, made = (Generator.from_pretrained(tmp_path / name) for name in ("base", "adapted"))
    assert made.conditions == base.conditions == ("mask",)
    assert (tmp_path / "adapted" / "lora").is_dir()
    assert made.config.class_names == base.config.class_names
    # Six scans are too few to know, those for training among twelve are enough.
    assert base.config.familiarity is None and made.config.familiarity is not None
    assert made.config.familiarity.limit > 0


def test_conditions_that_are_not_named_are_not_read_of_the_scans_in_a_tuning(folder, tmp_path, tiny_plan, capsys):
    base = str(train(folder, tmp_path / "base", plan=_steered(tiny_plan, ALL, label=None), device="cpu"))
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("untrusted", "bare"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images").symlink_to(folder / "images")
        bare = [dict.fromkeys(row, "") | {key: row[key] for key in ("id", "image", "split")} for row in rows]
        with (tmp_path / name / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows if name == "untrusted" else bare)
    labels = tmp_path / "untrusted" / "labels"
    shutil.copytree(folder / "labels", labels)
    (labels / "case_0.png").write_bytes(b"no picture")
    label = np.asarray(Image.open(labels / "case_2.png")).copy()
    label[0, 0] = 2  # a class that the base does not know
    Image.fromarray(label).save(labels / "case_2.png")
    words = {"base": base, "max_steps": 3, "device": "cpu"}
    made = [
        Generator.from_pretrained(train(tmp_path / name, tmp_path / f"{name}_run", conditions=["none"], **words))
        for name in ("untrusted", "bare")
    ]
    assert "\nsteered by nothing\n" in capsys.readouterr().out
    assert made[0].conditions == Generator.from_pretrained(base).conditions
    assert made[0].config.constant_classes == Generator.from_pretrained(base).config.constant_classes == (1,)
    weights, bare, before = (one.denoiser.state_dict() for one in (*made, Generator.from_pretrained(base)))
    assert all(torch.equal(weights[name], bare[name]) for name in bare)
    assert not all(torch.equal(weights[name], before[name]) for name in bare)
    told = train(tmp_path / "untrusted", tmp_path / "texts", conditions=["text", "age"], **words)
    assert "\nsteered by text (column text), age\n" in capsys.readouterr().out
    with pytest.raises(BadInputError, match=r"conditions: expected text, age, as in the plan that is .*, got text"):
        train(tmp_path / "untrusted", told, conditions=["text"], **words)
    with pytest.raises(BadInputError, match=r"tuning\.conditions: expected some of those that steer .* got site"):
        dataclasses.replace(read_plan(told / "plan.yaml"), tuning=TuningPlan(conditions=("site",)))


def test_the_card_lists_no_long_values_of_a_column_and_says_units():
    assert "secret" not in _describe(Attribute("category", values=("a", "b" * 40 + "secret")))[0]
    assert _describe(Attribute("spacing", mean=1.25, width=3)) == (
        "voxel edges in mm, 3 numbers, in training about 1.25",
        [1.25, 1.25, 1.25],
    )


def test_conditions_are_planned_from_the_folder(folder, tmp_path):
    dataset = read_dataset(folder)
    plan = make_plan(dataset, conditions=["mask", "edge", "text", "view", "age"], device="cpu")
    assert plan.denoiser.conditions.names == ("mask", "edge", "text", "view", "age")
    assert plan.denoiser.conditions.attributes["view"] == Attribute("category", values=("AP", "PA"))
    assert plan.denoiser.conditions.text.length == 8
    write_plan(plan, tmp_path / "plan.yaml")
    assert read_plan(tmp_path / "plan.yaml") == plan
    assert make_plan(dataset, conditions=["none"], device="cpu").denoiser.conditions.names == ()
    assert make_plan(dataset, device="cpu").denoiser.conditions.names == ("mask",)


def test_texts_of_labelled_synthetic_scans_train_the_next_model(folder, tmp_path, tiny_plan):
    train(folder, tmp_path / "run", plan=_steered(tiny_plan, ALL), device="cpu")
    made = synthesize(
        tmp_path / "made",
        model=str(tmp_path / "run"),
        labels=folder / "labels",
        prompts="a large ball",
        attributes={"view": "PA"},
        num_inference_steps=2,
        device="cpu",
    )
    dataset = read_dataset(tmp_path / "made")
    assert (dataset.format, dataset.synthetic) == ("nnunet", True)
    found = [(case.case, case.text, case.meta["view"], case.label is not None) for case in dataset.cases]
    assert found == [(record.case, "a large ball", "PA", True) for record in made]
    plan = _steered(tiny_plan, choose_conditions(dataset, ["mask", "text"]))
    train(tmp_path / "made", tmp_path / "next", plan=plan, conditions=["mask", "text"], max_steps=2, device="cpu")
    encoder = Generator.from_pretrained(tmp_path / "next").text_encoder
    assert set(encoder.vocabulary.words) == {"a", "large", "ball"}


def test_two_columns_of_body_regions_and_the_voxel_size_steer_volumes(tmp_path, tiny_plan):
    regions = ["head", "chest", "abdomen"]
    rows = ["id,image,top_region,bottom_region"]
    rng = np.random.default_rng(0)
    for index in range(4):
        volume = nib.Nifti1Image(rng.random((16, 16, 16), dtype=np.float32), np.diag([1, 1, 1 + index / 2, 1]))
        nib.save(volume, tmp_path / f"case_{index}.nii.gz")
        rows.append(f"case_{index},case_{index}.nii.gz,{regions[index % 2]},{regions[index % 2 + 1]}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    conditions = choose_conditions(read_dataset(tmp_path), ["spacing", "top_region", "bottom_region"])
    assert conditions.attributes["top_region"] == Attribute("category", values=("chest", "head"))
    assert conditions.attributes["bottom_region"] == Attribute("category", values=("abdomen", "chest"))
    plan = tiny_plan(3, denoiser={"conditions": conditions}, class_names={0: "background"}, label=None)
    train(tmp_path, tmp_path / "run", plan=dataclasses.replace(plan, image_dtype="float32"), device="cpu")
    made = [
        synthesize(
            tmp_path / f"out_{index}",
            model=str(tmp_path / "run"),
            attributes={"spacing": [1, 1, 2], "top_region": top, "bottom_region": bottom},
            num_samples=1,
            num_inference_steps=2,
            device="cpu",
        )[0]
        for index, (top, bottom) in enumerate([("head", "chest"), ("chest", "chest"), ("head", "abdomen")])
    ]
    assert len({record.image_sha256 for record in made}) == 3
    assert made[0].spacing == [1, 1, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["site"], r"expected mask, edge, text, spacing, none or a column of the metadata \(age, view\), got 'site'"),
        (["spacing"], "expected scans that state their voxel size for the condition 'spacing'"),
    ],
)
def test_conditions_that_the_folder_lacks_are_refused(folder, names, message):
    with pytest.raises(BadInputError, match=message):
        choose_conditions(read_dataset(folder), names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"denoiser": {"condition_dropout": 1.0}}, r"denoiser.condition_dropout: expected a chance in \[0, 1\)"),
        (
            {"denoiser": {"conditions": ConditionsPlan(drop_all=-0.1)}},
            "denoiser.conditions.drop_all: expected a chance",
        ),
        ({"class_names": {0: "background"}, "label": None}, "conditions.mask: expected classes beside the background"),
        ({"denoiser": {"conditions": ConditionsPlan(mask=False)}}, "label: expected a denoiser that label maps steer"),
        (
            {"denoiser": {"conditions": ConditionsPlan(attributes={"text": Attribute("number")})}},
            "attributes: expected other names than 'text'",
        ),
    ],
)
def test_plans_that_contradict_themselves_are_refused(tiny_plan, changes, message):
    with pytest.raises(BadInputError, match=message):
        tiny_plan(**changes)


def _scan(**changes: object) -> CachedScan:
    return dataclasses.replace(
        CachedScan("a", "", "", (4, 4), (1, 1), (1.0,), (0.0,), (0, 1), 1, text="small ball", facts={"view": "AP"}),
        **changes,
    )


def test_a_sample_says_what_is_known_of_its_scan_and_no_more():
    encoder = build_text_encoder(ALL.text, [_scan()], seed=0)
    label = torch.zeros(4, 4, dtype=torch.uint8)
    label[:2] = 1
    tensors = {
        "label": label,
        "valid": torch.ones(4, 4, dtype=torch.bool),
        "edge": torch.full((4, 4), 51, dtype=torch.uint8),
    }
    steering = Steering(ALL, 2, [_scan(), _scan(case="b", labelled=False, text="", facts={})], encoder)
    known, text = steering.read("a", tensors, None)
    assert text == "small ball"
    assert torch.equal(known.parts["mask"][0, 1], label.float())
    assert known.parts["edge"][0, :, 0, 0].tolist() == pytest.approx([0.2, 1.0])
    assert known.parts["view"].tolist() == [[1, 0]]
    assert not known.parts["age"].any()
    bare, text = steering.read("b", tensors, None)
    assert "mask" not in bare.parts
    assert not bare.parts["view"].any()
    assert text == ""
    batch = steering.batch([known, bare], ["small ball", ""], torch.device("cpu"))
    assert torch.equal(batch.parts["text"][0], encoder.encode(["small ball"])[0])
    assert not batch.parts["text"][1].any()
    assert not batch.parts["mask"][1].any()
    dropped = known.drop({"text": 1.0}, generator=torch.Generator())
    assert "text" not in steering.batch([dropped], ["small ball"], torch.device("cpu")).parts


def test_classes_are_left_out_by_chance_as_a_map_of_few_classes_leaves_them_out():
    plan = ConditionsPlan(class_dropout=0.5)
    label = torch.tensor([[0, 1], [2, 2]], dtype=torch.uint8)
    tensors = {"label": label, "valid": torch.ones(2, 2, dtype=torch.bool)}
    steering = Steering(plan, 3, [_scan()])
    seen = [steering.read("a", tensors, seed)[0].parts["mask"] for seed in range(400)]
    for kept in ((), (1,), (2,), (1, 2)):  # what synthesis makes of such a map
        asked = assemble(index=label * torch.isin(label, torch.tensor(kept)), num_classes=3).parts["mask"]
        assert np.mean([torch.equal(mask, asked) for mask in seen]) == pytest.approx(0.25, abs=0.07)
    assert torch.equal(steering.read("a", tensors, None)[0].parts["mask"][0].argmax(0), label.long())


def test_the_default_plan_is_steered_by_masks():
    assert DenoiserPlan().conditions.names == ("mask",)
    assert DenoiserPlan().conditions.needs_labels
    assert not ALL.needs_labels


def test_a_second_branch_keeps_the_grid_and_intensities_of_its_base(folder, tmp_path, tiny_plan):
    window = Normalization("window", 0.0, 255.0)
    plan = _steered(
        tiny_plan,
        ConditionsPlan(mask=False),
        label=None,
        size=(16, 12),
        normalization=window,
        autoencoder={"patch_size": (16, 12), "adversarial_weight": 0.0, "feature_weight": 0.0},
    )
    train(folder, tmp_path / "base", plan=plan, max_steps=1, device="cpu")
    train(folder, tmp_path / "one", conditions=["mask"], base=str(tmp_path / "base"), max_steps=1, device="cpu")
    again = plan_on(Generator.from_pretrained(tmp_path / "one"), read_dataset(folder), ["edge"], device="cpu")
    assert (again.size, again.normalization) == ((16, 12), window)
    with pytest.raises(BadInputError, match="conditions: expected mask, as in the plan that is followed, got edge"):
        train(folder, tmp_path / "one", conditions=["edge"], base=str(tmp_path / "base"), device="cpu")
    with pytest.raises(BadInputError, match="lora_rank: expected a base to tune"):
        train(folder, tmp_path / "other", conditions=["mask"], lora_rank=4, device="cpu")


def test_a_value_that_the_plan_does_not_know_names_its_scan_before_anything_is_learned(folder, tmp_path, tiny_plan):
    known = {"view": Attribute("category", values=("AP", "LL"))}
    plan = _steered(tiny_plan, ConditionsPlan(attributes=known))
    with pytest.raises(BadInputError, match="case case_1: view: expected one of AP, LL"):
        train(folder, tmp_path / "run", plan=plan, device="cpu")
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    train(folder, tmp_path / "skipped", plan=plan, skip_bad=True, max_steps=1, device="cpu")
    assert "case_3" in (tmp_path / "skipped" / "rejected.jsonl").read_text()
