"""Work side by side on all cores, each piece of it in a thread of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def single_threaded() -> Iterator[None]:
    """Compute with one thread: small matrices lose more than they gain where threads wait for each other.

    Yields:
        Nothing.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def side_by_side(workers: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """Threads that do not fight over the cores: inside, torch and linear algebra take one thread to a task.

    Args:
        workers: Number of threads; None takes one per core.

    Yields:
        The pool. Tasks that have not begun when the block is left are not begun.
    """
    with single_threaded(), ThreadPoolExecutor(workers or cores()) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
