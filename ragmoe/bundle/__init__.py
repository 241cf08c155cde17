"""Saved models: a sharded Hugging Face checkpoint with one file an expert, and one map that commits it.

The folder::

    model.safetensors.index.json    the map: which file holds which tensor, and all that is known of the experts
    base-1-00001-of-00001.safetensors
    gate.1.safetensors
    expert.0.1.safetensors          expert 0, version 1
    maps/1.json                     maps that were replaced; their files stay
    bundle.json                     what the map says, for people; derived
    experts/8/                      how expert 8, which was added later, was trained

Files are never changed once the map lists them. Publishing is one ``os.replace`` of the map.
"""

from __future__ import annotations

from ragmoe.bundle._map import MAP_NAME, THRESHOLDS, BundleMap, EncoderRef, ExpertEntry, LineageStep
from ragmoe.bundle.experts import ExpertInfo, list_experts, prune_experts, rename_expert, show_expert
from ragmoe.bundle.merging import Merge, merge_experts
from ragmoe.bundle.read import ExpertFiles, is_bundle, read_bundle, read_map, verify_bundle
from ragmoe.bundle.taking import take_experts
from ragmoe.bundle.versions import list_versions, lock_experts, roll_back
from ragmoe.bundle.write import write_bundle

__all__ = [
    "MAP_NAME",
    "THRESHOLDS",
    "BundleMap",
    "EncoderRef",
    "ExpertEntry",
    "ExpertFiles",
    "ExpertInfo",
    "LineageStep",
    "Merge",
    "is_bundle",
    "list_experts",
    "list_versions",
    "lock_experts",
    "merge_experts",
    "prune_experts",
    "read_bundle",
    "read_map",
    "rename_expert",
    "roll_back",
    "show_expert",
    "take_experts",
    "verify_bundle",
    "write_bundle",
]
