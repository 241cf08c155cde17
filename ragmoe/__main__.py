"""The program: ``ragmoe`` and ``python -m ragmoe``."""

from __future__ import annotations

import sys

from ragmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
