"""Training: from a folder of labelled scans to a generator bundle, in resumable stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medgen.training.pipeline import train as train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """Load the entry point on first use, so that single stages can be imported without the rest."""
    if name == "train":
        from medgen.training.pipeline import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
