"""The manifest: what an index is, which files hold it, and the one commit point of a build.

Replaced last, by ``os.replace``, after every file it lists is on disk. No manifest, no index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from ragmoe._errors import IndexFolderError

NAME = "manifest.json"
FORMAT = 1
# A manifest has some kilobytes, and a line for each domain.
_MOST_BYTES = 64_000_000
_MOST_PASSAGES = 2**40
_MOST_LISTS = 2**31
_FILE = (
    r"(passages-{0}\.parquet|texts-{0}\.bin|offsets-{0}\.npy|embeddings-{0}\.npy|digests-{0}\.npy|index-{0}\.faiss"
    r"|bm25-{0}/[\w.]+)"
)
_NEEDED = ("passages-{0}.parquet", "texts-{0}.bin", "offsets-{0}.npy", "embeddings-{0}.npy", "index-{0}.faiss")
_BUILD = "build one: ragmoe index build SOURCE... --out DIR"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    #: Fields that older manifests lack: written where there is something to say, so that their digests stay.
    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_none_of_later(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = write(self)
        return {key: value for key, value in content.items() if key not in self.later or value is not None}


class EncoderRecord(_Strict):
    """The encoder: id as users name it, sha256 of its weights, R, tokens it reads, and the prompts applied.

    Attributes:
        settings: sha256 of its pooling and other settings; None where it has none to say, and of earlier versions.
    """

    id: str
    digest: str
    width: int
    max_length: int
    query_prompt: str
    passage_prompt: str
    settings: str | None = None

    later = frozenset({"settings"})


class EncodingRecord(_Strict):
    """How passages were encoded. Queries are always encoded in float32.

    Attributes:
        precision: of the encoder's weights.
        batch_tokens: tokens in a batch, padding included.
        chosen: by a calibration, by whoever built it, or because there was too little to choose by.
        speed: of bf16 over fp32, as calibrated; None where it was not.
        cosine: mean cosine of the calibration's passages in bf16 to float32; where bf16 is so slow that it was soon
            seen, that of the beginning of one.
    """

    precision: Literal["fp32", "bf16"]
    batch_tokens: int = Field(ge=1)
    chosen: Literal["calibrated", "asked", "default"]
    speed: float | None = None
    cosine: float | None = None


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
    """The FAISS factory string, why it was chosen, and how it is searched: all but the first two None if exact.

    Attributes:
        nprobe: the lists that are visited.
        depth: the candidates that are ranked again by the stored embeddings for the best 20.
        recall_at_20: the share of the exact top 20 of stored passages, asked as queries, that is found so.
    """

    factory: str
    reason: str
    nprobe: int | None = Field(ge=1, le=_MOST_LISTS)
    depth: int | None = Field(default=None, ge=1, le=_MOST_LISTS)
    recall_at_20: float | None

    later = frozenset({"depth"})


class FileRecord(_Strict):
    """A data file's size and sha256."""

    bytes: int
    sha256: str


class Manifest(_Strict):
    """Everything an index says about itself; ``digest`` is the sha256 of all the rest."""

    format: int
    generation: int = Field(ge=1)
    passages: int = Field(ge=1, le=_MOST_PASSAGES)
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
    encoding: EncodingRecord | None = None
    digest: str = ""

    later = frozenset({"encoding"})

    @field_validator("files")
    @classmethod
    def _only_its_own(cls, files: dict[str, FileRecord], info: ValidationInfo) -> dict[str, FileRecord]:
        """Names of files are read from here: they are those of the generation, and none leads elsewhere."""
        generation = info.data.get("generation", 0)
        for name in files:
            if not re.fullmatch(_FILE.format(generation), name) or ".." in name:
                raise ValueError(f"{name!r} is no file of generation {generation}")
        for name in _NEEDED:
            if name.format(generation) not in files:
                raise ValueError(f"{name.format(generation)!r} is not among them")
        return files

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


def generation_of(name: str) -> int | None:
    """The generation, from 1, of a file or folder by its name in an index's folder; None for what is no index's."""
    number = re.search(r"-([1-9]\d*)(?:\.|$)", name)
    # What lies in the one folder is listed by its path.
    if number and re.fullmatch(_FILE.format(number[1]), name if "." in name else f"{name}/x"):
        return int(number[1])
    return None


def is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of an index, of whatever format: other tools have a ``manifest.json`` too."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "generation", "files"} <= content.keys()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index folder.

    Raises:
        IndexFolderError: there is none, it is damaged, or it is of another format.
    """
    path = folder / NAME
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise IndexFolderError(f"{path} has {size} bytes; expected at most {_MOST_BYTES}", hint=_rebuild(folder))
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _missing(folder) from None
    except NotADirectoryError:
        raise IndexFolderError(f"{folder} is a file; an index is a folder with a {NAME}") from None
    except (ValueError, RecursionError) as error:
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


def manifest_text(manifest: Manifest) -> str:
    """What the file of a manifest holds, to the byte."""
    return json.dumps(manifest.model_dump(), indent=2, ensure_ascii=False) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write a sealed manifest beside the one in force, durably; `commit` puts it in force."""
    part = folder / f"{NAME}.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(manifest_text(manifest))
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


def pulled_beside(folder: Path, kind: str) -> Path:
    """What a pull has beside an index's folder: its ``lock``, its ``part``, and as ``old`` what it replaces."""
    return folder.with_name(f".{folder.name}.pull-{kind}")


def _missing(folder: Path) -> IndexFolderError:
    if not folder.exists():
        old = pulled_beside(folder.resolve(), "old")
        if old.exists():
            return IndexFolderError(
                f"there is no index at {folder}: a pull that was to replace it did not finish, and it lies in {old}",
                hint=f"put it back: mv {old} {folder}; or give the pull again",
            )
        return IndexFolderError(f"there is no index at {folder}: no such folder", hint=_BUILD)
    if (folder / "partial").is_dir():
        return IndexFolderError(
            f"{folder} holds a build that did not finish",
            hint=f"go on with: ragmoe index build SOURCE... --out {folder} --resume",
        )
    have = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    return IndexFolderError(f"{folder} is not an index: it has no {NAME}; it holds: {have}", hint=_BUILD)


def _rebuild(folder: Path) -> str:
    return f"build it anew: ragmoe index build ... --out {folder} --overwrite"
