"""The generator of a transform: named where the transform is made, loaded where and when it is first used."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medgen.bundle import find_model
from medgen.generator import Generator
from medgen.generator.loading import PIPELINE
from medgen.precision import resolve_device
from medgen.types import BadInputError

_loaded: dict[tuple[str, str], Generator] = {}
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A worker that is forked while a thread of its parent samples would wait for that thread, which it has not got.
    os.register_at_fork(after_in_child=_renew_lock)


class ModelReference:
    """A generator, or where to load it from.

    One that is named is loaded once in each process, however many transforms use it, and travels to workers as its
    name. A Generator object is used as it is; copies of the reference share it, and workers have it by forking only.

    Args:
        generator: A Generator on its device; or the folder, embedded name or Hub id of one.
        device: Where a named one is loaded, ``auto`` is the GPU if there is one; a Generator stays where it is.

    Raises:
        BadInputError: If there is no model of that name.
    """

    def __init__(self, generator: Generator | str | Path, *, device: str = "cpu") -> None:
        self.device = device
        self.generator = generator if isinstance(generator, Generator) else None
        self.name = ""
        if not isinstance(generator, Generator):
            folder = Path(generator)
            self.name = str((folder if (folder / PIPELINE).is_file() else find_model(generator)).resolve())

    @contextmanager
    def use(self) -> Iterator[Generator]:
        """Take the generator, one thread at a time.

        Yields:
            The generator.

        Raises:
            BadInputError: If it cannot be loaded.
        """
        with _lock:
            if self.generator is not None:
                yield self.generator
                return
            key = (self.name, self.device)
            if key not in _loaded:
                _loaded[key] = Generator.from_pretrained(self.name, device=resolve_device(self.device))
            yield _loaded[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelReference:
        # MONAI copies transforms for each thread.
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.generator is not None:
            raise BadInputError(
                f"generator: expected the folder or name of a model, because a transform that goes to another process "
                f"takes no weights along, got the Generator '{self.generator.config.name}' itself. Save it with "
                "save_pretrained and give the folder."
            )
        return self.__dict__
