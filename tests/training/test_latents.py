"""What denoisers learn from has mean 0 and variance 1 over all scans, not over the first ones of a folder."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from medgen.data.intensity import Normalization
from medgen.generator import Generator
from medgen.planning import ConditionsPlan
from medgen.seeding import spread
from medgen.training import latents, train
from medgen.types import BadInputError


def test_evenly_spaced_rows():
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread("abc", 5) == ["a", "b", "c"]
    assert spread([], 4) == []


@pytest.mark.parametrize(("bright", "balance"), [(8, None), (4, "site")])
def test_latents_of_all_modalities_have_mean_0_and_variance_1(tmp_path, tiny_plan, monkeypatch, bright, balance):
    monkeypatch.setattr(latents, "MEASURED", 8)
    data, rng = tmp_path / "data", np.random.default_rng(0)
    (data / "images").mkdir(parents=True)
    rows = []
    for index in range(17):
        site = "dark" if index < 16 - bright else "bright"
        array = rng.normal(20 if site == "dark" else 220, 4, (16, 16)).clip(0, 255).astype(np.uint8)
        Image.fromarray(array).save(data / "images" / f"{index:02d}.png")
        split = "val" if index == 16 else "train"
        rows.append({"id": f"{index:02d}", "image": f"images/{index:02d}.png", "site": site, "split": split})
    with (data / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    plan = tiny_plan(
        denoiser={"balance": balance, "conditions": ConditionsPlan(mask=False)},
        class_names={0: "background"},
        normalization=Normalization(method="window", low=0, high=255),
        label=None,
    )
    run = tmp_path / "run"
    generator = Generator.from_pretrained(train(data, run, plan=plan, device="cpu", max_steps=1))
    dark, lit = (
        torch.cat(
            [
                generator.encode(torch.from_numpy(np.array(Image.open(data / row["image"])))[None, None] / 127.5 - 1)
                for row in rows[:16]
                if row["site"] == site
            ]
        )
        .transpose(0, 1)
        .flatten(1)
        for site in ("dark", "bright")
    )
    # As often as they are drawn, which is equally often in either case. The first eight scans are dark alone.
    mean = (dark.mean(1) + lit.mean(1)) / 2
    square = (dark.square().mean(1) + lit.square().mean(1)) / 2
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=0.15)
    torch.testing.assert_close(square, torch.ones_like(square), rtol=0, atol=0.15)
    # What a denoiser has begun to learn from cannot be measured anew.
    shutil.rmtree(run / "model")
    train(data, run, plan=plan, device="cpu", max_steps=1)
    assert Generator.from_pretrained(run).config.latent_shift == generator.config.latent_shift
    shutil.rmtree(run / "model")
    (run / "latents.json").unlink()
    with pytest.raises(BadInputError, match=r"expected the spread of the latents .* Train in a new folder"):
        train(data, run, plan=plan, device="cpu", max_steps=1)
