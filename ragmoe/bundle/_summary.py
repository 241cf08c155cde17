"""``bundle.json``: what the map says, short enough to read. Derived; nothing reads it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ragmoe.bundle._map import BundleMap, expert_file

SUMMARY_NAME = "bundle.json"


def summary(map_: BundleMap, folder: Path) -> str:
    """The text of ``bundle.json``."""
    sizes = {file: (folder / file).stat().st_size for file in sorted(map_.files())}
    last = map_.lineage[-1]
    experts: list[dict[str, Any]] = [
        {**expert.model_dump(), "bytes": sizes.get(expert_file(expert.id, expert.version), 0)}
        for expert in map_.experts
    ]
    content = {
        "note": "Derived from model.safetensors.index.json; changing this file changes nothing.",
        "version": map_.version,
        "written": last.time,
        "changed": last.changed,
        "message": last.message,
        "experts": experts,
        "gate_version": map_.gate_version,
        "base_version": map_.base_version,
        "encoder": map_.encoder.model_dump() if map_.encoder else None,
        "index": map_.index,
        "extra": map_.extra,
        "tensors": len(map_.weight_map),
        "tensor_bytes": map_.total_size,
        "files": sizes,
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
