"""Building an index from sources.

Nothing is written before the sources were read whole; they are read again as they are encoded, so that no corpus need
fit in memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ragmoe._errors import IndexFolderError
from ragmoe.corpus.passages import OnError, read_passages
from ragmoe.index.calibrate import Asked, asked_record
from ragmoe.index.encoder import DEFAULT_ENCODER, Encoder, load_encoder, settings_of
from ragmoe.index.manifest import EncoderRecord, Manifest
from ragmoe.index.plan import BuildPlan, How, Wanted, make_plan, read_contents
from ragmoe.index.rows import OldIndex, SourceRows
from ragmoe.index.target import NewIndex, alike, current, encoding_of
from ragmoe.index.windows import LongPassages
from ragmoe.index.writer import Progress


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build an index of, and how.

    Attributes:
        sources: files, folders, globs, or ``hub:NAME[:CONFIG][:SPLIT]``.
        out: the index folder.
        encoder: ``minilm``, a sentence-transformers folder, a Hub id, or an `Encoder`.
        domain: of records that name none.
        rechunk: cut also passages that bring an id.
        query_prompt, passage_prompt: what is put before a text of that kind; what the encoder declares if None.
        long_passages: ``windows`` (token-weighted mean of overlapping windows) or ``truncate`` for passages longer
        than the encoder reads.
        text_encoding: of text files among the sources.
        precision: of the encoder's weights; ``auto`` measures which is faster, and takes bf16 only where its vectors
        are those of float32.
        batch_tokens: tokens in a batch; measured if None.
        resume: go on with a build that was stopped.
        overwrite: replace the index that is there.
    """

    sources: tuple[str, ...]
    out: Path
    encoder: str | Encoder = DEFAULT_ENCODER
    query_prompt: str | None = None
    passage_prompt: str | None = None
    domain: str | None = None
    chunk_words: int = 200
    chunk_overlap: int = 40
    rechunk: bool = False
    on_error: OnError = "fail"
    long_passages: LongPassages = "windows"
    text_encoding: str = "utf-8"
    precision: Asked = "auto"
    batch_tokens: int | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))


def plan_build(options: BuildOptions) -> BuildPlan:
    """Read and check all sources and estimate the work; writes nothing."""
    target = NewIndex(options.out, options.resume, options.overwrite)
    target.check()
    reader = read_passages(
        options.sources,
        domain=options.domain,
        chunk_words=options.chunk_words,
        chunk_overlap=options.chunk_overlap,
        rechunk=options.rechunk,
        on_error=options.on_error,
        encoding=options.text_encoding,
    )
    # An encoder takes seconds to load: unless vectors may be taken over, what is wrong with the sources shows before.
    made = _how(options) if current(options.out) else None
    rows = SourceRows(reader, options.sources, _same(options.out, made[0]) if made else None)
    contents = read_contents(rows)
    how, encoder = made or _how(options)
    if contents.new == contents.passages:
        # Nothing is taken over, so nothing has to be like it.
        how = replace(how, made=None)
    return make_plan(target, rows, how, encoder, contents, Wanted(options.precision, options.batch_tokens))


def build_index(options: BuildOptions, *, progress: Progress | None = None) -> Manifest:
    """Build an index folder.

    Raises:
        DataError: a bad line or source, or no passages at all; nothing was written.
        ConfigError: there is no such encoder.
        IndexLockedError: somebody else is building this index.
        IndexFolderError: the folder holds an index and ``overwrite`` is not set, it cannot be written, or there is not
        room enough.
    """
    return plan_build(options).run(progress)


def encoder_record(
    encoder: Encoder, *, query_prompt: str | None = None, passage_prompt: str | None = None
) -> EncoderRecord:
    """What a manifest says of an encoder; prompts are those that it declares where none are given."""
    return EncoderRecord(
        id=encoder.id,
        digest=encoder.digest,
        width=encoder.width,
        max_length=encoder.max_length,
        query_prompt=encoder.prompts["query"] if query_prompt is None else query_prompt,
        passage_prompt=encoder.prompts["passage"] if passage_prompt is None else passage_prompt,
        settings=settings_of(encoder),
    )


def _how(options: BuildOptions) -> tuple[How, Encoder]:
    """How the index will be made: what nobody asked for, as the one that stands in the folder."""
    encoder = load_encoder(options.encoder)
    record = encoder_record(encoder, query_prompt=options.query_prompt, passage_prompt=options.passage_prompt)
    made = asked_record(encoder, options.precision, options.batch_tokens)
    old = current(options.out)
    if options.precision == "auto" and made is not None:
        # Earlier versions recorded nothing: theirs are float32, and what is new must not become something else.
        if old is None or not alike([old.encoder.model_dump()], [record.model_dump()]):
            made = None
        elif old.encoding is not None:
            made = old.encoding
        if made is not None and options.batch_tokens is not None:
            made = made.model_copy(update={"batch_tokens": options.batch_tokens})
    words, overlap = options.chunk_words, options.chunk_overlap
    how = How(record, options.long_passages, words, overlap, options.rechunk, made=made)
    return how, encoder


def _same(folder: Path, how: How) -> OldIndex | None:
    """The index in force, where vectors may be taken over: it is whole, and they were made in the same way."""
    now = current(folder)
    if now is None or not alike(encoding_of(now), how.encoding):
        return None
    try:
        return OldIndex(folder, now)
    except IndexFolderError:
        return None
