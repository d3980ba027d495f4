"""How several processes share one run, and what of the process decides the rounding."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from medgen.precision import resolve_device

if TYPE_CHECKING:
    from accelerate import PartialState


class Alone:
    """Stands in accelerate's place for a single process, so that no process group is opened for it."""

    is_main_process = True
    process_index = 0
    num_processes = 1

    def wait_for_everyone(self) -> None:
        """There is nobody to wait for."""


def join_processes(device: str) -> tuple[PartialState | Alone, torch.device]:
    """Find this process's place among those that ``accelerate launch`` started.

    Args:
        device: The user's choice, as for :func:`medgen.precision.resolve_device`.

    Returns:
        State with ``process_index``, ``num_processes`` and ``wait_for_everyone``, and this process's device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone(), resolve_device(device)
    from accelerate import PartialState

    state = PartialState(cpu=resolve_device(device).type == "cpu")
    return state, state.device


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with this many threads: their number decides how sums are split, and so their rounding.

    Args:
        number: Threads of torch's CPU kernels.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
