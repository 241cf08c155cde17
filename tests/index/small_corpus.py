"""A small corpus of three domains."""

from __future__ import annotations

from typing import Any

SUBJECTS = {
    "river": ("ferry", "quay", "pilot", "tide", "barge", "lock", "anchor", "rope"),
    "market": ("bread", "cheese", "stall", "baker", "apple", "honey", "basket", "scale"),
    "archive": ("ledger", "map", "charter", "seal", "shelf", "letter", "census", "deed"),
}


def rows() -> list[dict[str, Any]]:
    """24 passages, each about a word of its own; every third is longer than the stub encoder reads."""
    made = []
    for domain, words in SUBJECTS.items():
        for number, word in enumerate(words):
            text = f"The {word} of {domain} has number {number} and belongs to {words[number - 1]}."
            if number % 3 == 0:
                text += f" Further on it says that the {word} was mended twice, painted once, sold at last, "
                text += "and found again."
            made.append(
                {"id": f"{domain}-{number}", "title": word.title(), "text": text, "domain": domain,
                 "doc_id": f"{domain}-d{number // 2}", "split": "train"}
            )  # fmt: skip
    return made
