"""Indexes: build, open, search, verify. ``Index.open(folder).neighbours(questions)``."""

from __future__ import annotations

from ragmoe.index.build import BuildOptions, build_index, plan_build
from ragmoe.index.change import plan_add, plan_merge, plan_remove
from ragmoe.index.encoder import Encoder, load_encoder
from ragmoe.index.export import export_index
from ragmoe.index.folder import Hit, Index
from ragmoe.index.given import ImportOptions, plan_import
from ragmoe.index.hub import pull_index, push_index
from ragmoe.index.manifest import Manifest
from ragmoe.index.retrievers import Retriever, retriever_names
from ragmoe.index.verify import verify_index

__all__ = [
    "BuildOptions",
    "Encoder",
    "Hit",
    "ImportOptions",
    "Index",
    "Manifest",
    "Retriever",
    "build_index",
    "export_index",
    "load_encoder",
    "plan_add",
    "plan_build",
    "plan_import",
    "plan_merge",
    "plan_remove",
    "pull_index",
    "push_index",
    "retriever_names",
    "verify_index",
]
