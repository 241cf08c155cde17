"""What a user calls on a reader: read passages, answer from an index, look at the routing.

Q sequences, T positions, C = 4 + T candidates (none, yes, no, maybe, tokens), L sparse layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragmoe._errors import ModelError
from ragmoe.corpus.types import Passage
from ragmoe.models.config import SPECIAL_CANDIDATES
from ragmoe.models.health import require_numbers
from ragmoe.models.memory import MemoryMixin
from ragmoe.models.output_cache import OutputCache, sequence_keys
from ragmoe.models.windows import Window, collate, tokenize_passages, tokenize_questions, windows
from ragmoe.moe import MOST, RoutingStatistics, SequenceRouting, count_routing
from ragmoe.neighbours import Neighbours

if TYPE_CHECKING:
    from ragmoe.index import Index


@dataclass(frozen=True, slots=True)
class Answer:
    """The best answer to a question in the passages it was read with.

    Attributes:
        text: the best span, or yes, no or maybe, also where ``answered`` is False; empty only if nothing was read.
        answer_type: ``span`` or ``yesno``.
        passage_id, start: where a span stands; ``passage_id`` is also set for yes, no and maybe.
        score: its probability among all answers in all passages read, 0 to 1; what stands in two windows counts twice.
        no_answer_score: by how much (log odds) "no answer here" beats it in its passage.
        answered: whether that is within ``threshold``.
        threshold: the calibrated one of the model, or of the expert that most tokens called where that has its own.
    """

    text: str
    answer_type: str
    passage_id: str | None
    start: int | None
    score: float
    no_answer_score: float
    answered: bool
    threshold: float = 0.0

    @property
    def final_text(self) -> str:
        """The answer to give: empty where nothing answers the question."""
        return self.text if self.answered else ""


@dataclass(frozen=True, slots=True)
class _Sequence:
    question: int
    passage: Passage
    window: Window


@dataclass(frozen=True, slots=True)
class _Candidate:
    """The best answer of one sequence with what is needed to compare it with others."""

    score: float
    none: float
    start_mass: float
    end_mass: float
    special: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class _Output:
    """What reading one sequence gave; ``routing`` where it was to be counted."""

    candidate: _Candidate
    routing: SequenceRouting | None


class ReaderMixin(MemoryMixin, nn.Module):
    """``read``, ``answer`` and ``route`` for a question-answering model.

    Attributes:
        output_cache: where ``read`` keeps what it found, for the same question and passage again; None keeps nothing.
    """

    output_cache: OutputCache | None = None

    if TYPE_CHECKING:

        def post_init(self) -> None: ...

        @property
        def gate_sees_neighbours(self) -> bool: ...
        @property
        def moe_layers(self) -> list[Any]: ...
        @property
        def held_back(self) -> list[int]: ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer saved beside the model; may be set."""
        if getattr(self, "_tokenizer", None) is None:
            from ragmoe.generation.tokenizer import open_tokenizer

            if not self.config._name_or_path:
                raise ModelError("the model has no tokenizer: set model.tokenizer, or open a bundle that holds one")
            self._tokenizer = open_tokenizer(self.config._name_or_path, self)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    def answer(
        self, questions: Sequence[str], index: Index, *, passages: int = 5, neighbours: int | None = None
    ) -> list[Answer]:
        """Answer from an index: retrieve, let the neighbours steer the gate, read the best passages.

        Args:
            passages: how many are read.
            neighbours: how many the gate sees; None means as many as the model was trained with.

        Raises:
            ModelError: when the index's encoder is not the one the model was trained with.
        """
        self.check_index(index)
        N = self.config.neighbours if neighbours is None else neighbours
        found = index.neighbours(questions, max(N, passages))
        read = [index.passages(ids[:passages]) for ids in found.passage_ids]
        return self.read(questions, read, self.recall(found.first(N), index))

    @torch.no_grad()
    def read(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        neighbours: Neighbours | None = None,
        *,
        batch_tokens: int | None = None,
        statistics: RoutingStatistics | None = None,
        domains: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Answer each question from its own passages, choosing across them.

        Args:
            passages: for each question those to read; a long one is read in overlapping windows.
            neighbours: what the gate sees; None is the same as none found.
            batch_tokens: tokens of a batch, padding included; None takes 2048 on a processor, where small batches
                waste less on padding and stay in the cache, and 8192 elsewhere.
            statistics: counts the routing, by ``domains`` (one for each question) where given.
        """
        self.eval()
        for name, given in (("neighbours", neighbours), ("domains", domains)):
            if given is not None and len(given) != len(questions):
                raise ValueError(f"{len(questions)} questions, but {name} for {len(given)}")
        sequences = self._sequences(questions, passages)
        counted = statistics is not None or self.config.expert_thresholds is not None
        found = self._outputs(sequences, neighbours, batch_tokens, counted=counted)
        of_question: list[list[tuple[_Sequence, _Output]]] = [[] for _ in questions]
        for sequence, output in zip(sequences, found, strict=True):
            of_question[sequence.question].append((sequence, output))
            if statistics is not None and output.routing is not None:
                statistics.add(output.routing, domains[sequence.question] if domains else "")
        return [self._choose(own) for own in of_question]

    @torch.no_grad()
    def route(self, question: str, passages: Sequence[Passage], neighbours: Neighbours | None = None) -> np.ndarray:
        """Mean gate probabilities (L, E) over the tokens of question and passages; zero with no expert available.

        Raises:
            ModelError: a gate answers NaN; it names the broken expert, where there is one.
        """
        self.eval()
        total, tokens = np.zeros((len(self.sparse_layers), self.config.experts)), 0
        for inputs in self.batches([question], [passages], neighbours):
            mask_S = inputs["attention_mask"].reshape(-1).bool()
            for layer, routing in enumerate(self(**inputs).routings):
                require_numbers(self, routing.logits_SE)
                total[layer] += routing.probabilities_SE()[mask_S].sum(dim=0).cpu().numpy()
            tokens += int(mask_S.sum())
        return total / max(tokens, 1)

    def question_tokens_lost(self, question: str) -> int:
        """How many tokens at the beginning of a question are not read: of a long one only half a sequence is."""
        whole, read = (
            tokenize_questions(self.tokenizer, [question], size)[0] for size in (None, self.config.max_length)
        )
        return len(whole) - len(read)

    def batches(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        neighbours: Neighbours | None = None,
        *,
        batch_tokens: int | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """What ``read`` gives to ``forward``, batch by batch; the longest sequences first."""
        for _, inputs, _ in self._batches(self._sequences(questions, passages), neighbours, batch_tokens):
            yield inputs

    # -- helpers ----------------------------------------------------------------------------------------------------

    def _sequences(self, questions: Sequence[str], passages: Sequence[Sequence[Passage]]) -> list[_Sequence]:
        if len(questions) != len(passages):
            raise ValueError(f"{len(questions)} questions, but passages for {len(passages)}")
        tokenizer, config = self.tokenizer, self.config
        if config.max_length > config.max_position_embeddings:
            raise ModelError(
                f"max_length is {config.max_length}, but the model has {config.max_position_embeddings} positions"
            )
        asked = tokenize_questions(tokenizer, questions, config.max_length)
        flat = [(b, passage) for b, row in enumerate(passages) for passage in row]
        texts = tokenize_passages(tokenizer, [passage.text for _, passage in flat])
        return [
            _Sequence(b, passage, w)
            for (b, passage), text in zip(flat, texts, strict=True)
            for w in windows(tokenizer, asked[b], text, max_length=config.max_length, stride=config.stride)
        ]

    def _outputs(
        self, sequences: Sequence[_Sequence], neighbours: Neighbours | None, batch_tokens: int | None, *, counted: bool
    ) -> list[_Output]:
        """Read all sequences, or with a cache those that it does not know."""
        if self.output_cache is None:
            return self._forward_all(sequences, neighbours, batch_tokens, counted)

        def read(places: list[int]) -> list[_Output]:
            # Counted in any case, for whoever asks for the same and wants to know.
            return self._forward_all([sequences[i] for i in places], neighbours, batch_tokens, True)

        seen = neighbours if self.gate_sees_neighbours else None
        keys = sequence_keys(self, [(s.question, s.window) for s in sequences], seen, self._device())
        return self.output_cache.values(keys, read)

    def _forward_all(
        self, sequences: Sequence[_Sequence], neighbours: Neighbours | None, batch_tokens: int | None, counted: bool
    ) -> list[_Output]:
        found: dict[int, _Output] = {}
        for at, inputs, batch in self._batches(sequences, neighbours, batch_tokens):
            output = self(**inputs)
            require_numbers(self, output.start_logits, output.end_logits)
            candidates = self._decode(output.start_logits, output.end_logits)
            routings: Sequence[SequenceRouting | None] = [None] * len(batch)
            if counted and output.routings:
                mask_S = inputs["attention_mask"].reshape(-1).bool()
                routings = count_routing(output.routings, mask_S, len(batch))
            found.update(zip(at, map(_Output, candidates, routings), strict=True))
        return [found[i] for i in range(len(sequences))]

    def _device(self) -> torch.device:
        # Weights that were offloaded to the disk are on no device; accelerate brings them to the inputs.
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    def _batches(
        self, sequences: Sequence[_Sequence], neighbours: Neighbours | None, batch_tokens: int | None
    ) -> Iterator[tuple[list[int], dict[str, Tensor], list[_Sequence]]]:
        """Batches of sequences of like length, within the token budget, on the model's device."""
        if neighbours is not None and not self.gate_sees_neighbours:
            neighbours = None
        device = self._device()
        if batch_tokens is None:
            batch_tokens = 2048 if device.type == "cpu" else 8192
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].window), reverse=True)
        while order:
            size = max(1, batch_tokens // len(sequences[order[0]].window))
            at, order = order[:size], order[size:]
            batch = [sequences[i] for i in at]
            inputs = collate(self.tokenizer, [s.window for s in batch])
            if neighbours is not None:
                inputs |= neighbours.rows([s.question for s in batch]).tensors()
            yield at, {name: x.to(device) for name, x in inputs.items()}, batch

    def _decode(self, start_QC: Tensor, end_QC: Tensor) -> list[_Candidate]:
        """The best answer of each sequence: yes, no, maybe, or the best span of at most ``max_answer_tokens``."""
        first = len(SPECIAL_CANDIDATES)
        start_QT, end_QT = start_QC[:, first:], end_QC[:, first:]
        reach = min(self.config.max_answer_tokens, start_QT.shape[1])
        # The best end within reach of each start: a running maximum over the next positions.
        padded_QT = F.pad(end_QT, (0, reach - 1), value=torch.finfo(torch.float32).min)
        best_end_QT, last_QT = padded_QT.unfold(1, reach, 1).max(dim=-1)
        span_Q, first_Q = (start_QT + best_end_QT).max(dim=1)
        last_Q = first_Q + last_QT.gather(1, first_Q.unsqueeze(1)).squeeze(1)
        special_Q4 = start_QC[:, :first] + end_QC[:, :first]
        said_Q, which_Q = special_Q4[:, 1:].max(dim=1)
        is_span_Q = span_Q >= said_Q
        score_Q = torch.where(is_span_Q, span_Q, said_Q)
        mass = [x[:, 1:].logsumexp(dim=1).tolist() for x in (start_QC, end_QC)]
        return [
            _Candidate(*row)
            for row in zip(
                score_Q.tolist(),
                special_Q4[:, 0].tolist(),
                *mass,
                torch.where(is_span_Q, 0, which_Q + 1).tolist(),
                first_Q.tolist(),
                last_Q.tolist(),
                strict=True,
            )
        ]

    def _choose(self, found: list[tuple[_Sequence, _Output]]) -> Answer:
        if not found:
            return Answer("", "span", None, None, 0.0, math.inf, False, self.config.no_answer_threshold)
        sequence, output = max(found, key=lambda pair: pair[1].candidate.score)
        best = output.candidate
        # An answer begins and ends in one passage: pairs across two are no answers.
        mass = np.logaddexp.reduce([output.candidate.start_mass + output.candidate.end_mass for _, output in found])
        none, threshold = best.none - best.score, self._threshold(output.routing)
        common: dict[str, Any] = {
            "passage_id": sequence.passage.id,
            "score": float(np.exp(min(0.0, best.score - mass))),
            "no_answer_score": none,
            "answered": none <= threshold,
            "threshold": threshold,
        }
        if best.special:
            return Answer(SPECIAL_CANDIDATES[best.special], "yesno", start=None, **common)
        window = sequence.window
        start = window.offsets[best.first - window.context_start][0]
        end = window.offsets[best.last - window.context_start][1]
        return Answer(sequence.passage.text[start:end], "span", start=start, **common)

    def _threshold(self, routing: SequenceRouting | None) -> float:
        """What an answer is held against: the own threshold of the expert that most tokens called, or the model's."""
        own = self.config.expert_thresholds
        if own is not None and routing is not None:
            calls_E = routing.calls_E
            called = [at for at, value in enumerate(own) if value is not None and calls_E[at] >= MOST]
            if called:
                return float(own[max(called, key=lambda at: calls_E[at])])
        return float(self.config.no_answer_threshold)
