"""A small index and a reader that follow the interfaces an evaluation uses, and answer as a test tells them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ragmoe.bundle import write_bundle
from ragmoe.corpus.types import Passage
from ragmoe.evaluation.samples import Sample
from ragmoe.gates import Routing
from ragmoe.neighbours import Neighbours

EXPERTS = 4

PASSAGES = [
    Passage("r1", "The long bridge over the river Sarn opened in 1911.", "Bridge", "rivers", "doc-r1"),
    Passage("r2", "Barges on the Sarn carry gravel and coal.", "Barges", "rivers", "doc-r2"),
    Passage("r3", "The ferry leaves at noon.", "Ferry", "rivers", "doc-r2"),
    Passage("c1", "Bronze coins were struck in Millrace.", "Coins", "coins", "doc-c1"),
    Passage("c2", "A crown has one hundred pence.", "Crown", "coins", "doc-c2"),
]
QUESTIONS: list[dict[str, Any]] = [
    {"id": "q1", "question": "When did the long bridge open?", "answers": ["in 1911", "1911"], "gold_ids": ["r1"]},
    {"id": "q2", "question": "What do barges carry?", "answers": ["gravel and coal"], "gold_ids": ["r2"]},
    {"id": "q3", "question": "Is the ferry late?", "answers": ["no"], "answer_type": "yesno", "gold_ids": ["r3"]},
    {"id": "q4", "question": "Where were bronze coins struck?", "answers": ["Millrace"], "gold_ids": ["c1"]},
    {"id": "q5", "question": "Who engraved the crown?", "answers": [], "context_ids": ["c2"]},
]
DOMAINS = {"q1": "rivers", "q2": "rivers", "q3": "rivers", "q4": "coins", "q5": "coins"}


@dataclass(frozen=True)
class FakeAnswer:
    text: str
    passage_id: str | None = None
    start: int | None = None
    score: float = 0.5
    no_answer_score: float = -1.0
    answered: bool = True


class FakeIndex:
    """Ranks by shared words; embeddings are one-hot by passage."""

    def __init__(self, passages: Sequence[Passage] = PASSAGES) -> None:
        self._passages = {passage.id: passage for passage in passages}
        self.digest, self.retriever, self.width = "index-digest", "dense", len(passages)
        self.searched: list[str] = []

    @property
    def passage_ids(self) -> list[str]:
        return list(self._passages)

    def passages(self, passage_ids: Sequence[str]) -> list[Passage]:
        return [self._passages[name] for name in passage_ids]

    def neighbours(self, questions: Sequence[str], n: int = 16, *, retriever: str | None = None) -> Neighbours:
        self.searched += questions
        ids, vectors = self.passage_ids, torch.zeros(len(questions), n, self.width)
        mask, names = torch.zeros(len(questions), n, dtype=torch.bool), []
        for b, question in enumerate(questions):
            words = set(question.lower().strip("?").split())
            ranked = sorted(ids, key=lambda i: -len(words & set(self._passages[i].text.lower().strip(".").split())))[:n]
            names.append(ranked)
            for at, name in enumerate(ranked):
                vectors[b, at, ids.index(name)] = 1.0
                mask[b, at] = True
        return Neighbours(vectors, mask.float(), mask, names)


@dataclass
class FakeConfig:
    neighbours: int = 2
    no_answer_threshold: float = 0.0
    gate: str = "retrieval"
    neighbour_summary: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"neighbours": self.neighbours, "no_answer_threshold": self.no_answer_threshold}


@dataclass
class FakeReader:
    """Answers from a table; every token goes to the expert that the first neighbour names (expert 0 without).

    Each question is three tokens. Where ``limited``, an expert turns away the last of them, and nobody else serves it.
    """

    answers: Mapping[str, FakeAnswer] = field(default_factory=dict)
    config: FakeConfig = field(default_factory=FakeConfig)
    gate_sees_neighbours: bool = True
    sparse_layers: tuple[int, ...] = (1, 3)
    held_back: tuple[int, ...] = ()
    weight: float = 1.0
    limited: bool = False
    fails_on: Callable[[str], bool] = lambda question: False
    calls: list[tuple[list[str], list[list[str]], list[list[str]] | None]] = field(default_factory=list)
    recalled: list[list[str]] = field(default_factory=list)

    expert_names = tuple(f"expert {i}" for i in range(EXPERTS))

    def parameter_counts(self) -> dict[str, int]:
        return {"active": 1_500_000, "total": 4_000_000}

    def state_dict(self) -> dict[str, Any]:
        return {"weight": torch.tensor([self.weight])}

    def check_index(self, index: Any) -> None:
        assert index.digest == "index-digest"

    def memory(self, index: Any) -> None:
        return None

    def recall(self, neighbours: Neighbours, index: Any, domains: Sequence[str] | None = None) -> Neighbours:
        self.recalled.append(list(domains or []))
        return neighbours

    def read(
        self,
        questions: Sequence[str],
        passages: Sequence[Sequence[Passage]],
        neighbours: Neighbours | None,
        *,
        statistics: Any = None,
        domains: Sequence[str] | None = None,
    ) -> list[FakeAnswer]:
        if failing := [question for question in questions if self.fails_on(question)]:
            raise RuntimeError(f"cannot read {failing[0]}")
        shown = neighbours.passage_ids if neighbours is not None else None
        self.calls.append((list(questions), [[p.id for p in row] for row in passages], shown))
        if statistics is not None:
            statistics.update(
                [self._routing(questions, neighbours)] * len(self.sparse_layers), *_tokens(questions, domains)
            )
        return [self.answers.get(question, FakeAnswer("nonsense")) for question in questions]

    def _routing(self, questions: Sequence[str], neighbours: Neighbours | None) -> Routing:
        first = [0] * len(questions)
        if neighbours is not None:
            rows = enumerate(neighbours.mask_BN[:, 0].tolist())
            first = [int(neighbours.embeddings_BNR[b, 0].argmax()) % EXPERTS if there else 0 for b, there in rows]
        experts_SK = torch.tensor(first).repeat_interleave(3).unsqueeze(1)
        logits_SE = torch.zeros(len(experts_SK), EXPERTS)
        served_SK = experts_SK.clone() if self.limited else None
        if served_SK is not None:
            served_SK[2::3] = EXPERTS
        return Routing(torch.ones(len(experts_SK), 1), experts_SK, logits_SE, served_SK=served_SK)


def _tokens(questions: Sequence[str], domains: Sequence[str] | None) -> tuple[torch.Tensor, Sequence[str]]:
    return torch.ones(3 * len(questions), dtype=torch.bool), domains or [""] * len(questions)


RIGHT = {
    "When did the long bridge open?": FakeAnswer("1911", "r1", 45),
    "What do barges carry?": FakeAnswer("coal", "r2", 36),
    "Is the ferry late?": FakeAnswer("no", "r3"),
    "Where were bronze coins struck?": FakeAnswer("in Millrace", "c1", 24),
    "Who engraved the crown?": FakeAnswer("pence", "c2", 24, no_answer_score=3.0, answered=False),
}


@pytest.fixture
def index() -> FakeIndex:
    return FakeIndex()


@pytest.fixture
def make_reader() -> Callable[..., FakeReader]:
    """A reader that answers q1 and q4 well, q2 half, q3 and q5 rightly; changed as a test wants."""
    return lambda **changes: FakeReader(**{"answers": RIGHT, **changes})


@pytest.fixture
def make_answer() -> type[FakeAnswer]:
    return FakeAnswer


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """Writes the questions and a task over them; returns the task's path."""

    def write(questions: Sequence[Mapping[str, Any]] = QUESTIONS, **settings: Any) -> Path:
        rows = [{"domain": DOMAINS.get(q["id"], ""), **q} for q in questions]
        (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = tmp_path / "task.yaml"
        task.write_text(json.dumps({"name": "small", "questions": ["questions.jsonl"], **settings}))
        return task

    return write


@pytest.fixture
def sample() -> Callable[..., Sample]:
    """A scored sample; ``em`` follows ``f1`` unless given."""

    def make(id: str, f1: float | None, *, domain: str = "a", doc: str = "", **changes: Any) -> Sample:
        values = {
            "digest": "d",
            "example": f"example of {id}",
            "doc_id": doc or id,
            "status": "ok",
            "question": f"question {id}",
            "answer_type": "span",
            "answers": ("x",) if f1 is not None else (),
            "prediction": "x",
            "f1": f1,
            "em": f1,
            "f1_thresholded": f1,
            "em_thresholded": f1,
            "answered": True,
            "no_answer_score": 0.0,
        }
        return Sample(id=id, domain=domain, **{**values, **changes})

    return make


EXPERIMENT: dict[str, Any] = {
    "name": "small",
    "index": "idx",
    "train": {"data": {"questions": ["train.jsonl"], "index": "unused"}, "train": {"steps": 7}},
    "arms": {"dense": {"model.sparse_layers": []}, "retrieval": {"model.gate": "retrieval", "train.steps": 9}},
    "seeds": [0, 1],
    "tasks": ["task.yaml"],
    "comparisons": [["retrieval", "dense"]],
    "result": "results/small.json",
}


@dataclass
class Trained:
    bundle: Path
    seconds: float = 12.0


@pytest.fixture
def trained(
    make_reader: Callable[..., FakeReader], index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Stands in for training, loading and the index; lists what was trained, as arm/seed."""
    calls: list[str] = []

    def train(config: Any, *, out: Path, resume: bool, cache: Path, show: bool) -> Trained:
        calls.append(f"{out.parent.parent.name}/{config.seed}")
        out.mkdir(parents=True, exist_ok=True)
        (out / "training.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        history = [{"step": step, "loss": 9.0, "answer_loss": 3.0 / step} for step in range(1, 1 + config.train.steps)]
        (out / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history))
        write_bundle(out, {"weight": torch.full((1,), float(config.seed))}, expert_tensors=set(), gate_tensors=set())
        return Trained(out)

    def load(bundle: Path) -> Any:
        seed = int(bundle.parent.name.removeprefix("seed-"))
        if "dense" in str(bundle):
            return make_reader(gate_sees_neighbours=False, sparse_layers=(), weight=float(seed))
        return make_reader(weight=10.0 + seed, answers={} if seed else make_reader().answers)

    index.folder = tmp_path / "idx"
    monkeypatch.setattr("ragmoe.training.train", train)
    monkeypatch.setattr("ragmoe.models.load", load)
    monkeypatch.setattr("ragmoe.training.build.build_model", lambda config, index, on_cpu: make_reader(answers={}))
    monkeypatch.setattr("ragmoe.evaluation.experiment_run.index_of_recipe", lambda path, progress: index)
    return calls


@pytest.fixture
def write(tmp_path: Path, make_task: Callable[..., Path]) -> Callable[..., Path]:
    """Writes the experiment's file with changes."""
    make_task()

    def make(**changes: Any) -> Path:
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**EXPERIMENT, **changes}))
        return tmp_path / "small.yaml"

    return make
