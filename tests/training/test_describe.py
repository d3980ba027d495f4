"""What a generator is told of its training scans, where some of them are larger than its size."""

import pytest

from medgen.planning import DenoiserPlan, Plan
from medgen.training.cache import CachedScan
from medgen.training.describe import describe_generator


def scan(size: int, parts: int) -> CachedScan:
    return CachedScan("a", "a", "a", (size, size), (1.0, 1.0), (1.0,), (0.0,), (0, 1), parts)


@pytest.mark.parametrize(("sizes", "known"), [((16, 16, 20), True), ((16, 20, 20), False)])
def test_scans_that_fit_speak_for_the_others_unless_most_are_cropped(sizes, known):
    plan = Plan(
        name="tiny",
        spatial_dims=2,
        channel_names={0: "image"},
        class_names={0: "background", 1: "box"},
        size=(16, 16),
        autoencoder=None,
        denoiser=DenoiserPlan(),
    )
    scans = [scan(size, parts=1 if size == 16 else 9) for size in sizes]
    config = describe_generator(plan, "data", scans, 0, seed=0)
    assert (config.constant_classes, config.max_parts) == (((1,), 1) if known else ((), 0))
