"""Word that the kernels are being compiled, which happens once after an installation and takes half a minute."""

from __future__ import annotations

import sys
from pathlib import Path
from threading import Lock
from typing import Any

_lock = Lock()
_said = False


def announce(kernel: Any) -> None:
    """Say on standard error that compilation lies ahead, if there is no compiled kernel on disk; once in a process.

    Args:
        kernel: A kernel that every extraction calls, decorated with ``cache=True``.
    """
    global _said
    with _lock:
        if _said:
            return
        _said = True
        folder = Path(kernel.stats.cache_path)
        if not any(folder.glob(f"*{kernel.py_func.__name__}-*.nbi")):
            print(
                f"medgen: compiling the radiomic kernels, once after the installation; they are kept in {folder}",
                file=sys.stderr,
            )
