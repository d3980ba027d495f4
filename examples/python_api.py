"""The parts one by one: a label map, a condition, noise from a seed, guidance, a sampler, and the scan in its units.

python examples/python_api.py --output api
"""

import argparse
from pathlib import Path

import torch

from medgen import Generator
from medgen.conditions.condition import Condition
from medgen.conditions.mask import one_hot
from medgen.data.io import write_image, write_label
from medgen.diffusion.guidance import Guided
from medgen.diffusion.sampler import sample
from medgen.seeding import seeded_noise
from medgen.types import Grid


def main() -> None:
    """Draw a label map with the embedded model, then two scans of it that differ in their seed alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="hippocampus-mr-3d")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    generator = Generator.from_pretrained(arguments.model)
    config = generator.config
    shape = config.size

    with torch.inference_mode():
        # A label map: signed distances from noise, inside a field of view that is the whole grid.
        valid = torch.ones(1, 1, *shape)
        distances = sample(
            lambda x, t: generator.denoise_label(x, t, valid),
            seeded_noise(generator.label_shape(shape), seeds=[0]),
            objective=config.label_objective,
            num_inference_steps=arguments.steps,
        )
        index = generator.decode_label(distances)

        # Two scans of it, in one batch. A scan depends on its own seed, not on its neighbor.
        mask = one_hot(index.long(), generator.num_classes).repeat(2, *[1] * (len(shape) + 1))
        chain, scales = Condition({"mask": mask}).chain(config.guidance_scale)
        latents = sample(
            Guided(generator.denoise, chain, scales),
            seeded_noise(generator.latent_shape(shape), seeds=[1, 2]),
            objective=config.objective,
            temperature=config.temperature,
            num_inference_steps=arguments.steps,
        )
        images = generator.decode(latents)

    spacing = config.spacing or (1.0,) * len(shape)
    grid = Grid(shape, torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64)).numpy())
    write_label(arguments.output / "label.nii.gz", generator.index_to_label(index[0]), grid)
    for number, image in enumerate(images):
        path = arguments.output / f"scan_{number}.nii.gz"
        write_image(path, config.intensity.inverse(image), grid, dtype=config.image_dtype)
        print(path)


if __name__ == "__main__":
    main()
