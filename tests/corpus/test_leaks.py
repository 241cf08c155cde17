"""What may be predicted with which passage; the whole of it is tested with language models' training."""

from __future__ import annotations

from ragmoe.corpus import Passage
from ragmoe.corpus.leaks import LeakGuard

WORDS = [f"word{i}" for i in range(60)]


def test_a_passage_shorter_than_a_gram_that_stands_in_the_document_is_found() -> None:
    document = Passage(id="d", text=" ".join(WORDS))
    others = {
        "inside": " ".join(WORDS[20:26]),
        "inside, of 13": " ".join(WORDS[20:33]),
        "shuffled": " ".join(reversed(WORDS[20:26])),
        "elsewhere": "six words of something quite else",
        "one word": WORDS[3],
    }
    passages = [Passage(id=name, text=text) for name, text in others.items()]
    guard = LeakGuard([document], passages)
    chunk = guard.grams(" ".join(WORDS[:30]))
    allowed = [guard.allows(0, chunk, row) for row in range(len(passages))]
    assert allowed == [False, False, True, True, False]


def test_many_copies_of_one_document_are_compared_once() -> None:
    """Two thousand of each: pairs of copies would be four million."""
    text = " ".join(WORDS)
    copies = [Passage(id=f"copy-{i}", text=text) for i in range(2000)]
    nearly = [Passage(id=f"near-{i}", text=f"{text} more") for i in range(2000)]
    other = Passage(id="other", text=" ".join(reversed(WORDS)))
    empty = [Passage(id=f"empty-{i}", text="...") for i in range(2)]
    guard = LeakGuard([*copies, empty[0]], [*nearly, *copies[:3], other, *empty])
    chunk = guard.grams("thirteen words that stand nowhere else " * 3)
    rows = (0, 1999, 2001, 2003, 2004, 2005)
    assert [guard.allows(5, chunk, row) for row in rows] == [False, False, False, True, True, True]
    # Of texts without words each hides itself alone.
    assert [guard.allows(2000, chunk, row) for row in rows] == [True, True, True, True, False, True]
    assert guard.hidden() == {*(f"near-{i}" for i in range(2000)), "copy-0", "copy-1", "copy-2", "empty-0"}
