"""The check of an index: files, digests, counts, and a sample encoded again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ragmoe._errors import RagmoeError
from ragmoe.index.encoder import Encoder
from ragmoe.index.folder import Index
from ragmoe.index.manifest import NAME, Manifest, file_record, manifest_text, read_manifest
from ragmoe.index.store import corpus_digest
from ragmoe.index.vectors import unit_rows
from ragmoe.index.windows import encode_passages

_SAMPLE = 16
#: A cosine above which two vectors are one encoder's, of one text. Half precision and other batches move it by less
#: than 1e-4, bf16 weights by less than 5e-3; the vectors of another encoder, prompt or pooling are far below.
ALIKE = 0.99


def verify_index(
    folder: str | os.PathLike[str], *, encoder: str | Encoder | None = None, sample: int = _SAMPLE
) -> list[str]:
    """Check an index folder against its manifest; returns what differs, nothing if all is well.

    Args:
        encoder: to encode the sample with; the one that the index names if None.
        sample: passages encoded again, evenly spread.

    Raises:
        IndexFolderError: there is no index, or its manifest cannot be read.
    """
    path = Path(folder)
    while True:
        manifest = read_manifest(path)
        problems = _problems(path, manifest, encoder, sample)
        # Of an index that another took the place of meanwhile nothing is left: that one is looked at.
        if not problems or read_manifest(path).digest == manifest.digest:
            return problems


def _problems(path: Path, manifest: Manifest, encoder: str | Encoder | None, sample: int) -> list[str]:
    if (path / NAME).read_bytes() != manifest_text(manifest).encode():
        return [f"{NAME} was changed: it does not stand as it was written"]
    problems = changed_files(path, manifest)
    if problems:
        return problems
    try:
        index = Index.open(path, encoder=encoder)
        problems += _check_counts(index)
        return problems + _check_sample(index, sample)
    except RagmoeError as error:
        return [*problems, error.message]


def changed_files(folder: Path, manifest: Manifest) -> list[str]:
    """What differs of an index's files from what its manifest says of them."""
    return [problem for name in manifest.files for problem in _check_file(folder, manifest, name)]


def _check_file(folder: Path, manifest: Manifest, name: str) -> list[str]:
    path, expected = folder / name, manifest.files[name]
    if not path.is_file():
        return [f"{name} is missing"]
    found = file_record(path)
    if found.bytes != expected.bytes:
        return [f"{name} has {found.bytes} bytes, expected {expected.bytes}"]
    if found.sha256 != expected.sha256:
        return [f"{name} was changed: its sha256 is {found.sha256[:12]}, expected {expected.sha256[:12]}"]
    return []


def _check_counts(index: Index) -> list[str]:
    problems = []
    if corpus_digest(index.iterate()) != index.manifest.corpus_digest:
        problems.append("the passages are not those of the corpus digest")
    counts = {name: index.domains.count(name) for name in index.manifest.domains}
    if counts != index.manifest.domains:
        problems.append(f"passages per domain are {counts}, expected {index.manifest.domains}")
    # Opening compares the shapes of embeddings, passages and FAISS; reading the BM25 side checks that it loads.
    rows = np.linspace(0, len(index) - 1, min(_SAMPLE, len(index))).astype(np.int64)
    for row, (found, scores) in zip(rows, index.faiss.search(unit_rows(index.embeddings, rows), 1), strict=True):
        if index.manifest.faiss.nprobe is None and not (len(found) and scores[0] > ALIKE):
            problems.append(f"the FAISS file does not find passage {index.passage_ids[row]!r} by its own vector")
    index.bm25.search([index.passage_ids[0]], 1)
    return problems


def _check_sample(index: Index, sample: int) -> list[str]:
    rows = np.unique(np.linspace(0, len(index) - 1, min(sample, len(index))).astype(np.int64))
    record = index.manifest.encoder
    vectors, _ = encode_passages(
        index.passages([index.passage_ids[row] for row in rows]),
        index.encoder,
        mode=index.manifest.long_passages.mode,
        prompt=record.passage_prompt,
    )
    cosines = (vectors * unit_rows(index.embeddings, rows)).sum(axis=1)
    # What is no number is not alike either.
    wrong = np.flatnonzero(~(cosines >= ALIKE))
    if not len(wrong):
        return []
    first = wrong[0]
    return [
        f"{len(wrong)} of {len(rows)} passages encoded again differ from what is stored: "
        f"{index.passage_ids[rows[first]]!r} "
        f"has cosine {cosines[first]:.3f}; these are not vectors of encoder {record.id!r} ({record.digest[:12]})"
    ]
