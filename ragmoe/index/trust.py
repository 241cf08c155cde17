"""FAISS files that this user wrote: no other is ever parsed.

faiss trusts what it reads, and a manifest can be forged together with the file it names. So the digest of each FAISS
file that is written here is noted in a list of the user's own, outside of any index. Where an index's file is not on
it, as after a download, its FAISS side is built anew from the embeddings, which are plain numbers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ragmoe._errors import IndexFolderError
from ragmoe._folders import cache_folder, state_folder
from ragmoe.index.manifest import FaissRecord, FileRecord, digest_of, file_record
from ragmoe.index.vectors import Choice, FaissSearcher, build_faiss, choose_factory

logger = logging.getLogger(__name__)
_LIST = "faiss-files-written-here"
# After so long without use, what was built for an index is removed from the cache when another is built.
_KEPT_SECONDS = 90 * 24 * 3600


def remember(digest: str) -> None:
    """Note that this user wrote a FAISS file of this sha256; where no list can be kept, it will be built anew."""
    # Without a home folder there is a RuntimeError.
    with contextlib.suppress(OSError, RuntimeError):
        path = state_folder() / _LIST
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One write of one line, so that several processes may do it at a time.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, f"{digest}\n".encode())
        finally:
            os.close(handle)


def is_ours(digest: str) -> bool:
    """Whether this user wrote a FAISS file of this sha256."""
    try:
        with (state_folder() / _LIST).open(encoding="ascii") as file:
            about = os.fstat(file.fileno())
            # What others could have written to says nothing.
            if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
                return False
            return any(line.rstrip() == digest for line in file)
    except (OSError, RuntimeError, ValueError):
        return False


def rebuilt(embeddings: NDArray[np.float16], path: Path, expected: FileRecord) -> FaissSearcher:
    """The FAISS side of an index whose own FAISS file is not trusted.

    An exact one is made in memory. Any other is kept in the user's cache, and said on stderr: it takes its time. What
    was not used for 90 days goes from there when another comes.

    Args:
        embeddings: float16 (passages, R), mapped.
        path: their file.
        expected: what the manifest says of it.

    Raises:
        IndexFolderError: the embeddings are damaged, or the cache cannot be written.
    """
    choice = choose_factory(*embeddings.shape)
    if choice.factory == "Flat":
        record = FaissRecord(factory=choice.factory, reason=choice.reason, nprobe=None, recall_at_20=None)
        return FaissSearcher(None, embeddings, record)
    kept = cache_folder() / "faiss" / f"{digest_of([expected.sha256, choice.factory])[:32]}.faiss"
    record_path = kept.with_suffix(".json")
    try:
        record = FaissRecord.model_validate_json(record_path.read_bytes())
        if is_ours(file_record(kept).sha256):
            os.utime(record_path)
            return FaissSearcher(kept, embeddings, record)
    except (OSError, ValidationError):
        pass
    # Checked against what it is kept under: else a forged index could put its vectors in the place of another's.
    if file_record(path) != expected:
        raise IndexFolderError(
            f"{path.parent} is damaged: {path.name} was changed", hint=f"see: ragmoe index verify {path.parent}"
        )
    logger.warning(
        f"{path.parent}: its FAISS file was not written by this user, so it is not read; an own one of "
        f"{len(embeddings):,} vectors ({choice.factory}) is built from the embeddings, once, and kept as {kept}"
    )
    try:
        _forget_unused(kept.parent)
        return FaissSearcher(kept, embeddings, _build(kept, record_path, embeddings, choice))
    except OSError as error:
        raise IndexFolderError(
            f"{kept} cannot be written: {error.strerror or error}",
            hint="export RAGMOE_CACHE=DIR names another place",
        ) from error


def _build(kept: Path, record_path: Path, embeddings: NDArray[np.float16], choice: Choice) -> FaissRecord:
    kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part")
    try:
        record = build_faiss(part, embeddings, choice, lambda done: None)
        remember(file_record(part).sha256)
        part.replace(kept)
        part.write_text(record.model_dump_json(), encoding="utf-8")
        part.replace(record_path)
    finally:
        part.unlink(missing_ok=True)
    return record


def _forget_unused(cache: Path) -> None:
    oldest = time.time() - _KEPT_SECONDS
    for record_path in cache.glob("*.json"):
        # Another process may have removed it at this moment.
        with contextlib.suppress(FileNotFoundError):
            if record_path.stat().st_mtime < oldest:
                record_path.with_suffix(".faiss").unlink(missing_ok=True)
                record_path.unlink()
