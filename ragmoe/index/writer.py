"""Writing a generation of an index: encode in blocks that survive a kill, commit by the manifest.

Files carry a new generation in their names, so the index in force stays readable until the manifest is replaced; only
then are older generations removed. Whatever writes an index comes through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import DataError, IndexFolderError, RagmoeError
from ragmoe._ranks import Meeting, Ranks
from ragmoe._version import __version__
from ragmoe.index import bm25, memory, trust
from ragmoe.index import manifest as manifests
from ragmoe.index._crash import reached
from ragmoe.index.ahead import BlockEncoder
from ragmoe.index.blocks import Encoded
from ragmoe.index.digests import digests_name, write_digests
from ragmoe.index.folder import embeddings_name, faiss_name
from ragmoe.index.manifest import ChunkingRecord, FaissRecord, LongPassagesRecord, Manifest
from ragmoe.index.rows import Row, blocks
from ragmoe.index.store import CorpusDigest, StoreWriter, read_rows, write_npy_header
from ragmoe.index.target import clean, locked, next_generation, sweep
from ragmoe.index.vectors import build_faiss
from ragmoe.index.windows import encoder_text

if TYPE_CHECKING:
    from ragmoe.index.plan import BuildPlan

#: Called with a stage, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]

_VERSIONS = ("faiss-cpu", "sentence-transformers", "transformers", "torch", "bm25s", "numpy", "pyarrow")


class Writer:
    """One run of a plan, under the lock; of several ranks the first one's."""

    def __init__(self, plan: BuildPlan, progress: Progress, ranks: Ranks) -> None:
        self.plan = plan
        self.folder = plan.target.folder
        self.progress = progress
        self.total = plan.passages
        self.blocks = plan.blocks
        self.ranks = ranks
        self.meeting = Meeting(None)
        self.longer = 0
        #: Where each row's vector comes from, kept only if something is recorded of the old rows.
        self.origins: list[NDArray[np.int64]] = []
        self.recorded: list[tuple[int, memory.ExpertMemory]] = []

    def run(self) -> Manifest:
        """Write the generation, unless that is written already; all ranks come back when it is in force."""
        with self.ranks.joined() as self.meeting:
            return self._follow() if self.ranks.rank else self._lead()

    def _follow(self) -> Manifest:
        """Encode what falls to this rank, and write nothing else."""
        if self.meeting.hear(False):
            self.plan = self.plan.as_begun()
            self.blocks = self.plan.blocks
            if not self.blocks.begun:
                raise IndexFolderError(
                    f"{self.folder}: rank {self.ranks.rank} does not find what the first rank has begun",
                    hint="all machines need the same folder, sources and encoder",
                )
            self._encode_share()
            self.meeting.wait()
        return manifests.read_manifest(self.folder)

    def _lead(self) -> Manifest:
        with locked(self.folder):
            reached("locked")
            # Once more: somebody else may have finished a build since the plan was made.
            self.plan.target.check()
            if (done := self.plan.done) is not None:
                clean(self.folder, done)
                self.meeting.hear(False)
                return done
            generation = next_generation(self.folder)
            sweep(self.folder)
            self.plan.check_room()
            try:
                return self._write(generation)
            except (OSError, RagmoeError):
                with suppress(OSError):
                    sweep(self.folder)
                raise

    def _write(self, generation: int) -> Manifest:
        if self.plan.rows.keeps_memory:
            self.recorded = memory.recorded_with(self.plan.rows.known)
        names = self._embed(generation)
        write_digests(self.folder / embeddings_name(generation), self.folder / digests_name(generation))
        names.append(digests_name(generation))
        reached("passages")
        embeddings = np.load(self.folder / embeddings_name(generation), mmap_mode="r", allow_pickle=False)
        faiss_record = build_faiss(
            self.folder / faiss_name(generation),
            embeddings,
            self.plan.choice,
            lambda n: self.progress("faiss", n, self.total),
        )
        reached("faiss")
        words = bm25.build_bm25(
            self.folder / bm25.bm25_name(generation), self._texts(generation), self.folder / "partial" / "words"
        )
        reached("bm25")
        names += [faiss_name(generation), *(path.relative_to(self.folder).as_posix() for path in words)]
        for name in names:
            manifests.sync(self.folder / name)
        manifests.sync_folder(self.folder / bm25.bm25_name(generation))
        manifest = self._manifest(generation, names, faiss_record)
        trust.remember(manifest.files[faiss_name(generation)].sha256)
        memory.carry_over(self.folder, manifest.digest, self.recorded, self.origins, self.plan.rows.shared)
        manifests.write_manifest(self.folder, manifest)
        reached("manifest-written")
        manifests.commit(self.folder)
        reached("committed")
        clean(self.folder, manifest)
        reached("cleaned")
        self.meeting.wait()
        return manifest

    def _embed(self, generation: int) -> list[str]:
        """Write passages and embeddings, a block in memory at a time; returns the names of the files."""
        self.blocks.start(generation, resume=self.plan.target.resume)
        self.meeting.hear(True)
        if self.ranks.count > 1:
            self._encode_share()
        stage = "encode" if self.ranks.count == 1 else "write"
        store = StoreWriter(self.folder, generation, self.total)
        name, digest, done = embeddings_name(generation), CorpusDigest(), 0
        try:
            with (self.folder / name).open("wb") as file, self._encoder() as encoder:
                write_npy_header(file, np.dtype(np.float16), (self.total, self.plan.how.encoder.width))
                for number, rows in enumerate(self._rows(encoder)):
                    vectors, windows = self._block(number, rows, encoder)
                    file.write(np.ascontiguousarray(vectors).tobytes())
                    store.add([row.chunk for row in rows], windows)
                    for row in rows:
                        digest.update(row.chunk.passage)
                    self.longer += int((windows > 1).sum())
                    done += len(rows)
                    self.progress(stage, done, self.total)
            reached("encoded")
        finally:
            store.close()
        if digest.hexdigest() != self.plan.contents.digest:
            raise DataError(
                f"what {self.folder} is made of was changed while it was read; nothing was committed",
                hint="give the command again",
            )
        return [*store.names, name]

    def _encode_share(self) -> None:
        """Encode this rank's share of the blocks, as far as it is not there, and wait for the others to do so."""
        done = 0
        with self._encoder() as encoder:
            for number, rows in enumerate(self._rows(encoder, self._is_ours)):
                done += len(rows)
                new = [row for row in rows if row.at < 0]
                if new and self._is_ours(number):
                    self._encoded(number, new, encoder)
                    reached("block")
                self.progress("encode", done, self.total)
        self.meeting.wait()

    def _is_ours(self, number: int) -> bool:
        return number % self.ranks.count == self.ranks.rank

    def _encoder(self) -> AbstractContextManager[BlockEncoder | None]:
        how, encoder = self.plan.how, self.plan.encoder
        if encoder is None:
            return nullcontext()
        return BlockEncoder(encoder, how.long_passages, how.encoder.passage_prompt, how.made)

    def _rows(
        self, encoder: BlockEncoder | None, wanted: Callable[[int], bool] = lambda number: True
    ) -> Iterator[list[Row]]:
        """The rows in blocks, read one block ahead, so that what is to be encoded of wanted ones can be begun."""
        last: list[Row] | None = None
        for number, rows in enumerate(blocks(self.plan.rows, self.blocks.size)):
            if encoder is not None and wanted(number) and number not in self.blocks:
                encoder.begin(number, [row.chunk.passage for row in rows if row.at < 0])
            if last is not None:
                yield last
            last = rows
        if last is not None:
            yield last

    def _block(self, number: int, rows: list[Row], encoder: BlockEncoder | None) -> Encoded:
        """The vectors of a block and the windows of each; only what has to be encoded is kept for another run."""
        at = np.asarray([row.at for row in rows], dtype=np.int64)
        if self.recorded:
            self.origins.append(at)
        vectors = np.zeros((len(rows), self.plan.how.encoder.width), dtype=np.float16)
        windows = np.asarray([row.windows for row in rows], dtype=np.int64)
        known, new = np.flatnonzero(at >= 0), np.flatnonzero(at < 0)
        if len(known):
            vectors[known] = self.plan.rows.take(at[known])
        if len(new):
            vectors[new], windows[new] = self._encoded(number, [rows[i] for i in new.tolist()], encoder)
        reached("block")
        return vectors, windows

    def _encoded(self, number: int, new: list[Row], encoder: BlockEncoder | None) -> Encoded:
        """What has to be encoded of a block: as it was kept, or encoded now and kept."""
        encoded = self.blocks.read(number, len(new))
        if encoded is None:
            if encoder is None:
                raise IndexFolderError(f"{self.folder}: passages without a vector, and no encoder to make one")
            encoded = encoder.encode(number, [row.chunk.passage for row in new])
            self.blocks.write(number, encoded)
        return encoded

    def _texts(self, generation: int) -> Iterator[str]:
        """What BM25 reads, as it was just written."""
        self.progress("bm25", 0, self.total)
        for done, (chunk, _) in enumerate(read_rows(self.folder, generation, self.total), start=1):
            yield encoder_text(chunk.passage)
            if done % 1024 == 0 or done == self.total:
                self.progress("bm25", done, self.total)

    def _manifest(self, generation: int, names: list[str], faiss: FaissRecord) -> Manifest:
        plan, how = self.plan, self.plan.how
        return Manifest(
            format=manifests.FORMAT,
            generation=generation,
            passages=self.total,
            domains=plan.domains,
            skipped=plan.rows.skipped_before + len(plan.rows.skipped),
            encoder=how.encoder,
            encoding=how.made,
            metric="cosine",
            normalised=True,
            long_passages=LongPassagesRecord(
                mode=how.long_passages,
                window_overlap=how.window_overlap,
                longer=self.longer,
                share=round(self.longer / self.total, 4),
            ),
            chunking=ChunkingRecord(
                words=how.chunk_words,
                overlap=how.chunk_overlap,
                rechunk=how.rechunk,
                chunks=plan.contents.cut,
            ),
            faiss=faiss,
            bm25=bm25.SETTINGS,
            corpus_digest=plan.contents.digest,
            versions={"ragmoe": __version__, **{name: version(name) for name in _VERSIONS}},
            files={name: manifests.file_record(self.folder / name) for name in sorted(names)},
        ).sealed()
