"""``python -m medgen``, and ``accelerate launch -m medgen``."""

from __future__ import annotations

import sys

from medgen.cli import main

if __name__ == "__main__":
    sys.exit(main())
