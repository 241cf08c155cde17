"""The manifest: what an index is, which files hold it, and the one commit point of a build.

Replaced last, by ``os.replace``, after every file it lists is on disk. No manifest, no index.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ragmoe._errors import IndexFolderError

NAME = "manifest.json"
FORMAT = 1
_BUILD = "build one: ragmoe index build SOURCE... --out DIR"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EncoderRecord(_Strict):
    """The encoder: id as users name it, sha256 of its weights, R, tokens it reads, and the prompts applied."""

    id: str
    digest: str
    width: int
    max_length: int
    query_prompt: str
    passage_prompt: str


class LongPassagesRecord(_Strict):
    """What was done with passages longer than the encoder reads, and how many there were."""

    mode: Literal["windows", "truncate"]
    window_overlap: int
    longer: int
    share: float


class ChunkingRecord(_Strict):
    """How text was cut, and how many passages are pieces of something longer."""

    words: int
    overlap: int
    rechunk: bool
    chunks: int


class FaissRecord(_Strict):
    """The FAISS factory string, why it was chosen, and the share of the exact top 20 it finds (None if exact)."""

    factory: str
    reason: str
    nprobe: int | None
    recall_at_20: float | None


class FileRecord(_Strict):
    """A data file's size and sha256."""

    bytes: int
    sha256: str


class Manifest(_Strict):
    """Everything an index says about itself; ``digest`` is the sha256 of all the rest."""

    format: int
    generation: int
    passages: int
    domains: dict[str, int]
    skipped: int
    encoder: EncoderRecord
    metric: Literal["cosine"]
    normalised: Literal[True]
    long_passages: LongPassagesRecord
    chunking: ChunkingRecord
    faiss: FaissRecord
    bm25: dict[str, Any]
    corpus_digest: str
    versions: dict[str, str]
    files: dict[str, FileRecord]
    digest: str = ""

    def sealed(self) -> Manifest:
        """The same with its digest filled in."""
        return self.model_copy(update={"digest": self._content_digest()})

    @property
    def intact(self) -> bool:
        """Whether the digest is that of the content."""
        return self.digest == self._content_digest()

    def _content_digest(self) -> str:
        return digest_of(self.model_dump(exclude={"digest"}))


def digest_of(content: Any) -> str:
    """sha256, in hex, of something's canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_record(path: Path) -> FileRecord:
    """Size and digest of a file as it is now."""
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index folder.

    Raises:
        IndexFolderError: there is none, it is damaged, or it is of another format.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IndexFolderError(_missing(folder), hint=_BUILD) from None
    except NotADirectoryError:
        raise IndexFolderError(f"{folder} is a file; an index is a folder with a {NAME}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IndexFolderError(f"{path} is damaged: {error}", hint=_rebuild(folder)) from None
    have = content.get("format") if isinstance(content, dict) else None
    if have != FORMAT:
        raise IndexFolderError(
            f"{path} is of format {have!r}, this version reads format {FORMAT}", hint=_rebuild(folder)
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IndexFolderError(f"{path} is damaged: {where}: {first['msg']}", hint=_rebuild(folder)) from None
    if not manifest.intact:
        raise IndexFolderError(
            f"{path} is damaged: its content does not have the digest it names", hint=_rebuild(folder)
        )
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write a sealed manifest beside the one in force, durably; `commit` puts it in force."""
    part = folder / f"{NAME}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    return part


def commit(folder: Path) -> None:
    """Put the manifest written last in force: the one moment at which an index changes."""
    os.replace(folder / f"{NAME}.part", folder / NAME)
    sync_folder(folder)


def sync(path: Path) -> None:
    """Bring a file's content to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _missing(folder: Path) -> str:
    if not folder.exists():
        return f"there is no index at {folder}: no such folder"
    if (folder / "partial").is_dir():
        return f"{folder} holds a build that did not finish; go on with: ragmoe index build ... --out {folder} --resume"
    have = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return f"{folder} is not an index: it has no {NAME}; it holds: {have}"


def _rebuild(folder: Path) -> str:
    return f"build it anew: ragmoe index build ... --out {folder} --overwrite"
