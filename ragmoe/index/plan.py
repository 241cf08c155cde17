"""What a new generation will be and what it will take: everything is read and checked, and nothing is written."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter

from ragmoe._ranks import Ranks
from ragmoe._room import check_room
from ragmoe.corpus.types import Passage
from ragmoe.index import blocks
from ragmoe.index.encoder import Encoder
from ragmoe.index.manifest import EncoderRecord, Manifest, digest_of
from ragmoe.index.rows import Rows
from ragmoe.index.store import CorpusDigest
from ragmoe.index.target import Target
from ragmoe.index.vectors import Choice, choose_factory
from ragmoe.index.windows import OVERLAP, LongPassages, cut_windows, encode_passages
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
    """How vectors are made and text is cut, as a manifest records it."""

    encoder: EncoderRecord
    long_passages: LongPassages
    chunk_words: int
    chunk_overlap: int
    rechunk: bool
    window_overlap: int = OVERLAP

    @classmethod
    def of(cls, manifest: Manifest) -> How:
        """How an index was made."""
        long, cut = manifest.long_passages, manifest.chunking
        return cls(manifest.encoder, long.mode, cut.words, cut.overlap, cut.rechunk, long.window_overlap)

    @property
    def encoding(self) -> list[object]:
        """What decides a passage's vector, as `ragmoe.index.target.encoding_of` has it."""
        return [self.encoder.model_dump(), self.long_passages, self.window_overlap]


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
    def blocks(self) -> blocks.Blocks:
        """Where encoded blocks are kept until all is done."""
        state = [self.contents.digest, self.how.encoding, self.rows.base]
        return blocks.Blocks(self.target.folder / "partial", digest_of(state))

    @property
    def missing(self) -> list[int] | None:
        """The numbers of the blocks that a stopped run of just this has not encoded; None where there was no such run.

        Several processes share them out by number: block ``n`` of ``w`` processes is that of rank ``n % w``.
        """
        if not self.blocks.begun:
            return None
        return [number for number in self.contents.to_encode if number not in self.blocks]

    @cached_property
    def seconds(self) -> float:
        """Estimated time of encoding, from some passages encoded now; 0 where there is nothing to encode."""
        sample = self.contents.sample[:: max(len(self.contents.sample) // _TIMED, 1)][:_TIMED]
        if not sample or self.encoder is None:
            return 0.0
        # The first call loads what later ones find ready.
        self._encode(sample[:1])
        start = perf_counter()
        self._encode(sample)
        return (perf_counter() - start) / len(sample) * self.contents.new

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

    def _encode(self, passages: Iterable[Passage]) -> None:
        if self.encoder is not None:
            prompt = self.how.encoder.passage_prompt
            encode_passages(list(passages), self.encoder, mode=self.how.long_passages, prompt=prompt)


def make_plan(target: Target, rows: Rows, how: How, encoder: Encoder | None, contents: Contents) -> BuildPlan:
    """The plan for rows that were read.

    Args:
        encoder: needed only where some row has no vector.
    """
    width, count = how.encoder.width, contents.passages
    choice = choose_factory(count, width)
    new_longer = 0.0
    if contents.sample and encoder is not None:
        cut = cut_windows(contents.sample, encoder, prompt=how.encoder.passage_prompt)
        new_longer = contents.new * float((cut.per_passage > 1).mean())
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
    )
