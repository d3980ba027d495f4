"""What synthetic scans are worth for training, with the controls that matter."""

from medgen.trial.run import utility

__all__ = ["utility"]
