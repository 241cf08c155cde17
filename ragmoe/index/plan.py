"""What a new generation will be and what it will take: everything is read and checked, and nothing is written."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

from ragmoe._ranks import Ranks
from ragmoe._room import check_room
from ragmoe.corpus.types import Passage
from ragmoe.index import blocks
from ragmoe.index import manifest as manifests
from ragmoe.index.blocks import Blocks, kept_encoding
from ragmoe.index.calibrate import FEWEST, Asked, asked_record, calibrate
from ragmoe.index.encoder import Encoder, token_encoder
from ragmoe.index.manifest import EncoderRecord, EncodingRecord, Manifest
from ragmoe.index.rows import Rows
from ragmoe.index.store import CorpusDigest
from ragmoe.index.target import Target, encoding_key
from ragmoe.index.vectors import Choice, choose_factory
from ragmoe.index.windows import OVERLAP, LongPassages, Prepared, encode_prepared, prepare_passages
from ragmoe.index.writer import Progress, Writer

_SAMPLE = 512
_TIMED = 32
# What the files take even where they hold next to nothing.
_HEADERS = 10_000
# What parquet, BM25 and the encoder's batches hold at a time, whatever the size of the corpus.
_STEADY_BYTES = 150_000_000
_ALONE = Ranks()


@dataclass(frozen=True, slots=True)
class How:
    """How vectors are made and text is cut, as a manifest records it.

    Attributes:
        made: precision and size of a batch; None where they are still to be chosen, or there is nothing to choose.
    """

    encoder: EncoderRecord
    long_passages: LongPassages
    chunk_words: int
    chunk_overlap: int
    rechunk: bool
    window_overlap: int = OVERLAP
    made: EncodingRecord | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> How:
        """How an index was made."""
        long, cut = manifest.long_passages, manifest.chunking
        return cls(
            manifest.encoder, long.mode, cut.words, cut.overlap, cut.rechunk, long.window_overlap, manifest.encoding
        )

    @property
    def encoding(self) -> list[Any]:
        """What decides a passage's vector, as `ragmoe.index.target.encoding_of` has it."""
        return encoding_key(self.encoder, self.long_passages, self.window_overlap, self.made)


@dataclass(slots=True)
class Contents:
    """What some rows are, all of them read once.

    Attributes:
        new: how many have no vector yet.
        to_encode: the numbers of the blocks that these are in.
        cut: how many are pieces of something longer.
        longer: how many of those with a vector are longer than the encoder reads.
        text_bytes: of all texts, UTF-8.
        sample: some of those without a vector, every one with the same chance.
    """

    passages: int = 0
    new: int = 0
    to_encode: list[int] = field(default_factory=list)
    cut: int = 0
    longer: int = 0
    text_bytes: int = 0
    domains: Counter[str] = field(default_factory=Counter)
    digest: str = ""
    sample: list[Passage] = field(default_factory=list)


def read_contents(rows: Rows) -> Contents:
    """Read all rows; nothing but a sample of them is kept.

    Raises:
        RagmoeError: there are none.
    """
    contents, digest, chance = Contents(), CorpusDigest(), random.Random(0)
    for chunk, at, windows in rows:
        passage = chunk.passage
        contents.passages += 1
        contents.cut += chunk.source_id != passage.id
        contents.longer += windows > 1
        contents.text_bytes += len(passage.text.encode())
        contents.domains[passage.domain] += 1
        digest.update(passage)
        if at < 0:
            contents.new += 1
            number = (contents.passages - 1) // blocks.BLOCK
            if contents.to_encode[-1:] != [number]:
                contents.to_encode.append(number)
            if len(contents.sample) < _SAMPLE:
                contents.sample.append(passage)
            elif (place := chance.randrange(contents.new)) < _SAMPLE:
                contents.sample[place] = passage
    if not contents.passages:
        raise rows.nothing()
    contents.digest = digest.hexdigest()
    return contents


@dataclass(frozen=True)
class BuildPlan:
    """What a command will write.

    Attributes:
        encoder: None where all vectors are known.
        longer_share: estimated share of passages longer than the encoder reads, from a sample.
        disk_bytes: estimated size of the finished folder.
        memory_bytes: estimated memory at the peak, the encoder's own left out.
        passage_seconds: estimated time to encode one; None where nothing was calibrated.
    """

    target: Target
    rows: Rows
    how: How
    encoder: Encoder | None
    contents: Contents
    choice: Choice
    longer_share: float
    disk_bytes: int
    memory_bytes: int
    passage_seconds: float | None = None

    @property
    def passages(self) -> int:
        """How many passages the index will hold."""
        return self.contents.passages

    @property
    def domains(self) -> dict[str, int]:
        """Passages by domain."""
        return dict(sorted(self.contents.domains.items()))

    @property
    def working_bytes(self) -> int:
        """Estimated disk that is needed until all is done: the folder, encoded blocks, and what sorts the words."""
        encoded = self.contents.new * (2 * self.how.encoder.width + 8)
        return self.disk_bytes + encoded + 2 * self.contents.text_bytes

    @cached_property
    def blocks(self) -> Blocks:
        """Where encoded blocks are kept until all is done."""
        return Blocks(self._partial, fingerprint(self.contents, self.how, self.rows), self.how.made)

    @property
    def done(self) -> Manifest | None:
        """The index in force where it is just what this would write, so that nothing will be written."""
        return self.target.finished(self.contents.digest, self.how.encoding, self.blocks.begun)

    @property
    def missing(self) -> list[int] | None:
        """The numbers of the blocks that a stopped run of just this has not encoded; None where there was no such run.

        A run with another precision or batch is such a one only for a plan that may yet take it up as it was.

        Several processes share them out by number: block ``n`` of ``w`` processes is that of rank ``n % w``.
        """
        stopped = (self if self.target.resume else self.as_begun()).blocks
        return [number for number in self.contents.to_encode if number not in stopped] if stopped.begun else None

    def as_begun(self) -> BuildPlan:
        """The same plan with the precision and size of a batch that the run in the folder, if any, has chosen."""
        kept = kept_encoding(self._partial)
        return self if kept is None else replace(self, how=replace(self.how, made=kept))

    @property
    def _partial(self) -> Path:
        return self.target.folder / "partial"

    @cached_property
    def seconds(self) -> float:
        """Estimated time of encoding, by one process; 0 where there is nothing to encode.

        By the figures of the calibration, else from some passages encoded now. What a stopped run has encoded, and
        this one takes over, is left out.
        """
        left = self.contents.new * len(self._left) / max(len(self.contents.to_encode), 1)
        if not left:
            return 0.0
        if self.passage_seconds is not None:
            return self.passage_seconds * left
        sample = self.contents.sample[:: max(len(self.contents.sample) // _TIMED, 1)][:_TIMED]
        if not sample or self.encoder is None:
            return 0.0
        # The first call loads what later ones find ready.
        self._encode(sample[:1], self.encoder)
        start = perf_counter()
        self._encode(sample, self.encoder)
        return (perf_counter() - start) / len(sample) * left

    def seconds_of(self, processes: int) -> float:
        """The same for several processes, of which the one with most blocks takes as long as all."""
        blocks = Counter(number % processes for number in self._left)
        return self.seconds * max(blocks.values(), default=0) / max(len(self._left), 1)

    @property
    def _left(self) -> list[int]:
        """The numbers of the blocks that this run encodes."""
        missing = self.missing if self.target.resume else None
        return self.contents.to_encode if missing is None else missing

    def check_room(self) -> None:
        """Refuse what cannot fit.

        Raises:
            IndexFolderError: disk or memory do not suffice, with the numbers.
        """
        check_room(self.target.folder, disk=self.working_bytes, memory=self.memory_bytes)

    def run(self, progress: Progress | None = None, *, ranks: Ranks = _ALONE) -> Manifest:
        """Write the generation and return its manifest; see `build_index` for the errors.

        Args:
            ranks: the processes that encode together, each of which calls this with the same plan.
        """
        return Writer(self, progress or (lambda stage, done, total: None), ranks).run()

    def _encode(self, passages: list[Passage], encoder: Encoder) -> None:
        prompt = self.how.encoder.passage_prompt
        prepared = prepare_passages(passages, encoder, mode=self.how.long_passages, prompt=prompt)
        encode_prepared(prepared, encoder, prompt=prompt, how=self.how.made)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for of precision and size of a batch; whatever was not is chosen."""

    precision: Asked = "auto"
    batch_tokens: int | None = None


def fingerprint(contents: Contents, how: How, rows: Rows) -> str:
    """Of what is encoded, and how."""
    return manifests.digest_of([contents.digest, how.encoding, rows.base])


def make_plan(
    target: Target, rows: Rows, how: How, encoder: Encoder | None, contents: Contents, wanted: Wanted | None = None
) -> BuildPlan:
    """The plan for rows that were read.

    Args:
        encoder: needed only where some row has no vector.
        wanted: where precision and size of a batch are yet to be chosen; ``how`` has them if None.

    Raises:
        ConfigError: of the encoder was asked what it cannot do.
    """
    width, count = how.encoder.width, contents.passages
    choice = choose_factory(count, width)
    new_longer, passage_seconds = 0.0, None
    if contents.sample and encoder is not None:
        prompt = how.encoder.passage_prompt
        sample = prepare_passages(contents.sample, encoder, mode=how.long_passages, prompt=prompt)
        new_longer = contents.new * float((sample.per_passage > 1).mean())
        if wanted is not None:
            how, passage_seconds = _choose(target, rows, how, encoder, contents, sample, wanted)
    return BuildPlan(
        target=target,
        rows=rows,
        how=how,
        encoder=encoder,
        contents=contents,
        choice=choice,
        longer_share=(contents.longer + new_longer) / count,
        # Texts once plain and once compressed; BM25 takes about as much as the text, a number for each distinct word.
        disk_bytes=count * (2 * width + choice.bytes_each) + int(2.6 * contents.text_bytes) + _HEADERS,
        memory_bytes=count * choice.bytes_each + choice.train_bytes + _STEADY_BYTES,
        passage_seconds=passage_seconds,
    )


def _choose(
    target: Target, rows: Rows, how: How, encoder: Encoder, contents: Contents, sample: Prepared, wanted: Wanted
) -> tuple[How, float | None]:
    """How passages are encoded, and the time that one takes where that was measured.

    What a stopped run was done with, it goes on with; else what was asked for, and else what is fastest.
    """
    made = asked_record(encoder, wanted.precision, wanted.batch_tokens)
    if made is None or how.made is not None:
        return how, None
    if Ranks.launched().rank:
        # The first rank chooses for all, and measures alone.
        return replace(how, made=made), None
    partial = target.folder / "partial"
    if target.resume and (kept := kept_encoding(partial)) is not None:
        if wanted.batch_tokens is not None:
            kept = kept.model_copy(update={"batch_tokens": wanted.batch_tokens})
        resumed = replace(how, made=kept)
        begun = Blocks(partial, fingerprint(contents, resumed, rows)).begun
        if begun and wanted.precision in ("auto", kept.precision):
            return resumed, None
    model = token_encoder(encoder)
    settled = wanted.precision != "auto" and wanted.batch_tokens is not None
    if settled or contents.new < FEWEST or model is None or not sample.tokens:
        return replace(how, made=made), None
    found = calibrate(model, sample.tokens, precision=wanted.precision, batch_tokens=wanted.batch_tokens)
    tokens_each = sum(text.shape[1] for text in sample.tokens) / len(sample.per_passage)
    return replace(how, made=found.record), tokens_each / found.tokens_per_second
