"""``python -m difa_fx`` is the command ``difa``."""

from __future__ import annotations

import sys

from difa_fx.cli import main

if __name__ == "__main__":
    sys.exit(main())
