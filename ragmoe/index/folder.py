"""An opened index: search, neighbours and passages. Reads one generation, old or new, never a mixture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ragmoe._errors import IndexFolderError, UsageError
from ragmoe.corpus.chunking import Chunk
from ragmoe.corpus.files import is_text
from ragmoe.corpus.types import Passage
from ragmoe.index import trust
from ragmoe.index.bm25 import Bm25Searcher, bm25_name
from ragmoe.index.digests import digests_name, verified
from ragmoe.index.encoder import Encoder, check_same, load_encoder
from ragmoe.index.manifest import Manifest, file_record, read_manifest
from ragmoe.index.retrievers import DEFAULT, Queries, Ranking, make_retriever
from ragmoe.index.store import PassageStore, map_npy
from ragmoe.index.vectors import FaissSearcher, unit_rows
from ragmoe.index.windows import encode_passages

if TYPE_CHECKING:
    from ragmoe.neighbours import Neighbours


def embeddings_name(generation: int) -> str:
    """float16 (passages, R), unit length up to rounding."""
    return f"embeddings-{generation}.npy"


def faiss_name(generation: int) -> str:
    """The FAISS file."""
    return f"index-{generation}.faiss"


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a query returned.

    Attributes:
        row: of the passage in the index's embeddings.
        score: the retriever's own: a cosine, a BM25 score, or a fusion of both.
        rank: from 1.
    """

    passage_id: str
    row: int
    score: float
    rank: int


class Index:
    """An index folder opened for reading; made by `Index.open`."""

    def __init__(self, folder: Path, manifest: Manifest, encoder: Encoder | None, retriever: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.retriever = retriever
        self._encoder = encoder
        make_retriever(retriever, self)
        _check_sizes(folder, manifest)
        self._store = PassageStore(folder, manifest.generation)
        self.embeddings = self._embeddings()
        expected = (manifest.passages, manifest.encoder.width)
        if self.embeddings.shape != expected or len(self._store) != manifest.passages:
            raise IndexFolderError(
                f"{folder} is damaged: {len(self._store)} passages and embeddings {self.embeddings.shape}, "
                f"expected {expected}"
            )

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, encoder: str | Encoder | None = None, retriever: str | None = None
    ) -> Index:
        """Open an index folder.

        Args:
            encoder: a name or an `Encoder`; the one that the index names, loaded when first needed, if None.
            retriever: ``dense``, ``bm25``, ``hybrid`` or ``blend``: what searches where a call names none (``blend``
            if None).

        Raises:
            IndexFolderError: there is no index, or it is damaged.
            EncoderMismatchError: the encoder is not the one that made it.
            UsageError: there is no such retriever.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        made = None if encoder is None else _checked(load_encoder(encoder), manifest, path)
        while True:
            try:
                return cls(path, manifest, made, retriever or DEFAULT)
            except (IndexFolderError, FileNotFoundError) as error:
                now = read_manifest(path)
                # Of another folder, put here by a pull, the generation may be the same.
                if now.digest == manifest.digest:
                    if isinstance(error, FileNotFoundError):
                        raise _missing(path, error.filename) from error
                    raise
                # A build replaced the index between reading its manifest and opening its files: take the new one.
                manifest = now

    def __len__(self) -> int:
        return self.manifest.passages

    def __repr__(self) -> str:
        return (
            f"Index({str(self.folder)!r}, {len(self)} passages, encoder {self.manifest.encoder.id!r}, {self.retriever})"
        )

    @property
    def width(self) -> int:
        """R, the length of a vector."""
        return self.manifest.encoder.width

    @property
    def digest(self) -> str:
        """sha256 of the manifest's content: two indexes with the same digest are the same."""
        return self.manifest.digest

    @property
    def passage_ids(self) -> list[str]:
        """The ids by row."""
        return self._store.ids

    @property
    def domains(self) -> list[str]:
        """The domains by row."""
        return self._store.domains

    @property
    def encoder(self) -> Encoder:
        """The encoder, loaded at first use.

        Raises:
            EncoderMismatchError: what its name stands for now is not what made the index.
        """
        if self._encoder is None:
            self._encoder = _checked(load_encoder(self.manifest.encoder.id), self.manifest, self.folder)
        return self._encoder

    @cached_property
    def faiss(self) -> FaissSearcher:
        """The FAISS side, read at first use; built anew from the embeddings where this user did not write the file."""
        name, vectors = faiss_name(self.manifest.generation), embeddings_name(self.manifest.generation)
        with self._reading(name) as path:
            # faiss trusts what it reads: what is not as this user wrote it does not reach it.
            if not trust.is_ours(self.manifest.files[name].sha256):
                return trust.rebuilt(self.embeddings, self.folder / vectors, self.manifest.files[vectors])
            self._check_digests([name])
            return FaissSearcher(path, self.embeddings, self.manifest.faiss)

    @cached_property
    def bm25(self) -> Bm25Searcher:
        """The BM25 side, read at first use."""
        name = bm25_name(self.manifest.generation)
        with self._reading(name) as path:
            self._check_digests([file for file in self.manifest.files if file.startswith(f"{name}/")])
            return Bm25Searcher(path, len(self))

    def encode(self, queries: Sequence[str], *, passages: bool = False) -> NDArray[np.float32]:
        """The vectors of queries, float32 (B, R), unit length, with the query prompt; or with that of passages.

        One that is longer than the encoder reads is treated as such a passage of this index: by default it is the
        token-weighted mean of its windows.
        """
        asked, how = [Passage(id="", text=query) for query in queries], self.manifest.encoder
        prompt = how.passage_prompt if passages else how.query_prompt
        vectors, _ = encode_passages(asked, self.encoder, mode=self.manifest.long_passages.mode, prompt=prompt)
        return vectors

    def search(
        self,
        queries: Sequence[str],
        k: int = 10,
        *,
        retriever: str | None = None,
        where: Mapping[str, str] | None = None,
    ) -> list[list[Hit]]:
        """The best passages of each query, at most ``k`` (fewer where the index or the shared words give no more).

        Args:
            where: only passages whose ``domain``, ``doc_id`` or ``split`` is the one named.

        Raises:
            UsageError: no passage is of that kind.
        """
        made = Queries(_listed(queries), self)
        rankings = self._rank_where(made, k, retriever, where) if where else self._rank(made, k, retriever)
        return [
            [
                Hit(*found, rank)
                for rank, found in enumerate(
                    zip(self._store.ids_of(rows), rows.tolist(), scores.tolist(), strict=True), start=1
                )
            ]
            for rows, scores in rankings
        ]

    def neighbours(self, questions: Sequence[str], n: int = 16, *, retriever: str | None = None) -> Neighbours:
        """What each question retrieves, as tensors: ranked by the retriever, scores always cosine.

        Depends on the text of the questions and nothing else.
        """
        import torch

        from ragmoe.neighbours import Neighbours

        queries = Queries(_listed(questions), self)
        rankings = self._rank(queries, n, retriever)
        embeddings_BNR = np.zeros((len(questions), n, self.width), dtype=np.float32)
        scores_BN = np.zeros((len(questions), n), dtype=np.float32)
        mask_BN = np.zeros((len(questions), n), dtype=np.bool_)
        for b, (rows, _) in enumerate(rankings):
            embeddings_BNR[b, : len(rows)] = unit_rows(self.embeddings, rows)
            scores_BN[b, : len(rows)] = embeddings_BNR[b, : len(rows)] @ queries.vectors[b]
            mask_BN[b, : len(rows)] = True
        ids = [self._store.ids_of(rows) for rows, _ in rankings]
        return Neighbours(torch.from_numpy(embeddings_BNR), torch.from_numpy(scores_BN), torch.from_numpy(mask_BN), ids)

    def passage(self, passage_id: str) -> Passage:
        """The passage of an id.

        Raises:
            IndexFolderError: the index holds no such passage.
        """
        return self.passages([passage_id])[0]

    def passages(self, passage_ids: Sequence[str]) -> list[Passage]:
        """The passages of some ids, in their order.

        Raises:
            IndexFolderError: the index holds no such passage.
        """
        return self._store.passages(self.rows(passage_ids))

    def find(self, passage_id: str) -> Passage | None:
        """The passage of an id, None where there is none."""
        row = self._store.rows_of([passage_id])[0]
        return None if row is None else self._store.passage(row)

    def row(self, passage_id: str) -> int:
        """The row of an id.

        Raises:
            IndexFolderError: the index holds no such passage.
        """
        return self.rows([passage_id])[0]

    def rows(self, passage_ids: Sequence[str]) -> list[int]:
        """The rows of some ids, in their order.

        Raises:
            IndexFolderError: the index holds no such passage.
        """
        found = self._store.rows_of(passage_ids)
        if None in found:
            raise IndexFolderError(
                f"{self.folder} holds no passage {passage_ids[found.index(None)]!r}; it holds {len(self)}, such as "
                f"{self._store.id(0)!r}"
            )
        return [row for row in found if row is not None]

    def chunks(self) -> Iterator[Chunk]:
        """All passages with where each stands in what it was cut from: what `remap_questions` needs."""
        return self._store.chunks()

    def iterate(self) -> Iterator[Passage]:
        """All passages by row."""
        return iter(self._store)

    def windows(self) -> NDArray[np.int64]:
        """int64 (passages,): how many windows of the encoder each passage fills."""
        return self._store.windows

    def text_bytes(self) -> NDArray[np.int64]:
        """int64 (passages,): the length of each text, in bytes of UTF-8."""
        return self._store.sizes

    def _embeddings(self) -> NDArray[np.float16]:
        """What is mapped; in indexes that have digests by block, each block is verified when it is first read."""
        path, digests = (self.folder / name(self.manifest.generation) for name in (embeddings_name, digests_name))
        try:
            mapped = map_npy(path)
            if digests.name not in self.manifest.files:
                return mapped
            self._check_digests([digests.name])
            return verified(mapped, path, digests)
        except ValueError as error:
            raise IndexFolderError(f"{path} is damaged: {error}") from error

    def _rank_where(self, queries: Queries, k: int, retriever: str | None, where: Mapping[str, str]) -> list[Ranking]:
        """As `_rank`, of some passages: deeper and deeper until enough of them were met."""
        if others := [value for value in where.values() if not isinstance(value, str)]:
            raise UsageError(f"the filter asks for {others[0]!r}; expected one text for each of {', '.join(where)}")
        wanted_P = np.logical_and.reduce([self._store.matching(name, value) for name, value in where.items()])
        if not wanted_P.any():
            asked = ", ".join(f"{name}={value}" for name, value in where.items())
            raise UsageError(
                f"{self.folder} holds no passage with {asked}; domains: {', '.join(sorted(self.manifest.domains))}"
            )
        found: list[Ranking] = [(np.zeros(0, np.int64), np.zeros(0, np.float32))] * len(queries.texts)
        # Each as if it had been asked alone: at another depth a fusion of two retrievers ranks otherwise.
        lacking, depth = list(range(len(queries.texts))), k
        while lacking:
            depth = min(4 * depth, len(self))
            for place, (rows, scores) in zip(lacking, self._rank(queries.of(lacking), depth, retriever), strict=True):
                kept = wanted_P[rows]
                found[place] = rows[kept][:k], scores[kept][:k]
            lacking = [place for place in lacking if len(found[place][0]) < k] if depth < len(self) else []
        return found

    def _rank(self, queries: Queries, k: int, retriever: str | None) -> list[Ranking]:
        if k < 1:
            raise UsageError(f"{k} passages were asked for; expected at least 1")
        found = make_retriever(retriever or self.retriever, self)
        return found.rank(queries, min(k, len(self))) if queries.texts else []

    def _check_digests(self, names: Sequence[str]) -> None:
        for name in names:
            if file_record(self.folder / name) != self.manifest.files[name]:
                raise IndexFolderError(
                    f"{self.folder} is damaged: {name} was changed", hint=f"see: ragmoe index verify {self.folder}"
                )

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        """A file or folder of this generation, while it is read.

        Raises:
            IndexFolderError: it is damaged; or another index took this one's place, whatever became of the file then.
        """
        try:
            yield self.folder / name
        except (IndexFolderError, FileNotFoundError) as error:
            now = read_manifest(self.folder)
            if now.digest != self.manifest.digest:
                raise IndexFolderError(
                    f"{self.folder}: {name} was replaced meanwhile by generation {now.generation}",
                    hint="open the index again",
                ) from error
            if isinstance(error, FileNotFoundError):
                raise _missing(self.folder, error.filename) from error
            raise


def _missing(folder: Path, what: str) -> IndexFolderError:
    return IndexFolderError(f"{folder} is damaged: {what} is missing", hint=f"see: ragmoe index verify {folder}")


def _check_sizes(folder: Path, manifest: Manifest) -> None:
    """Refuse an index whose files are not all there in full."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise _missing(folder, name)
        if path.stat().st_size != record.bytes:
            raise IndexFolderError(
                f"{folder} is damaged: {name} has {path.stat().st_size} bytes, expected {record.bytes}",
                hint=f"see: ragmoe index verify {folder}",
            )


def _checked(encoder: Encoder, manifest: Manifest, folder: Path) -> Encoder:
    check_same(manifest.encoder, encoder, folder)
    return encoder


def _listed(texts: Sequence[str]) -> Sequence[str]:
    # A single string is a sequence of strings too, and would be searched letter by letter.
    if isinstance(texts, str):
        raise UsageError("a single string was given; expected a list of queries")
    if others := [text for text in texts if not isinstance(text, str)]:
        raise UsageError(f"the query {others[0]!r} is of the type {type(others[0]).__name__}; expected text")
    if bad := [text for text in texts if not is_text(text)]:
        raise UsageError(
            f"the query {bad[0]!a} holds what is not UTF-8; expected text",
            hint="set the terminal to UTF-8",
        )
    return texts
