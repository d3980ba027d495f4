from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from medgen.data.geometry import place
from medgen.generator import Generator
from medgen.synthesis import SamplingSettings, SyntheticSample, find_labels, iter_samples, plan_samples
from medgen.synthesis.labels import LabelledGrid
from medgen.synthesis.sampling import sample_batch
from medgen.types import BadInputError, Grid

SETTINGS = SamplingSettings(num_inference_steps=4, guidance_scale=2.0)
RANGE = 1000.0  # of the tiny model's intensities


def by_case(samples: list[SyntheticSample]) -> dict[str, torch.Tensor]:
    return {item.spec.case: item.image for item in samples}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_scan_depends_on_its_seed_and_not_on_its_company(
    make_generator: Callable[..., Generator], spatial_dims: int
) -> None:
    generator = make_generator(spatial_dims, image_dtype="float32")
    specs = plan_samples(6, seed=5)
    reference = by_case(list(iter_samples(generator, specs, SETTINGS, batch_size=1)))
    together = by_case(list(iter_samples(generator, specs, SETTINGS, batch_size=6)))
    backwards = by_case(list(iter_samples(generator, specs[::-1], SETTINGS, batch_size=4)))
    for case, image in reference.items():
        assert (together[case] - image).abs().max() <= 1e-3 * RANGE
        assert (backwards[case] - image).abs().max() <= 1e-3 * RANGE
    assert (reference["synthetic_00000"].std() > 0.01 * RANGE).item()
    first, second, *_ = (image for image in reference.values() if image.shape == reference["synthetic_00000"].shape)
    assert (first - second).abs().max() > 0.05 * RANGE


@pytest.mark.parametrize("matmul", ["highest", "high"])
def test_float32_is_float32_while_sampling_and_as_it_was_afterwards(
    make_generator: Callable[..., Generator], matmul: str
) -> None:
    """The default of torch lets GPUs round it to 10 bits, which moves a scan by more than 1e-3."""

    def settings() -> tuple[str, str]:
        return torch.backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision()

    before, seen = torch.get_float32_matmul_precision(), []
    torch.set_float32_matmul_precision(matmul)
    try:
        outside = settings()
        next(iter_samples(make_generator(2), plan_samples(1), SETTINGS, on_step=lambda _: seen.append(settings())))
        assert set(seen) == {("ieee", "highest")}
        assert settings() == outside == ("tf32", matmul)
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_samples_come_lazily(make_generator: Callable[..., Generator]) -> None:
    steps: list[int] = []
    stream = iter_samples(make_generator(2), plan_samples(10**5), SETTINGS, batch_size=2, on_step=steps.append)
    assert next(stream).spec.case == "synthetic_00000"
    assert next(stream).spec.case == "synthetic_00001"
    assert steps == [1, 2, 3, 4]


def test_scans_can_go_into_a_training_loop(make_generator: Callable[..., Generator]) -> None:
    made = next(iter_samples(make_generator(2), plan_samples(1), SETTINGS))
    weight = torch.ones(1, requires_grad=True)
    ((weight * made.image) ** 2 + made.label).mean().backward()
    assert weight.grad is not None
    assert not made.image.is_inference()
    assert not made.label.is_inference()


def test_a_label_stored_in_another_orientation_gives_the_same_scan_in_space(
    make_generator: Callable[..., Generator], tmp_path: Path
) -> None:
    generator = make_generator(3, image_dtype="float32")
    array = np.zeros((12, 10, 9), dtype=np.uint8)
    array[2:8, 3:7, 2:6], array[8:10, 3:7, 2:6] = 1, 2
    ras = nib.Nifti1Image(array, np.eye(4))
    target = nib.orientations.axcodes2ornt("PLS")
    turned = ras.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(ras.affine), target))
    made = []
    for name, stored in (("ras", ras), ("pls", turned)):
        (tmp_path / name).mkdir()
        nib.save(stored, tmp_path / name / "a.nii.gz")
        files, _ = find_labels(tmp_path / name, generator.config)
        item = next(iter_samples(generator, plan_samples(1, source="files", files=files), SETTINGS))
        assert np.array_equal(item.label, stored.dataobj)
        made.append(nib.as_closest_canonical(nib.Nifti1Image(item.image[0].numpy(), item.grid.affine)))
    assert np.allclose(made[0].affine, made[1].affine)
    assert np.allclose(made[0].dataobj, made[1].dataobj, atol=1e-3 * RANGE)


def test_guidance_scale_one_is_the_plain_condition_and_the_default_is_the_models_own(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator(3, image_dtype="float32", guidance_scale=2.0)
    specs = plan_samples(1)
    plain, double, own = (
        next(iter_samples(generator, specs, replace(SETTINGS, guidance_scale=scale))).image
        for scale in (1.0, 2.0, None)
    )
    assert torch.equal(double, own)
    assert (plain - own).abs().max() > 1e-3 * RANGE


def test_the_temperature_is_the_models_own_and_leaves_generated_labels_alone(
    make_generator: Callable[..., Generator],
) -> None:
    generator = make_generator(3, image_dtype="float32", temperature=0.8)
    trained, low, own = (
        next(iter_samples(generator, plan_samples(1), replace(SETTINGS, temperature=temperature)))
        for temperature in (1.0, 0.8, None)
    )
    assert torch.equal(low.image, own.image)
    assert np.array_equal(low.label, trained.label)
    assert (trained.image - own.image).abs().max() > 1e-3 * RANGE


def shift_distance(generator: Generator, channel: int, amount: float) -> None:
    """Make a class rarer: flow has x0 = noise - output, so a larger output means a smaller distance."""
    assert generator.label_denoiser is not None
    with torch.no_grad():
        generator.label_denoiser.get_parameter("network.out.2.conv.bias")[channel] += amount


def test_a_class_that_always_occurs_is_drawn_again_until_it_does(make_generator: Callable[..., Generator]) -> None:
    made = []
    for classes in ((1,), (1, 2)):
        generator = make_generator(2, constant_classes=classes)
        shift_distance(generator, 2, 2.0)
        made.append(list(iter_samples(generator, plan_samples(8), SETTINGS, batch_size=8)))
    redrawn = 0
    for free, strict in zip(*made, strict=True):
        assert {1, 2} <= set(strict.label.unique().tolist())
        if {1, 2} <= set(free.label.unique().tolist()):
            assert torch.equal(strict.label, free.label)
        else:
            redrawn += 1
            assert strict.label_record["attempt"] > free.label_record["attempt"]
    assert 0 < redrawn < 8


def test_labels_that_are_always_empty_end_in_a_clear_error(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(2, training={"steps": {"denoiser": 9, "label": 2}})
    for channel in (1, 2):
        shift_distance(generator, channel, 100.0)
    message = (
        r"synthetic_00000: expected a label map with the classes that all training scans have \(head\), in no more "
        r"parts than real ones, got none in 20 draws of the model's own label generator, trained for 2 steps\. Train "
        r"the stage 'label' for longer, or give label maps with --labels FOLDER\."
    )
    with pytest.raises(BadInputError, match=message):
        next(iter_samples(generator, plan_samples(1), SETTINGS))


def test_the_first_order_sampler_goes_by_either_name_for_the_label(make_generator: Callable[..., Generator]) -> None:
    from medgen.diffusion.objective import Objective

    generator = make_generator(2, objective=Objective(prediction="v_prediction"))
    made = next(iter_samples(generator, plan_samples(1), replace(SETTINGS, sampler="ddim")))
    assert made.image.isfinite().all()


def test_out_of_memory_names_the_setting_to_lower(make_generator: Callable[..., Generator]) -> None:
    generator = make_generator(3)
    grid = Grid((2**16,) * 3, np.eye(4))
    huge = torch.zeros(1, dtype=torch.int16).expand(grid.shape)  # no memory until it is used
    specs = plan_samples(2)
    batch = [LabelledGrid(replace(spec, source="files"), place(grid), huge, huge, {}) for spec in specs]
    with pytest.raises(
        MemoryError, match=r"memory for 2 scan\(s\) of \(65536, 65536, 65536\) voxels.* Lower batch_size"
    ):
        sample_batch(generator, batch, SETTINGS)
