"""``config.json`` and ``generation_config.json`` of a bundle: copies of what the map says, for other tools."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ragmoe.bundle._files import write_text
from ragmoe.bundle._map import THRESHOLDS, BundleMap

# What families of decoders call the number of experts in their configurations.
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def refresh_config(folder: Path, map_: BundleMap) -> None:
    """Bring the copies that are there up to the map; call it under the lock that the map was replaced under."""
    path = folder / "config.json"
    if path.is_file():
        config = _read(path)
        config |= map_.extra.get("config", {})
        config |= {**counted(config, len(map_.experts)), "expert_ids": map_.expert_ids}
        config["expert_names"] = map_.expert_names
        if "no_answer_threshold" in config:
            config["expert_thresholds"] = own_thresholds(map_)
        config["encoder"] = map_.encoder.model_dump() if map_.encoder else None
        config["index_digest"] = map_.index
        write_text(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    path = folder / "generation_config.json"
    if path.is_file() and (generation := map_.extra.get("generation")):
        write_text(path, json.dumps(generation, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    """What stands in a copy; nothing where it is damaged: the map, which it follows, holds all that a model needs."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def counted(config: Mapping[str, Any], experts: int) -> dict[str, int]:
    """The number of experts as a configuration calls it."""
    return dict.fromkeys([name for name in _COUNTS if name in config] or ["experts"], experts)


def own_thresholds(map_: BundleMap) -> list[float | None] | None:
    """The no-answer thresholds as a configuration has them: one an expert, or None where no expert has its own."""
    own = map_.extra.get(THRESHOLDS)
    return [own.get(str(id)) for id in map_.expert_ids] if own and map_.experts else None
