"""Indexes for elsewhere: passages and vectors in parquet, passages in BEIR's form. A form is one function."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from ragmoe._errors import IndexFolderError, UsageError
from ragmoe.index.manifest import Manifest, read_manifest
from ragmoe.index.rows import OldIndex, blocks

Exporter = Callable[[OldIndex, Path], None]
EXPORTERS: dict[str, Exporter] = {}
_BATCH = 1024


def exporter(name: str) -> Callable[[Exporter], Exporter]:
    """Register a form that indexes are exported to."""

    def register(write: Exporter) -> Exporter:
        EXPORTERS[name] = write
        return write

    return register


def export_index(folder: str | os.PathLike[str], out: str | os.PathLike[str], *, to: str) -> Manifest:
    """Write what an index holds for other programs: all of it, or nothing.

    Args:
        out: what is written: for ``parquet`` a file of passages with their ``embedding``; for ``beir`` a folder with
        ``corpus.jsonl`` (``_id``, ``title``, ``text``, and the rest under ``metadata``).

    Raises:
        UsageError: there is no such form.
        IndexFolderError: there is no index, it is damaged, or ``out`` is there already or cannot be written.
    """
    if to not in EXPORTERS:
        raise UsageError(f"form {to!r} is unknown; there are: {', '.join(sorted(EXPORTERS))}")
    path, target = Path(folder), Path(out)
    manifest = read_manifest(path)
    _refuse(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            part = Path(beside) / target.name
            EXPORTERS[to](OldIndex(path, manifest), part)
            # Somebody may have put something there meanwhile.
            _refuse(target)
            part.rename(target)
    except OSError as error:
        raise IndexFolderError(
            f"{target} cannot be written: {error.strerror or error}; nothing is left of it"
        ) from error
    return manifest


@exporter("parquet")
def _to_parquet(old: OldIndex, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("id", "title", "text", "domain", "doc_id", "split")
    kind = pa.list_(pa.float16(), old.manifest.encoder.width)
    about = {"encoder": old.manifest.encoder.model_dump_json(), "index": old.manifest.digest}
    schema = pa.schema([*((name, pa.string()) for name in names), ("embedding", kind)], metadata=about)
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for rows in blocks(old.rows(), _BATCH):
            flat = pa.array(old.vectors[rows[0].at : rows[-1].at + 1].reshape(-1))
            columns = [pa.array([getattr(row.chunk.passage, name) for row in rows]) for name in names]
            vectors = pa.FixedSizeListArray.from_arrays(flat, type=kind)
            file.write_table(pa.Table.from_arrays([*columns, vectors], schema=schema))


@exporter("beir")
def _to_beir(old: OldIndex, path: Path) -> None:
    path.mkdir()
    with (path / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for row in old.rows():
            p = row.chunk.passage
            about = {"domain": p.domain, "doc_id": p.doc_id, "split": p.split}
            record = {"_id": p.id, "title": p.title, "text": p.text, "metadata": about}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _refuse(target: Path) -> None:
    if target.exists():
        raise IndexFolderError(f"{target} is there already", hint="name another, or remove it")
