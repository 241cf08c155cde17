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
