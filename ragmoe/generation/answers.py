"""What a generator says to a question, and how its words are read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ragmoe.generation.citations import cited_numbers, without_citations
from ragmoe.generation.prompts import REFUSAL, Prompt

# What a model thinks aloud before it answers: also where it came to no end, or its prompt had opened the thought.
_THOUGHT = re.compile(r"^(?:\s*<think>.*?(?:</think>\s*|\Z)|.*?</think>\s*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """An answer in the words of a generator.

    Attributes:
        text: what it says, without citations; empty where it refuses.
        cited: the passages it cites, each once, in its order.
        invented: how many numbers it cites that no passage has.
        passage_id: the first of them, None where there is none.
        score: probability of exactly these words, citations included, 0 to 1.
        no_answer_score: log odds that it refuses rather than says anything else.
        answered: it does not refuse, and says something.
        said: its words as they came.
        shortened, left_out: passages that were, for want of room in the prompt.
    """

    text: str
    cited: tuple[str, ...]
    score: float
    no_answer_score: float
    said: str
    shortened: int = 0
    left_out: int = 0
    invented: int = 0

    answer_type = "text"
    start = None

    @property
    def passage_id(self) -> str | None:
        return self.cited[0] if self.cited else None

    @property
    def answered(self) -> bool:
        return bool(self.text)

    @property
    def final_text(self) -> str:
        """The answer to give: empty where nothing answers the question."""
        return self.text


def read_answer(prompt: Prompt, said: str, nats: float, refusal_nats: float) -> GeneratedAnswer:
    """Make an answer of what was said to a prompt.

    Args:
        nats: log-probability of what was said; ``refusal_nats`` of a refusal in its place.
    """
    spoken = _THOUGHT.sub("", said)
    text = without_citations(spoken)
    if text.strip("\"'.! ").casefold().startswith(REFUSAL):
        text = ""
    ids = [passage.id for passage in prompt.passages]
    numbers = cited_numbers(spoken) if text else []
    cited = [ids[number - 1] for number in numbers if 1 <= number <= len(ids)]
    return GeneratedAnswer(
        text=text,
        cited=tuple(dict.fromkeys(cited)),
        score=math.exp(min(0.0, nats)),
        no_answer_score=_log_odds(refusal_nats),
        said=said,
        shortened=prompt.shortened,
        left_out=prompt.left_out,
        invented=len(numbers) - len(cited),
    )


def _log_odds(nats: float) -> float:
    """log(p / (1 - p)) of a log-probability; infinite where p is one."""
    rest = -math.expm1(min(nats, 0.0))
    return nats - math.log(rest) if rest > 0 else math.inf
