"""Per-question records, appended to a JSONL file as they are made, and picked up again after a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ragmoe._errors import DataError

Status = Literal["ok", "error", "unscored"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What became of one question.

    Attributes:
        digest: of the question, the task and the model; only a record with the same digest stands for it later.
        example: digest of the question and its answers alone, by which two runs know that they asked the same.
        doc_id: document of the passage asked about; what belongs together when questions are resampled.
        status: ``ok``; ``error`` (see ``error``); ``unscored``: nothing to score against (see ``error``).
        f1: 0 to 1, of the best guess whether or not it passed the threshold; None for an unanswerable question.
        f1_thresholded: the same with an empty prediction where the threshold was not passed, which is right (1.0) where
            the question is unanswerable.
        retrieved: passage ids, best first.
        gold_rank: rank (from 1) of the first gold passage among them; None if it is not there.
        gold_read: those of the passages read that are gold.
        shortened, left_out: passages that were, for want of room in a generator's prompt; None for a reader, which
            reads all.
        cited: passages that a generator cites; None for a reader, which does not. ``invented``: how many numbers it
            cites that no passage has.
        rouge_l: 0 to 1, of a generator, where the answer is no yes, no or maybe; ``citation_precision`` and
            ``citation_recall`` likewise, see ``metrics``.
        routing: for each of L sparse layers how many choices fell on each of E experts while the question was read.
        gate_entropy: for each layer the mean entropy of the gate (nats) over the tokens read.
        tokens: how many were read, without padding.
        lost: for each layer how many choices found no room with their expert, and how many tokens no expert served;
            empty where there were none at all.
    """

    id: str
    digest: str
    example: str
    domain: str
    doc_id: str
    status: Status
    question: str
    answer_type: str
    answers: tuple[str, ...]
    error: str | None = None
    prediction: str | None = None
    passage_id: str | None = None
    read: tuple[str, ...] = ()
    f1: float | None = None
    em: float | None = None
    f1_thresholded: float | None = None
    em_thresholded: float | None = None
    answered: bool | None = None
    score: float | None = None
    no_answer_score: float | None = None
    retrieved: tuple[str, ...] = ()
    gold_rank: int | None = None
    gold_read: tuple[str, ...] = ()
    shortened: int | None = None
    left_out: int | None = None
    cited: tuple[str, ...] | None = None
    invented: int | None = None
    rouge_l: float | None = None
    citation_precision: float | None = None
    citation_recall: float | None = None
    routing: tuple[tuple[int, ...], ...] = ()
    gate_entropy: tuple[float, ...] = ()
    tokens: int | None = None
    lost: tuple[tuple[int, int], ...] = ()

    @property
    def answerable(self) -> bool:
        """Whether anything in the corpus answers it."""
        return bool(self.answers)

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Sample:
        """Read one line; ValueError where it is none of ours."""
        record = json.loads(line)
        if not isinstance(record, dict) or not {"id", "digest", "status"} <= record.keys():
            raise ValueError("not a sample")
        unknown = record.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        names = ("answers", "read", "retrieved", "gate_entropy", "gold_read", "cited")
        lists = {name: tuple(record[name]) for name in names if record.get(name) is not None}
        lists |= {name: tuple(tuple(row) for row in record.get(name, ())) for name in ("routing", "lost")}
        try:
            return cls(**{**record, **lists})
        except TypeError as error:
            raise ValueError(str(error)) from None


def digest_of(*parts: Any) -> str:
    """16 hexadecimal digits over anything that JSON holds."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_samples(path: Path) -> list[Sample]:
    """All records of a file, in its order. DataError with the line where one is damaged."""
    samples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                samples.append(Sample.from_json(line))
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not a sample of an evaluation ({error})", hint=f"remove {path} and run it again"
                ) from None
    return samples


class SampleFile:
    """The records of one evaluation under one condition.

    ``path`` None keeps them in memory only. With ``resume`` the records of an earlier run are kept where their digest
    is the one expected now; those that ended in an error are tried again.
    """

    def __init__(self, path: Path | None, *, resume: bool = True) -> None:
        self.path = path
        self._records: dict[str, Sample] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        elif path.exists():
            _drop_torn_line(path)
            self._records = {sample.id: sample for sample in read_samples(path)}

    def add(self, samples: Iterable[Sample]) -> None:
        """Record some; they are on the disk when this returns."""
        samples = list(samples)
        self._records.update((sample.id, sample) for sample in samples)
        if self.path is not None and samples:
            with self.path.open("a", encoding="utf-8") as out:
                out.write("".join(sample.to_json() + "\n" for sample in samples))
                out.flush()
                os.fsync(out.fileno())

    def done(self, digests: Mapping[str, str]) -> set[str]:
        """Of the ids in ``digests`` (id to expected digest), those that need not be done again."""
        return {
            name
            for name, digest in digests.items()
            if (have := self._records.get(name)) is not None and have.digest == digest and have.status != "error"
        }

    def renew(self, made: Callable[[Sample], Sample], names: Iterable[str]) -> None:
        """Put in the place of some records what is made of them; on the disk when they are finished."""
        self._records.update((name, made(self._records[name])) for name in names)

    def finish(self, ids: Sequence[str]) -> list[Sample]:
        """The records of these ids, in this order; the file is left with exactly them."""
        samples = [self._records[name] for name in ids]
        if self.path is not None:
            write_text(self.path, "".join(sample.to_json() + "\n" for sample in samples))
        return samples


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name and rename it, so that it is there whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As ``write_text``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _drop_torn_line(path: Path) -> None:
    """A kill in the middle of a write leaves a last line without its end: cut it off."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
