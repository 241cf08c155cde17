"""Where the text of the language models' benchmarks is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOMAINS = ("legal", "fiction", "webdocs", "devops", "textbook", "code")


def data_folder(data: Path | None) -> Path:
    """What was named, or RAGMOE_DATA; ends the program with a clear message where neither is."""
    if data is None and not os.environ.get("RAGMOE_DATA"):
        sys.exit("error: no data was named\nhint: --data DIR, or RAGMOE_DATA=DIR: a folder with one folder a domain")
    return data or Path(os.environ["RAGMOE_DATA"])


def valid_files(data: Path | None, code: Path) -> list[str]:
    """The `valid` documents of the six domains; ends the program with a clear message where some are missing."""
    folder = data_folder(data)
    files = [(code if name == "code" else folder / name) / "valid.jsonl" for name in DOMAINS]
    if missing := [str(file) for file in files if not file.is_file()]:
        sys.exit(f"error: there is no {', '.join(missing)}\nhint: eval/experiments/lm_corpus.py makes that of code")
    return [str(file) for file in files]
