"""Judges of X-rays: small networks that learn view and findings from the real training scans of cxr_text.

Several networks per fold of the patients. All of them judge a scan that none has seen; a training scan is judged by
those of the fold that its patient was left out of.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import cores
from label_fidelity import Recipe, draw
from monai.networks.nets import ResNet
from torch.nn import functional as F

from medgen.data.dataset import Case
from medgen.data.intensity import Normalization
from medgen.precision import memory_format
from medgen.seeding import stream
from medgen.types import Sample

VIEW = "view AP"
LEAST_SCANS, LEAST_PATIENTS = 8, 5  # of a finding, to be a candidate
LEAST_VAL = 5  # validation scans of each answer
FOLDS, NETWORKS = 5, 2
JUDGE = Recipe((128, 128), (16, 32, 64, 128), steps=300, batch_size=16, rotation=8.0, scaling=0.1)
MARGIN = 8  # pixels by which a training scan may be moved
Scores = torch.Tensor  # (folds, scans, questions) logits


def answer(question: str, meta: Mapping[str, str], view: str = "PA") -> float:
    """1 for yes, 0 for no, NaN where the scan has no part in the question; findings are asked for one view."""
    if question == VIEW:
        return float(meta["view"].startswith("AP"))
    if meta["finding"] == "todo" or meta["view"] != view:
        return float("nan")
    return float(question in meta["finding"].split(", "))


def answers(questions: Sequence[str], metas: Sequence[Mapping[str, str]], view: str = "PA") -> torch.Tensor:
    """``(scans, questions)`` of :func:`answer`."""
    return torch.tensor([[answer(question, meta, view) for question in questions] for meta in metas])


def candidates(train: Sequence[Case]) -> list[str]:
    """Findings that enough scans and patients of the training split have."""
    names = sorted({name for case in train for name in case.meta["finding"].split(", ")})
    having = {name: [case for case in train if answer(name, case.meta) == 1] for name in names}
    return [
        name
        for name, cases in having.items()
        if len(cases) >= LEAST_SCANS and len({case.group for case in cases}) >= LEAST_PATIENTS
    ]


def deal_folds(cases: Sequence[Case], seed: int) -> list[int]:
    """Fold of each scan: patients are dealt in turn, those of one view and finding after each other."""
    kinds = {case.group: (case.meta["view"], case.meta["finding"]) for case in cases}
    mixed = sorted(kinds, key=str)
    mixed = [mixed[index] for index in torch.randperm(len(mixed), generator=stream(seed, "folds")).tolist()]
    order = sorted(mixed, key=lambda group: kinds[group])
    return [order.index(case.group) % FOLDS for case in cases]


def prepare_image(sample: Sample) -> torch.Tensor:
    """One preprocessing for real and synthetic scans: percentiles to [-1, 1], ``(1, 128, 128)``."""
    if sample.image is None:
        raise ValueError(f"{sample.case}: expected an image, got none")
    image = Normalization().fit(sample.image).forward(sample.image)
    return F.interpolate(image[None], JUDGE.crop, mode="bilinear", antialias=True, align_corners=False)[0]


def build(questions: int) -> torch.nn.Module:
    """A network that answers all questions."""
    return ResNet(
        "basic", [1, 1, 1, 1], list(JUDGE.features), spatial_dims=2, n_input_channels=1, conv1_t_size=5,
        conv1_t_stride=2, num_classes=questions,
    ).to(memory_format=memory_format(2))  # fmt: skip


def train_network(images: torch.Tensor, wanted: torch.Tensor, seed: int) -> torch.nn.Module:
    """One judge; of each question, both answers weigh the same, and scans that have no part in it weigh nothing."""
    torch.manual_seed(seed)
    network = build(wanted.shape[1]).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=JUDGE.learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, JUDGE.learning_rate, JUDGE.steps, pct_start=0.1)
    weight = torch.where(wanted == 1, 0.5 / (wanted == 1).sum(0), 0.5 / (wanted == 0).sum(0)) * len(wanted)
    weight = torch.where(wanted.isnan(), 0, weight)
    padded = F.pad(images, [MARGIN] * 4, value=-1.0)
    nowhere = torch.zeros(padded.shape[2:])
    order: list[int] = []
    for step in range(JUDGE.steps):
        generator = stream(seed, "judge", step)
        if len(order) < JUDGE.batch_size:
            order += torch.randperm(len(images), generator=generator).tolist()
        rows, order = order[: JUDGE.batch_size], order[JUDGE.batch_size :]
        batch = torch.stack([draw((padded[row], nowhere), JUDGE, generator)[0] for row in rows])
        output = network(batch.to(memory_format=memory_format(2)))
        loss = F.binary_cross_entropy_with_logits(output, wanted[rows].nan_to_num(), weight[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def load_judges(
    folder: Path, images: torch.Tensor, wanted: torch.Tensor, folds: Sequence[int], questions: Sequence[str]
) -> tuple[list[list[torch.nn.Module]], dict[str, Any]]:
    """The judges of each fold, from their checkpoint or trained now (and then kept)."""
    path = folder / "judges.pt"
    settings = json.dumps([asdict(JUDGE), MARGIN, FOLDS, NETWORKS, list(questions), list(folds)])
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["settings"] != settings:
            raise SystemExit(f"{path}: expected judges of this recipe, got another's. Remove it to train anew.")
        networks = [[build(len(questions)).eval() for _ in row] for row in kept["weights"]]
        for row, weights in zip(networks, kept["weights"], strict=True):
            for network, values in zip(row, weights, strict=True):
                network.load_state_dict(values)
        return networks, kept["training"]
    networks, began = [], time.monotonic()
    for fold in range(FOLDS):
        rows = [index for index, own in enumerate(folds) if own != fold]
        networks.append(
            [train_network(images[rows], wanted[rows], JUDGE.seed + fold * NETWORKS + k) for k in range(NETWORKS)]
        )
        print(f"judges of fold {fold + 1}/{FOLDS}, {time.monotonic() - began:.0f} s", flush=True)
    training = {
        "recipe": asdict(JUDGE),
        "folds": FOLDS,
        "networks_per_fold": NETWORKS,
        "scans": len(images),
        "seconds": round(time.monotonic() - began),
        "cores": cores(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = [[network.state_dict() for network in row] for row in networks]
    temporary = path.with_suffix(".tmp")
    torch.save({"settings": settings, "weights": weights, "training": training}, temporary)
    temporary.replace(path)
    return networks, training


@torch.inference_mode()
def score(networks: Sequence[Sequence[torch.nn.Module]], images: torch.Tensor) -> Scores:
    """Mean over the networks of each fold."""
    return torch.stack(
        [
            torch.stack([torch.cat([network(part) for part in images.split(32)]) for network in row]).mean(0)
            for row in networks
        ]
    )


def auroc(scores: torch.Tensor, wanted: torch.Tensor, groups: Sequence[str]) -> dict[str, Any]:
    """AUROC over the pairs that the networks of one fold have judged; the bootstrap draws groups.

    Args:
        scores: ``(folds, scans)``, NaN where a fold's networks may not judge a scan.
        wanted: ``(scans,)`` 1, 0, or NaN where the scan has no part.
        groups: Of each scan.
    """
    yes, no = wanted == 1, wanted == 0
    up, down = scores[:, yes, None].double(), scores[:, None, no].double()
    judged = ~(up.isnan() | down.isnan())
    right = (((up > down) + 0.5 * (up == down)) * judged).double().sum(0)
    pairs = judged.double().sum(0)
    names = sorted({group for group, part in zip(groups, (yes | no).tolist(), strict=True) if part})
    place = torch.tensor([names.index(group) if group in names else 0 for group in groups])
    generator, draws = stream(0, "bootstrap"), []
    for _ in range(2000):
        weight = torch.bincount(
            torch.randint(len(names), (len(names),), generator=generator), minlength=len(names)
        ).double()[place]
        count = weight[yes] @ pairs @ weight[no]
        if count > 0:
            draws.append(float(weight[yes] @ right @ weight[no] / count))
    low, high = torch.tensor(draws).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {
        "auroc": float(right.sum() / pairs.sum()) if pairs.sum() else float("nan"),
        "interval": [low, high],
        "n": [int(yes.sum()), int(no.sum())],
        "groups": len(names),
    }


def judge_real(
    networks: Sequence[Sequence[torch.nn.Module]],
    train: tuple[Sequence[Case], torch.Tensor],
    val: tuple[Sequence[Case], torch.Tensor],
    folds: Sequence[int],
    questions: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """For each question the AUROC on both splits, and which of them counts."""
    found: dict[str, dict[str, Any]] = {question: {} for question in questions}
    for split, (cases, images) in {"train": train, "val": val}.items():
        scores, wanted = score(networks, images), answers(questions, [case.meta for case in cases])
        if split == "train":
            unseen = torch.tensor([[own == fold for own in folds] for fold in range(FOLDS)])
            scores = scores.where(unseen[..., None], torch.nan)
        for index, question in enumerate(questions):
            column = wanted[:, index]
            if min((column == 1).sum(), (column == 0).sum()) > 0:
                groups = [case.group or case.case for case in cases]
                found[question][split] = auroc(scores[..., index], column, groups)
    for row in found.values():
        row["counts"] = "val" if "val" in row and min(row["val"]["n"]) >= LEAST_VAL else "train"
    return found
