"""The prompt a generator answers from: numbered passages, the question, and the answer with the number it cites.

Where the tokenizer has a chat template the prompt is a user's turn and the answer the assistant's; else plain text.
Source of the examples: Zhang et al. 2024, "RAFT: Adapting Language Model to Domain Specific RAG".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ragmoe._errors import DataError, ModelError
from ragmoe.corpus.types import Passage
from ragmoe.generation.citations import cite
from ragmoe.index.windows import encoder_text

WithoutGold = Literal["refuse", "memory"]

#: What is answered where nothing answers the question.
REFUSAL = "not in the documents"
_INSTRUCTIONS: dict[WithoutGold, str] = {
    "refuse": "Answer the question from the documents, and give the number of the one that says it in brackets, "
    f"as in [1]. If none of them says it, answer: {REFUSAL}",
    "memory": "Answer the question. If one of the documents says it, give its number in brackets, as in [1]; if none "
    f"does, answer from memory, without a number. If nothing is known of it, answer: {REFUSAL}",
}
# What a prompt ends with where there is no chat template.
_ANSWER = "Answer:"
# A passage shortened to fewer words than this says nothing that helps: it is left out.
_LEAST_WORDS = 8
# Words this long on average are none: the text is written without spaces, and so many characters count as a word.
_NO_WORD, _CHARACTERS = 40, 2


@dataclass(frozen=True)
class PromptStyle:
    """How a generator is asked; saved beside the model, so that it is asked as it was trained.

    Attributes:
        without_gold: what is expected where no passage answers: ``refuse``, or the answer from ``memory``.
        max_length: tokens of prompt and answer together.
        max_answer_tokens: longest answer that is generated.
    """

    without_gold: WithoutGold = "refuse"
    max_length: int = 1024
    max_answer_tokens: int = 64

    def __post_init__(self) -> None:
        if self.without_gold not in _INSTRUCTIONS:
            raise ValueError(f"without_gold is {self.without_gold!r}: expected {' or '.join(_INSTRUCTIONS)}")
        for name in ("max_length", "max_answer_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: expected a number of tokens")
        if self.max_answer_tokens >= self.max_length:
            raise ValueError(
                f"max_answer_tokens is {self.max_answer_tokens}, of which max_length, {self.max_length}, must be more"
            )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as tokens.

    Attributes:
        ids: what is read.
        answer_ids: what should follow, with the token that ends it; empty where the answer is asked for.
        passages: those in the prompt, in the order of their numbers from 1, some perhaps shortened.
        shortened, left_out: how many passages were, for want of room.
    """

    ids: list[int]
    answer_ids: list[int]
    passages: tuple[Passage, ...]
    shortened: int = 0
    left_out: int = 0


class PromptMaker:
    """Makes prompts for one tokenizer.

    Args:
        ends: further tokens by which a model ends its turn, beside the tokenizer's ``eos_token``.

    Raises:
        ModelError: the tokenizer has no token that ends a text, so that no answer would ever end.
    """

    def __init__(self, tokenizer: Any, style: PromptStyle | None = None, ends: Sequence[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no eos_token, so that no answer would end: expected one")
        self.tokenizer = tokenizer
        self.style = style or PromptStyle()
        self._ends = {tokenizer.eos_token_id, *ends}
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self._control = _control_tokens(tokenizer)

    def make(
        self,
        question: str,
        passages: Sequence[Passage],
        *,
        gold: int | None = None,
        answer: str | None = None,
        room: int = 0,
    ) -> Prompt:
        """A prompt for training, with its answer, or for answering, without.

        Neither the question nor the gold passage is ever cut. In training the distractors are shortened evenly, and
        left out where little would be left of them; the gold passage's number is then the one it has in the prompt.
        In answering the last passages, which are the worst, are left out, and only the first one is shortened.

        Args:
            passages: in the order in which they are numbered.
            gold: place of the passage that ``answer`` cites; None cites none.
            room: tokens that are to find room behind it, beyond the longest answer that is given.

        Raises:
            DataError: question, gold passage and answer alone are longer than ``max_length``.
        """
        kept = list(passages)
        asked = max(self.style.max_answer_tokens, room)
        reserved = asked if answer is None else self._longest_answer(answer, gold, len(kept))
        room = self.style.max_length - reserved
        if len(ids := self.ids(question, kept)) <= room:
            return self._prompt(ids, kept, kept, gold, answer)
        needed = [] if gold is None else [kept[gold]]
        if (least := len(self.ids(question, needed))) > room:
            raise DataError(
                f"the question {question[:60]!r}{' with its gold passage' if needed else ''} takes {least} tokens and "
                f"its answer {reserved}, but a prompt has {self.style.max_length}",
                hint="raft.max_length=MORE for training, where the model has the positions for it",
            )
        held = needed[0] if needed else None
        while len(kept) > len(needed):
            last = max(i for i, passage in enumerate(kept) if passage is not held)
            # Whoever answers does not know which passage is the gold one: the best is given whole if it can be.
            if (answer is not None or len(kept) == 1) and (found := self._shortened(question, kept, held, room)):
                return self._prompt(self.ids(question, found), found, passages, gold, answer)
            del kept[last]
            if len(ids := self.ids(question, kept)) <= room:
                break
        return self._prompt(self.ids(question, kept), kept, passages, gold, answer)

    def fits(self, question: str, gold: Passage | None, answer: str, passages: int) -> bool:
        """Whether ``make`` finds room for a question, its answer and its gold passage among so many passages."""
        needed = [] if gold is None else [gold]
        longest = self._longest_answer(answer, None if gold is None else 0, passages)
        return len(self.ids(question, needed)) + longest <= self.style.max_length

    def ids(self, question: str, passages: Sequence[Passage]) -> list[int]:
        """The tokens of a prompt, whatever its length."""
        parts = [_INSTRUCTIONS[self.style.without_gold]]
        parts += [f"[{number}] {encoder_text(passage)}" for number, passage in enumerate(passages, start=1)]
        content = "\n\n".join([*parts, f"Question: {question}"])
        if self._chat:
            return self._tokens(self._rendered([{"role": "user", "content": self._text(content)}], opened=True))
        # What reads like a control token in a text is text.
        ids = self.tokenizer(f"{content}\n{_ANSWER}", split_special_tokens=True)["input_ids"]
        # Some tokenizers end every text, and a prompt goes on.
        return list(ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids)

    def answer_ids(self, answer: str) -> list[int]:
        """The tokens of an answer after its prompt, up to the one that ends it.

        A chat template may go on behind the end of a turn, with what no model says.
        """
        if self._chat:
            # What a template puts around an answer does not depend on what was asked.
            asked, answer = [{"role": "user", "content": "?"}], self._text(answer)
            before = self._rendered(asked, opened=True)
            whole = self._rendered([*asked, {"role": "assistant", "content": answer}])
            ids = self._tokens(whole.removeprefix(before) if whole.startswith(before) else answer)
        else:
            # Some tokenizers set a token before whatever text they are given: the answer goes on after a colon.
            opening, ids = self._tokens(_ANSWER, plain=True), self._tokens(f"{_ANSWER} {answer}", plain=True)
            ids = ids[len(opening) :] if ids[: len(opening)] == opening else self._tokens(f" {answer}", plain=True)
        end = next((at for at, id in enumerate(ids) if id in self._ends), None)
        return [*ids, self.tokenizer.eos_token_id] if end is None else ids[: end + 1]

    def _prompt(
        self, ids: list[int], kept: Sequence[Passage], given: Sequence[Passage], gold: int | None, answer: str | None
    ) -> Prompt:
        if answer is not None and gold is not None:
            answer = cite(answer, 1 + next(i for i, passage in enumerate(kept) if passage is given[gold]))
        shortened = sum(all(passage is not whole for whole in given) for passage in kept)
        answered = [] if answer is None else self.answer_ids(answer)
        return Prompt(ids, answered, tuple(kept), shortened, len(given) - len(kept))

    def _longest_answer(self, answer: str, gold: int | None, passages: int) -> int:
        """Tokens of the answer with the longest number it may cite."""
        if gold is None:
            return len(self.answer_ids(answer))
        return max(len(self.answer_ids(cite(answer, number))) for number in range(1, max(passages, 1) + 1))

    def _shortened(
        self, question: str, passages: Sequence[Passage], held: Passage | None, room: int
    ) -> list[Passage] | None:
        """The passages but for the one held cut to as many words each as there is room for; None where that is few."""

        def cut(words: int) -> list[Passage]:
            return [passage if passage is held else _first_words(passage, words) for passage in passages]

        low, high = _LEAST_WORDS, max(_words(passage.text) for passage in passages if passage is not held)
        if len(self.ids(question, cut(low))) > room:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if len(self.ids(question, cut(middle))) <= room else (low, middle - 1)
        return cut(low)

    def _rendered(self, turns: list[dict[str, str]], *, opened: bool = False) -> str:
        # The instruction stands in the user's turn: some templates know no system role.
        # An answer is short and cites: models that think aloud (Qwen3) are told not to; other templates ask for no such
        # thing.
        how = {"add_generation_prompt": opened, "enable_thinking": False}
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **how))

    def _text(self, text: str) -> str:
        """A text in which nothing reads like a control token, so that none of these ends the user's turn.

        A chat template's own control tokens stand in the same string, so those of a text are told apart by a space. Of
        templates whose turns begin and end with plain text nothing is promised.
        """
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) if self._control else text

    def _tokens(self, text: str, *, plain: bool = False) -> list[int]:
        """``plain``: what reads like a control token is text."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"])


def _control_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds what a tokenizer reads as control tokens; None where it has none."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {name for name in names if len(name) > 1}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _without_spaces(text: str) -> bool:
    return len(text) > _NO_WORD * len(text.split())


def _words(text: str) -> int:
    return -(-len(text) // _CHARACTERS) if _without_spaces(text) else len(text.split())


def _first_words(passage: Passage, words: int) -> Passage:
    """A passage with its first words alone, and a mark that there were more; itself where it has no more."""
    if _words(passage.text) <= words:
        return passage
    if _without_spaces(passage.text):
        return replace(passage, text=f"{passage.text[: words * _CHARACTERS].rstrip()} ...")
    pieces = passage.text.split(None, words)
    return replace(passage, text=passage.text[: len(passage.text) - len(pieces[-1])].rstrip() + " ...")
