"""Building an index: read and check everything, estimate, encode in blocks that survive a kill, commit by the manifest.

Nothing is written before the sources were read whole. Files carry a new generation in their names, so the index in
force stays readable until the manifest is replaced; only then are older generations removed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from ragmoe._errors import DataError, IndexFolderError, IndexLockedError
from ragmoe._folders import expect_folder
from ragmoe._version import __version__
from ragmoe.corpus.chunking import Chunk
from ragmoe.corpus.passages import OnError, read_passages
from ragmoe.corpus.types import Passage
from ragmoe.index import bm25, memory
from ragmoe.index import manifest as manifests
from ragmoe.index._crash import reached
from ragmoe.index.blocks import Blocks, Encoded, OldVectors
from ragmoe.index.encoder import DEFAULT_ENCODER, Encoder, load_encoder
from ragmoe.index.folder import embeddings_name, faiss_name
from ragmoe.index.manifest import ChunkingRecord, EncoderRecord, FaissRecord, LongPassagesRecord, Manifest
from ragmoe.index.store import corpus_digest, write_store
from ragmoe.index.vectors import Choice, build_faiss, choose_factory
from ragmoe.index.windows import OVERLAP, LongPassages, cut_windows, encode_passages, encoder_text

#: Called with a stage, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_DATA_FILE = re.compile(r"^(passages|texts|offsets|embeddings|index|bm25)-(\d+)(\.\w+)?$")
# ``.neighbours`` is where training keeps what it retrieved; it is keyed by the index's digest.
_OURS = {manifests.NAME, f"{manifests.NAME}.part", "build.lock", "partial", ".neighbours", memory.FOLDER}
_VERSIONS = ("faiss-cpu", "sentence-transformers", "transformers", "torch", "bm25s", "numpy", "pyarrow")
_ESTIMATE_SAMPLE = 512
_REPLACE = "replace it with --overwrite, or name another folder with --out"


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build an index of, and how.

    Attributes:
        sources: files, folders, globs, or ``hub:NAME[:CONFIG][:SPLIT]``.
        out: the index folder.
        encoder: ``minilm``, a sentence-transformers folder, a Hub id, or an `Encoder`.
        domain: of records that name none.
        rechunk: cut also passages that bring an id.
        long_passages: ``windows`` (token-weighted mean of overlapping windows) or ``truncate`` for passages longer
        than the encoder reads.
        resume: go on with a build that was stopped.
        overwrite: replace the index that is there.
    """

    sources: tuple[str, ...]
    out: Path
    encoder: str | Encoder = DEFAULT_ENCODER
    domain: str | None = None
    chunk_words: int = 200
    chunk_overlap: int = 40
    rechunk: bool = False
    on_error: OnError = "fail"
    long_passages: LongPassages = "windows"
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """What a build will do: everything is read and checked, nothing is written.

    Attributes:
        chunks: the passages, in order.
        skipped: bad lines passed over.
        longer_share: estimated share of passages longer than the encoder reads, from a sample.
        disk_bytes: estimated size of the finished folder.
        memory_bytes: estimated memory at the peak, the encoder's own left out.
    """

    options: BuildOptions
    encoder: Encoder
    chunks: list[Chunk]
    skipped: list[str]
    domains: dict[str, int]
    choice: Choice
    longer_share: float
    disk_bytes: int
    memory_bytes: int

    @property
    def cut(self) -> int:
        """How many passages are pieces of something longer."""
        return sum(chunk.source_id != chunk.passage.id for chunk in self.chunks)

    def run(self, progress: Progress | None = None) -> Manifest:
        """Build the index and return its manifest; see `build_index` for the errors."""
        return _Build(self, progress or (lambda stage, done, total: None)).run()


def plan_build(options: BuildOptions) -> BuildPlan:
    """Read and check all sources and estimate the work; writes nothing."""
    _check_target(options)
    reader = read_passages(
        options.sources,
        domain=options.domain,
        chunk_words=options.chunk_words,
        chunk_overlap=options.chunk_overlap,
        rechunk=options.rechunk,
        on_error=options.on_error,
    )
    chunks = list(reader.chunks())
    if not chunks:
        skipped = (
            f"; {len(reader.skipped)} bad lines were skipped, the first: {reader.skipped[0]}" if reader.skipped else ""
        )
        raise DataError(f"no passages in {', '.join(options.sources) or 'no source at all'}{skipped}")
    encoder = load_encoder(options.encoder)
    choice = choose_factory(len(chunks), encoder.width)
    text = sum(len(chunk.passage.text.encode()) for chunk in chunks)
    return BuildPlan(
        options=options,
        encoder=encoder,
        chunks=chunks,
        skipped=reader.skipped,
        domains=dict(sorted(Counter(chunk.passage.domain for chunk in chunks).items())),
        choice=choice,
        longer_share=_longer_share(chunks, encoder),
        # Texts once plain and once compressed; BM25 takes about as much as the text, a number for each distinct word.
        disk_bytes=len(chunks) * (2 * encoder.width + choice.bytes_each) + int(2.6 * text),
        memory_bytes=len(chunks) * (choice.bytes_each + 1000) + 6 * text,
    )


def build_index(options: BuildOptions, *, progress: Progress | None = None) -> Manifest:
    """Build an index folder.

    Raises:
        DataError: a bad line or source, or no passages at all; nothing was written.
        ConfigError: there is no such encoder.
        IndexLockedError: somebody else is building this index.
        IndexFolderError: the folder holds an index and ``overwrite`` is not set, or it cannot be written.
    """
    return plan_build(options).run(progress)


class _Build:
    """One run of a plan, under the lock."""

    def __init__(self, plan: BuildPlan, progress: Progress) -> None:
        self.plan = plan
        self.options = plan.options
        self.folder = plan.options.out
        self.encoder = plan.encoder
        self.progress = progress
        self.passages = [chunk.passage for chunk in plan.chunks]
        self.corpus_digest = corpus_digest(self.passages)
        self.blocks = Blocks(self.folder / "partial", manifests.digest_of([self.corpus_digest, self._encoding()]))

    def run(self) -> Manifest:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "build.lock", timeout=0):
                reached("locked")
                # Once more: somebody else may have finished a build since the plan was made.
                _check_target(self.options)
                return self._finished() or self._build()
        except Timeout:
            raise IndexLockedError(
                f"{self.folder} is locked: another process is building this index", hint="wait until it has finished"
            ) from None
        except OSError as error:
            raise IndexFolderError(
                f"{self.folder} cannot be written: {error.strerror or error}; an index that was there is untouched",
                hint="make room or mend the rights, then go on with --resume",
            ) from error

    def _finished(self) -> Manifest | None:
        """With ``resume``: the index in force if it is what was asked for (a build that died after its commit)."""
        now = _current(self.folder)
        if not self.options.resume or now is None:
            return None
        if (now.corpus_digest, _encoding(now)) == (self.corpus_digest, self._encoding()):
            _clean(self.folder, now)
            return now
        if not (self.options.overwrite or self.blocks.begun):
            raise IndexFolderError(
                f"{self.folder} holds an index already, and no stopped build of these sources", hint=_REPLACE
            )
        return None

    def _build(self) -> Manifest:
        generation = 1 + max((number for _, number in _data_files(self.folder)), default=0)
        windows = self._embed(self.folder / embeddings_name(generation))
        reached("encoded")
        total = len(self.passages)
        self.progress("passages", 0, total)
        names = write_store(self.folder, generation, self.plan.chunks, windows)
        self.progress("passages", total, total)
        reached("passages")
        embeddings = np.load(self.folder / embeddings_name(generation), mmap_mode="r", allow_pickle=False)
        faiss_record = build_faiss(
            self.folder / faiss_name(generation),
            embeddings,
            self.plan.choice,
            lambda n: self.progress("faiss", n, total),
        )
        reached("faiss")
        self.progress("bm25", 0, total)
        words = bm25.build_bm25(self.folder / bm25.bm25_name(generation), [encoder_text(p) for p in self.passages])
        self.progress("bm25", total, total)
        reached("bm25")
        names += [embeddings_name(generation), faiss_name(generation)]
        names += [path.relative_to(self.folder).as_posix() for path in words]
        for name in names:
            manifests.sync(self.folder / name)
        manifests.sync_folder(self.folder / bm25.bm25_name(generation))
        manifest = self._manifest(generation, names, windows, faiss_record)
        manifests.write_manifest(self.folder, manifest)
        reached("manifest-written")
        manifests.commit(self.folder)
        reached("committed")
        _clean(self.folder, manifest)
        reached("cleaned")
        return manifest

    def _embed(self, target: Path) -> NDArray[np.int64]:
        """Write the embeddings, block by block; returns the windows of each passage, int64 (passages,)."""
        blocks = self.blocks
        blocks.start(resume=self.options.resume)
        now = _current(self.folder)
        same = now is not None and _encoding(now) == self._encoding()
        old = OldVectors(self.folder, now if same else None, embeddings_name(now.generation if now else 0))
        total = len(self.passages)
        windows = np.zeros(total, dtype=np.int64)
        with target.open("wb") as file:
            # Written, not mapped: a full disk raises here, where a mapped file would kill the process.
            np.lib.format.write_array_header_1_0(file, _npy_header((total, self.encoder.width)))
            for number, start in enumerate(range(0, total, blocks.size)):
                rows = slice(start, min(start + blocks.size, total))
                block = blocks.read(number)
                if block is None:
                    block = self._encode(self.passages[rows], old)
                    blocks.write(number, block)
                    reached("block")
                vectors, windows[rows] = block
                file.write(np.ascontiguousarray(vectors).tobytes())
                self.progress("encode", rows.stop, total)
        return windows

    def _encode(self, passages: Sequence[Passage], old: OldVectors) -> Encoded:
        rows = old.find(passages)
        known, new = rows >= 0, np.flatnonzero(rows < 0)
        vectors = np.zeros((len(passages), self.encoder.width), dtype=np.float16)
        windows = np.zeros(len(passages), dtype=np.int64)
        if known.any():
            vectors[known], windows[known] = old.take(rows[known])
        if len(new):
            vectors[new], windows[new] = encode_passages(
                [passages[i] for i in new.tolist()],
                self.encoder,
                mode=self.options.long_passages,
                prompt=self.encoder.prompts["passage"],
            )
        return vectors, windows

    def _encoding(self) -> list[object]:
        return [self._encoder_record().model_dump(), self.options.long_passages, OVERLAP]

    def _encoder_record(self) -> EncoderRecord:
        encoder = self.encoder
        return EncoderRecord(
            id=encoder.id,
            digest=encoder.digest,
            width=encoder.width,
            max_length=encoder.max_length,
            query_prompt=encoder.prompts["query"],
            passage_prompt=encoder.prompts["passage"],
        )

    def _manifest(self, generation: int, names: list[str], windows: NDArray[np.int64], faiss: FaissRecord) -> Manifest:
        options, total = self.options, len(self.passages)
        longer = int((windows > 1).sum())
        return Manifest(
            format=manifests.FORMAT,
            generation=generation,
            passages=total,
            domains=self.plan.domains,
            skipped=len(self.plan.skipped),
            encoder=self._encoder_record(),
            metric="cosine",
            normalised=True,
            long_passages=LongPassagesRecord(
                mode=options.long_passages, window_overlap=OVERLAP, longer=longer, share=round(longer / total, 4)
            ),
            chunking=ChunkingRecord(
                words=options.chunk_words,
                overlap=options.chunk_overlap,
                rechunk=options.rechunk,
                chunks=self.plan.cut,
            ),
            faiss=faiss,
            bm25=bm25.SETTINGS,
            corpus_digest=self.corpus_digest,
            versions={"ragmoe": __version__, **{name: version(name) for name in _VERSIONS}},
            files={name: manifests.file_record(self.folder / name) for name in sorted(names)},
        ).sealed()


def _npy_header(shape: tuple[int, int]) -> dict[str, object]:
    return {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float16)), "fortran_order": False, "shape": shape}


def _encoding(manifest: Manifest) -> list[object]:
    """What decides a passage's vector: two builds with the same have the same vectors for the same text."""
    return [manifest.encoder.model_dump(), manifest.long_passages.mode, manifest.long_passages.window_overlap]


def _check_target(options: BuildOptions) -> None:
    """Refuse a folder that holds an index, unless it may be replaced, or that holds other things."""
    folder = options.out
    there = expect_folder(folder, IndexFolderError)
    if not os.access(there, os.W_OK | os.X_OK):
        raise IndexFolderError(f"{folder} cannot be written: {there} is not writable", hint="name another with --out")
    if not folder.is_dir():
        return
    others = sorted(
        path.name for path in folder.iterdir() if path.name not in _OURS and not _DATA_FILE.match(path.name)
    )
    if others:
        raise IndexFolderError(
            f"{folder} holds other things than an index: {', '.join(others[:8])}", hint="name a new folder with --out"
        )
    if (folder / manifests.NAME).exists() and not (options.overwrite or options.resume):
        raise IndexFolderError(f"{folder} holds an index already", hint=_REPLACE)


def _current(folder: Path) -> Manifest | None:
    """The manifest in force, None where there is none or it cannot be read."""
    try:
        return manifests.read_manifest(folder)
    except IndexFolderError:
        return None


def _data_files(folder: Path) -> list[tuple[Path, int]]:
    matches = ((path, _DATA_FILE.match(path.name)) for path in folder.iterdir())
    return [(path, int(match.group(2))) for path, match in matches if match]


def _clean(folder: Path, manifest: Manifest) -> None:
    """Remove the files of all generations but the manifest's, and what an unfinished build left."""
    for path, generation in _data_files(folder):
        if generation != manifest.generation:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(folder / "partial", ignore_errors=True)
    (folder / f"{manifests.NAME}.part").unlink(missing_ok=True)
    memory.forget(folder, manifest.digest)


def _longer_share(chunks: Sequence[Chunk], encoder: Encoder) -> float:
    step = max(len(chunks) // _ESTIMATE_SAMPLE, 1)
    sample = [chunk.passage for chunk in chunks[::step]]
    windows = cut_windows(sample, encoder, prompt=encoder.prompts["passage"]).per_passage
    return float((windows > 1).mean())
