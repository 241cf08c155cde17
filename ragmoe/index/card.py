"""The index card: a README.md in the folder that says what the index is, for whoever finds it."""

from __future__ import annotations

import os
from pathlib import Path

from ragmoe._room import size
from ragmoe._words import many
from ragmoe.index.manifest import Manifest

NAME = "README.md"
_MARK = "<!-- Written by ragmoe; replaced whenever the index is. -->"


def is_ours(path: Path) -> bool:
    """Whether a README.md was written here, and not by a person."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return path.name == NAME and file.readline().rstrip() == _MARK
    except OSError:
        return False


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write the card of an index, unless a README.md of somebody else stands there."""
    path, part = folder / NAME, folder / f"{NAME}.part"
    if path.exists() and not is_ours(path):
        return
    part.write_text(_card(folder.resolve().name, manifest), encoding="utf-8")
    os.replace(part, path)


def _card(name: str, manifest: Manifest) -> str:
    encoder, long, cut, faiss = manifest.encoder, manifest.long_passages, manifest.chunking, manifest.faiss
    domains = "\n".join(f"| {domain or '(no domain)'} | {count:,} |" for domain, count in manifest.domains.items())
    recall = (
        "exact"
        if faiss.recall_at_20 is None
        else f"finds {faiss.recall_at_20:.1%} of the exact top 20 of stored passages"
    )
    versions = ", ".join(f"{library} {number}" for library, number in manifest.versions.items())
    return f"""{_MARK}
# {name}

A ragmoe index of {many(manifest.passages, "passage")}, {size(sum(record.bytes for record in manifest.files.values()))}.

| domain | passages |
|---|---|
{domains}

- Encoder: `{encoder.id}` (weights `{encoder.digest[:12]}`), width {encoder.width}, reads {encoder.max_length} tokens.
- Prompts: query `{encoder.query_prompt!r}`, passage `{encoder.passage_prompt!r}`.
- Longer than that: {many(long.longer, "passage")} ({long.share:.1%}), encoded by `{long.mode}`.
- Chunks: {many(cut.chunks, "passage")} cut from something longer, at most {cut.words} words, overlap {cut.overlap}.
- Bad lines skipped: {manifest.skipped:,}.
- Search: FAISS `{faiss.factory}` ({recall}) and BM25.
- Built with: {versions}; generation {manifest.generation}, digest `{manifest.digest}`.

```
ragmoe index search {name} "a question" -k 5
ragmoe index verify {name}
```

```python
from ragmoe import Index

hits = Index.open("{name}").search(["a question"])
```
"""
