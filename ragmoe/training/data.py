"""From questions and an index to batches.

B questions, M passages a question, Q = B*M sequences, T tokens, N neighbours.
"""

from __future__ import annotations

import glob
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ragmoe._errors import DataError
from ragmoe.corpus import read_questions
from ragmoe.corpus.cloze import CLOZE, ORIGIN
from ragmoe.corpus.types import Passage, Question
from ragmoe.index import Index
from ragmoe.models.config import SPECIAL_CANDIDATES
from ragmoe.models.windows import Window, collate, room, tokenize_passages, tokenize_questions, window
from ragmoe.neighbours import Neighbours
from ragmoe.training.config import DataConfig, RaftConfig
from ragmoe.training.digests import digest, is_held
from ragmoe.training.raft import Example, sample
from ragmoe.training.retrieved import Retrieved

# So many more than are read are retrieved for a question.
SPARE_NEIGHBOURS = 10
# Distractors come from this many neighbours beyond those that are read, since some hold the answer.
_SPARE = 8
_FIRST_TOKEN = len(SPECIAL_CANDIDATES)

Recall = Callable[[Neighbours, Question], Neighbours]
Say = Callable[[str], object]


def load_questions(patterns: Sequence[str], limit: int | None = None) -> list[Question]:
    """Questions of all files; with a limit, those with the lowest digests (so that the order of files is nothing)."""
    files = sorted({name for pattern in patterns for name in glob.glob(pattern, recursive=True)})
    missing = [pattern for pattern in patterns if not glob.glob(pattern, recursive=True)]
    if missing:
        raise DataError(f"no question file matches {', '.join(missing)}")
    questions = [question for name in files for question in read_questions(Path(name))]
    return questions if limit is None else _lowest(questions, limit)


def _lowest(questions: list[Question], limit: int) -> list[Question]:
    if limit >= len(questions):
        return questions
    kept = sorted(questions, key=lambda q: digest(q.id))[:limit]
    return sorted(kept, key=lambda q: q.id)


def training_questions(config: DataConfig, say: Say | None = None) -> list[Question]:
    """What is learned from: the questions, and so many others of those to replay as make up their share.

    Args:
        say: told where there are too few of them.
    """
    own = load_questions(config.questions, config.limit)
    if not config.replay:
        return own
    known = {question.id for question in own}
    others = [question for question in load_questions(config.replay) if question.id not in known]
    wanted = round(len(own) * config.replay_share / (1 - config.replay_share))
    if say:
        say_replayed(say, min(wanted, len(others)), wanted, len(own), config.replay_share)
    return own + _lowest(others, wanted)


def say_replayed(say: Say, found: int, wanted: float, own: int, share: float) -> None:
    """Tell where what there is to replay makes up less than its share."""
    if found < wanted:
        say(
            f"what is replayed makes up {found / (own + found):.0%} of what is learned from, not {share:.0%} "
            "(data.replay_share): data.replay holds no more"
        )


def hold_out(
    questions: Sequence[Question], index: Index, share: float, limit: int
) -> tuple[list[Question], list[Question]]:
    """Split by the document a question is about: (to fit on, to calibrate on).

    Documents are drawn by digest, and so are the ``limit`` questions of them that are used; the others of a held
    document are left out of both. Cloze questions are only fitted on: nobody will ask such a thing.
    """
    fit: list[Question] = []
    held: list[Question] = []
    for question in questions:
        if question.meta.get(ORIGIN) == CLOZE:
            fit.append(question)
            continue
        place = next(iter(question.gold_ids or question.context_ids), None)
        document = (index.passage(place).doc_id or place) if place else question.id
        (held if is_held(document, share) else fit).append(question)
    return fit, sorted(held, key=lambda question: digest(question.id))[:limit]


def check_questions(questions: Sequence[Question], index: Index) -> None:
    """Raise DataError for the first question that cannot be what it says it is."""
    for question in questions:
        said = question.answers[0].lower() if question.answers else ""
        if question.answer_type == "yesno" and said not in SPECIAL_CANDIDATES:
            raise DataError(f"question {question.id}: the answer is {said!r}; expected yes, no or maybe")
    check_passages(questions, index)


def check_passages(questions: Sequence[Question], index: Index) -> None:
    """Raise DataError for the first question that names a passage which the index does not hold."""
    for question in questions:
        for name in (*question.gold_ids, *question.context_ids):
            if index.find(name) is None:
                raise DataError(
                    f"question {question.id} names the passage {name!r}, which {index.folder} does not hold",
                    hint="ragmoe data check FILE --index DIR lists all such questions",
                )


def gold_ids(question: Question) -> list[str]:
    """The passages from which an answer can be learned: those with a span, or any gold one for yes, no and maybe."""
    if question.answer_type == "yesno":
        return list(question.gold_ids)
    return list(dict.fromkeys(span.passage_id for span in question.answer_spans))


def learnable(question: Question) -> bool:
    """Whether a reader can learn from a question: it has an answer to point at, or none at all."""
    return bool(gold_ids(question)) or not question.answers


class RaftDataset(Dataset):
    """The examples of a whole run in the order they are shown: item i is fixed by the seed alone.

    Each pass goes over all questions in a new order. Within ``bucket`` batches questions are grouped by the length of
    their passage, so that little is padded; the batches themselves stay in random order.

    Args:
        recall: what the model adds to the neighbours of a question (see ``MemoryMixin.recall``); None adds nothing.
        gold: the passages from which the answer to a question can be learned.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        index: Index,
        retrieved: Retrieved,
        config: RaftConfig,
        *,
        examples: int,
        batch_size: int,
        seed: int,
        question_field: str = "question",
        bucket: int = 8,
        recall: Recall | None = None,
        gold: Callable[[Question], list[str]] = gold_ids,
    ) -> None:
        self.gold = gold
        self.questions = list(questions)
        self.index = index
        self.retrieved = retrieved
        self.config = config
        self.seed = seed
        self.raw = question_field == "question_raw"
        self.recall = recall or (lambda neighbours, question: neighbours)
        # Whose neighbours the gate is shown: in a random cycle of all questions the next one's, so never its own.
        self.shown = list(range(len(self.questions)))
        if config.shuffle_neighbours:
            cycle = random.Random(seed).sample(self.shown, len(self.shown))
            self.shown = [after for _, after in sorted(zip(cycle, cycle[1:] + cycle[:1], strict=True))]
        # Characters of each question's passage.
        self.lengths = [self._length(question) for question in self.questions]
        # Which question is shown, and which of its random draws: both are independent of how batches are cut.
        self.order, self.draws = self._plan(examples, batch_size, bucket)

    def __len__(self) -> int:
        return len(self.order)

    def text(self, question: Question) -> str:
        """The question as it is asked and retrieved with."""
        return question.raw if self.raw else question.question

    def __getitem__(self, at: int) -> Example:
        place = self.order[at]
        question = self.questions[place]
        gold = self.gold(question)
        spare = self.retrieved.ids(place)[: self.config.passages + _SPARE]
        # The passage an unanswerable question was asked over is its hardest distractor.
        spare = list(dict.fromkeys([*(() if gold else question.context_ids), *spare]))
        known = {passage.id: passage for passage in self.index.passages(list(dict.fromkeys([*gold, *spare])))}
        return sample(
            question,
            [known[name] for name in gold],
            [known[name] for name in spare],
            self.recall(self.retrieved.neighbours(self.shown[place], self.config.neighbours), question),
            self.config,
            seed=self.seed * 1_000_003 + self.draws[at],
        )

    def _plan(self, examples: int, batch_size: int, bucket: int) -> tuple[list[int], list[int]]:
        draw = random.Random(self.seed)
        order: list[int] = []
        while len(order) < examples:
            epoch = list(range(len(self.questions)))
            draw.shuffle(epoch)
            order += epoch
        order = order[:examples]
        planned: list[int] = []
        for begin in range(0, examples, batch_size * bucket):
            end = min(examples, begin + batch_size * bucket)
            part = sorted(range(begin, end), key=lambda i: self.lengths[order[i]])
            batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
            # A last, smaller batch must stay last, or those after it would be cut differently.
            last = [batches.pop()] if len(batches[-1]) < batch_size else []
            draw.shuffle(batches)
            planned += [i for batch in batches + last for i in batch]
        return [order[i] for i in planned], planned

    def _length(self, question: Question) -> int:
        names = question.gold_ids or question.context_ids
        return len(self.index.passage(names[0]).text) if names else 0


class RaftCollator:
    """Examples to the named tensors of ``forward``; every example becomes M sequences."""

    def __init__(self, tokenizer: Any, config: RaftConfig, *, raw: bool = False) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.raw = raw

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        M = self.config.passages
        texts = [e.question.raw if self.raw else e.question.question for e in examples]
        asked = tokenize_questions(self.tokenizer, texts, self.config.max_length)
        sequences: list[Window] = []
        start_BM = torch.zeros(len(examples), M, dtype=torch.long)
        end_BM = torch.zeros_like(start_BM)
        for b, (example, question) in enumerate(zip(examples, asked, strict=True)):
            for m, (w, start, end) in enumerate(self._sequences(example, question)):
                sequences.append(w)
                start_BM[b, m], end_BM[b, m] = start, end
        batch = collate(self.tokenizer, sequences)
        neighbours = Neighbours.stack([example.neighbours for example in examples])
        return {**batch, **neighbours.tensors(), "start_positions": start_BM, "end_positions": end_BM}

    def _sequences(self, example: Example, question: list[int]) -> list[tuple[Window, int, int]]:
        draw = random.Random(example.seed)
        passages = example.passages
        # An index of a few passages may have too few distractors; an empty passage answers nothing and costs nothing.
        passages = passages + [Passage("", "")] * (self.config.passages - len(passages))
        tokenized = tokenize_passages(self.tokenizer, [passage.text for passage in passages])
        size = room(question, self.config.max_length)
        found = []
        for m, text in enumerate(tokenized):
            at_most = max(0, len(text.ids) - size)
            is_gold = m == example.gold
            whole = window(self.tokenizer, question, text, 0, len(text.ids))
            span = example.span if is_gold else None
            seen = whole.visible(span.start, span.start + len(span.text)) if span else None
            target = whole.token_span(*seen) if seen else None
            low, high = 0, at_most
            if target is not None:
                first, last = (position - whole.context_start for position in target)
                # An answer longer than the window is read from its beginning, as far as the window reaches.
                low, high = max(0, min(last + 1 - size, first)), min(first, at_most)
                low = min(low, high) if last - first < size else high
            begin = draw.randint(low, high)
            w = window(self.tokenizer, question, text, begin, size)
            found.append((w, *self._target(example, w, is_gold, seen)))
        return found

    def _target(self, example: Example, w: Window, is_gold: bool, seen: tuple[int, int] | None) -> tuple[int, int]:
        """Candidates of start and end; ``seen`` are the characters of the answer that have tokens."""
        if is_gold and example.span is None:
            said = SPECIAL_CANDIDATES.index(example.question.answers[0].lower())
            return said, said
        if not is_gold or seen is None:
            return 0, 0
        positions = w.token_span(seen[0], min(w.offsets[-1][1], seen[1]))
        assert positions is not None, "the window was chosen to hold the answer's beginning"
        return positions[0] + _FIRST_TOKEN, positions[1] + _FIRST_TOKEN

    def decoded(self, batch: dict[str, Tensor]) -> list[dict[str, str]]:
        """What a batch says, a row a sequence: ``sequence`` and ``target``."""
        rows, first = [], len(SPECIAL_CANDIDATES)
        starts, ends = batch["start_positions"].reshape(-1), batch["end_positions"].reshape(-1)
        for ids, start, end in zip(batch["input_ids"], starts.tolist(), ends.tolist(), strict=True):
            target = (SPECIAL_CANDIDATES[start] or "(no answer here)") if start < first else None
            rows.append(
                {
                    "sequence": self.tokenizer.decode(ids[ids != self.tokenizer.pad_token_id]),
                    "target": target or self.tokenizer.decode(ids[start - first : end - first + 1]),
                }
            )
        return rows
