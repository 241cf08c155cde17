"""Changing an index: add passages, remove some, merge two. Nothing that has a vector is encoded again.

Each writes a new generation, as a build does: readers see the old index or the new one, and what was stopped goes on
with ``resume``. Where nothing changes, the index stays as it is. What `ragmoe index annotate` recorded goes with the
passages that stay.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ragmoe._errors import DataError, EncoderMismatchError, IndexFolderError, UsageError
from ragmoe.corpus.passages import OnError, read_passages
from ragmoe.index.encoder import Encoder, check_same, load_encoder, token_encoder
from ragmoe.index.manifest import Manifest, read_manifest
from ragmoe.index.plan import BuildPlan, How, make_plan, read_contents
from ragmoe.index.rows import AddedRows, KeptRows, MergedRows, OldIndex
from ragmoe.index.target import NewIndex, SameIndex

Folder = str | os.PathLike[str]


def plan_add(
    folder: Folder,
    sources: Sequence[str],
    *,
    encoder: str | Encoder | None = None,
    domain: str | None = None,
    on_error: OnError = "fail",
    encoding: str = "utf-8",
    resume: bool = False,
) -> BuildPlan:
    """Read what is to be added to an index.

    Text is cut and encoded as the index was built. A passage of which the same is encoded is passed over and counted.

    Args:
        encoder: a name or an `Encoder`; the one that the index names if None.
        domain: of records that name none.
        encoding: of text files.

    Raises:
        DataError: a bad line or source, or an id that is taken by another text.
        EncoderMismatchError: the encoder is not the one that made the index.
        IndexFolderError: there is no index, or it is damaged.
    """
    path = Path(folder)
    base = read_manifest(path)
    target = SameIndex(path, resume, base)
    target.check()
    cut = base.chunking
    reader = read_passages(
        sources,
        domain=domain,
        chunk_words=cut.words,
        chunk_overlap=cut.overlap,
        rechunk=cut.rechunk,
        on_error=on_error,
        encoding=encoding,
    )
    rows = AddedRows(OldIndex(path, base), reader, on_error)
    contents = read_contents(rows)
    if not (contents.new or rows.duplicates):
        lines = rows.skipped
        bad = f"; {len(lines)} bad lines were skipped, the first: {lines[0]}" if lines else ""
        raise DataError(f"no passages in {', '.join(sources)}{bad}")
    made, how = _encoder_of(base, encoder, path) if contents.new else None, How.of(base)
    model = token_encoder(made)
    if how.made is not None and how.made.chosen == "calibrated" and model is not None:
        # The size of a batch was measured on the machine that built the index; its precision is the index's own.
        how = replace(how, made=how.made.model_copy(update={"batch_tokens": model.budgets[0]}))
    return make_plan(target, rows, how, made, contents)


def plan_remove(
    folder: Folder, *, ids: Collection[str] = (), domain: str | None = None, resume: bool = False
) -> BuildPlan:
    """Read what is left of an index without some passages.

    Args:
        ids: of the passages that go; or else
        domain: the passages of this domain go.
        resume: that all of them are gone already is no error.

    Raises:
        UsageError: no ids and no domain, or both; or nothing would be left.
        DataError: the index has no such id or domain.
        IndexFolderError: there is no index, or it is damaged.
    """
    path = Path(folder)
    base = read_manifest(path)
    if bool(ids) == (domain is not None):
        raise UsageError(f"{len(ids)} ids and {'a' if domain is not None else 'no'} domain; expected one of the two")
    target = SameIndex(path, resume, base)
    target.check()
    rows = KeptRows(OldIndex(path, base), ids=frozenset(ids), domain=domain)
    missing, wanted = rows.missing(), len(frozenset(ids)) or 1
    if missing and not (resume and len(missing) == wanted):
        has = ", ".join(name or "(no domain)" for name in base.domains)
        what = f"{len(missing)} of {wanted} ids, such as" if ids else "the domain"
        there = "" if ids else f"; there are: {has}"
        raise DataError(f"{path} does not hold {what} {missing[0]!r}{there}; nothing was removed")
    return make_plan(target, rows, How.of(base), None, read_contents(rows))


def plan_merge(
    first: Folder, second: Folder, out: Folder, *, resume: bool = False, overwrite: bool = False
) -> BuildPlan:
    """Read two indexes that are to become one; both stay as they are.

    Text that is added later is cut as in the first.

    Raises:
        EncoderMismatchError: they were made by different encoders, or in different ways; names both.
        DataError: an id is in both, with different texts.
        IndexFolderError: one is no index or damaged, or ``out`` may not be written to.
    """
    a, b = Path(first), Path(second)
    manifests = read_manifest(a), read_manifest(b)
    _check_alike(a, b, *manifests)
    target = NewIndex(Path(out), resume, overwrite)
    if target.folder.resolve() in (a.resolve(), b.resolve()):
        raise IndexFolderError(f"{out} is one of the two; expected a folder of its own", hint="name another with --out")
    target.check()
    rows = MergedRows([OldIndex(a, manifests[0]), OldIndex(b, manifests[1])])
    how = How.of(manifests[0])
    if manifests[1].encoding is not None and manifests[1].encoding.precision == "bf16":
        # Of both the one that says less.
        how = replace(how, made=manifests[1].encoding)
    return make_plan(target, rows, how, None, read_contents(rows))


def _encoder_of(manifest: Manifest, encoder: str | Encoder | None, folder: Path) -> Encoder:
    made = load_encoder(manifest.encoder.id if encoder is None else encoder)
    check_same(manifest.encoder, made, folder)
    return made


def _check_alike(a: Path, b: Path, first: Manifest, second: Manifest) -> None:
    """Refuse to mix vectors that cannot be compared. The encoder's id is only what its weights were called."""
    # Earlier versions recorded no settings.
    unknown = {"settings"} if None in (first.encoder.settings, second.encoder.settings) else set()
    kinds = [
        {
            **manifest.encoder.model_dump(exclude={"id", *unknown}),
            "metric": manifest.metric,
            "normalised": manifest.normalised,
            "long passages": manifest.long_passages.mode,
            "window overlap": manifest.long_passages.window_overlap,
        }
        for manifest in (first, second)
    ]
    differing = [name for name in kinds[0] if kinds[0][name] != kinds[1][name]]
    if differing:
        said = [
            f"{folder} has encoder {manifest.encoder.id!r} with "
            + ", ".join(f"{name} {str(kind[name])[:12]!r}" for name in differing)
            for folder, manifest, kind in ((a, first, kinds[0]), (b, second, kinds[1]))
        ]
        raise EncoderMismatchError(
            f"two indexes of different vectors cannot be merged: {said[0]}; {said[1]}",
            hint=f"build one of them anew: ragmoe index build ... --out {b} --encoder {first.encoder.id} --overwrite",
        )
