from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ragmoe import DataError
from ragmoe.evaluation.samples import Sample, SampleFile, read_samples, write_text

Make = Callable[..., Sample]


def test_a_sample_survives_its_file(sample: Make, tmp_path: Path) -> None:
    made = sample(
        "1",
        0.5,
        read=("p",),
        retrieved=("p", "q"),
        gold_rank=2,
        routing=((1, 0), (0, 1)),
        gate_entropy=(0.1, 0.2),
        tokens=1,
        lost=((1, 1), (0, 0)),
    )
    assert Sample.from_json(made.to_json()) == made


def test_only_the_same_digest_counts_as_done_and_errors_do_not(sample: Make, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SampleFile(path).add([sample("1", 1.0), sample("2", 1.0, digest="old"), sample("3", None, status="error")])
    again = SampleFile(path)
    assert again.done({"1": "d", "2": "d", "3": "d", "4": "d"}) == {"1"}


def test_a_torn_last_line_is_dropped(sample: Make, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SampleFile(path).add([sample("1", 1.0), sample("2", 1.0)])
    path.write_bytes(path.read_bytes()[:-30])
    file = SampleFile(path)
    assert file.done({"1": "d", "2": "d"}) == {"1"}
    file.add([sample("2", 0.5)])
    assert [s.f1 for s in read_samples(path)] == [1.0, 0.5]


def test_a_damaged_line_in_the_middle_is_named(sample: Make, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"id": "1"}\n' + sample("2", 1.0).to_json() + "\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:1: not a sample"):
        SampleFile(path)


def test_without_resume_it_begins_anew(sample: Make, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    SampleFile(path).add([sample("1", 1.0)])
    assert SampleFile(path, resume=False).done({"1": "d"}) == set()


def test_finished_it_holds_the_questions_asked_in_their_order(sample: Make, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    file = SampleFile(path)
    file.add([sample("2", 1.0), sample("1", 0.0), sample("3", 0.0)])
    file.add([sample("1", 1.0)])
    file.finish(["1", "2"])
    assert [(s.id, s.f1) for s in read_samples(path)] == [("1", 1.0), ("2", 1.0)]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
