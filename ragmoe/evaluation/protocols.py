"""What an evaluation needs of a model and of an index: nothing else of them is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage
    from ragmoe.neighbours import Neighbours


class AnswerLike(Protocol):
    """One answer; ``text`` is the best guess also where ``answered`` is False."""

    @property
    def text(self) -> str: ...
    @property
    def passage_id(self) -> str | None: ...
    @property
    def start(self) -> int | None: ...
    @property
    def score(self) -> float: ...
    @property
    def no_answer_score(self) -> float: ...
    @property
    def answered(self) -> bool: ...


class Reader(Protocol):
    """A model that answers questions from passages, steered by neighbours."""

    @property
    def config(self) -> Any: ...
    @property
    def gate_sees_neighbours(self) -> bool: ...
    @property
    def sparse_layers(self) -> Sequence[int]: ...
    @property
    def expert_names(self) -> Sequence[str]: ...

    def parameter_counts(self) -> Mapping[str, int]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def check_index(self, index: Any) -> None: ...

    def read(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        neighbours: Neighbours | None,
        *,
        statistics: Any = None,
        domains: Sequence[str] | None = None,
    ) -> Sequence[AnswerLike]: ...


class Searchable(Protocol):
    """An index as an evaluation uses it."""

    @property
    def digest(self) -> str: ...
    @property
    def retriever(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def passage_ids(self) -> Sequence[str]: ...

    def neighbours(self, questions: Sequence[str], n: int = 16, *, retriever: str | None = None) -> Neighbours: ...
    def passages(self, passage_ids: Sequence[str], /) -> Sequence[Passage]: ...
