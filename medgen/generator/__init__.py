"""The bundle: one folder that holds the networks of a generator and everything needed to use them."""

from medgen.generator.config import ControlUse, GeneratorConfig
from medgen.generator.generator import Generator

__all__ = ["ControlUse", "Generator", "GeneratorConfig"]
