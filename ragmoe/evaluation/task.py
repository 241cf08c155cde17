"""A task: a YAML file that says which questions are asked, over which index, and what the reader is given."""

from __future__ import annotations

import glob
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from ragmoe._errors import ConfigError, DataError
from ragmoe._variables import expand

if TYPE_CHECKING:
    from ragmoe.corpus.types import Question

Perturbation = Literal["null", "shuffled", "wrong_domain"]


class Task(BaseModel):
    """A task as its YAML gives it. Paths are relative to the folder of the file; ``${NAME}`` is the environment's.

    Attributes:
        questions: jsonl files or globs.
        index: an index folder, or a recipe (YAML); ``corpus`` names sources instead. Either is built once and kept.
        question_field: what is asked, and what is retrieved with: ``question``, or ``question_raw`` without the
            document's name.
        label: what comparisons call the setting, such as ``old`` for what a reader knew before it was changed and
            ``new`` for what it then learned; None for the setting's own name.
        setting: ``gold`` gives the reader the passages that hold the answer, ``open`` the best retrieved ones.
            ``rejection`` asks each question twice: over the passages that hold the answer with others, and over others
            alone, where to give none is right. The others are the best retrieved ones that do not say an answer. The
            second is called as the question, with ``#rejection``. After the negative rejection of RGB (Chen et al.
            2024).
        passages: how many passages are read (in ``gold`` those that hold the answer, however many they are).
        neighbours: how many neighbours the gate sees; None for as many as the model was trained with.
        retriever: dense, bm25, hybrid or blend; None for the index's own.
        limit_per_domain: at most so many questions of a domain, always the same ones; see ``subset``.
        perturbations: what else the gate is shown, to see what quality and routing owe to the neighbours.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    description: str = ""
    questions: list[str] = Field(min_length=1)
    index: str | None = None
    corpus: list[str] | None = None
    question_field: Literal["question", "question_raw"] = "question"
    label: str | None = Field(None, min_length=1)
    setting: Literal["gold", "open", "rejection"] = "gold"
    passages: int = Field(5, ge=1)
    neighbours: int | None = Field(None, ge=1)
    retriever: Literal["dense", "bm25", "hybrid", "blend"] | None = None
    limit_per_domain: int | None = Field(None, ge=1)
    perturbations: list[Perturbation] = []
    _folder: Path = PrivateAttr(Path("."))

    @property
    def setting_name(self) -> str:
        """The setting as comparisons name it: ``gold``, ``open``, ``gold_raw`` or ``open_raw``, or its label."""
        return self.label or self.setting + ("_raw" if self.question_field == "question_raw" else "")

    @property
    def judged_by(self) -> str:
        """The score that arms are compared by: of the best guess, or where answers are to be withheld past the
        threshold."""
        return "f1_thresholded" if self.setting == "rejection" else "f1"

    def asked(self, question: Question) -> str:
        """The text of a question that this task asks."""
        return question.raw if self.question_field == "question_raw" else question.question

    def limited(self, limit: int | None) -> Task:
        """The same task with at most ``limit`` questions of a domain."""
        if limit is None:
            return self
        return self.model_copy(update={"limit_per_domain": min(limit, self.limit_per_domain or limit)})

    def load_questions(self) -> list[Question]:
        """Read the questions, in the order of the files; DataError or ConfigError where that fails."""
        from ragmoe.corpus import read_questions

        found: dict[str, tuple[Question, Path]] = {}
        for path in self.question_files():
            for question in read_questions(path):
                if question.id in found:
                    raise DataError(
                        f"task {self.name}: question id {question.id!r} occurs in {found[question.id][1]} and in {path}"
                    )
                found[question.id] = (replace(question, domain=question.domain or path.parent.name), path)
        if not found:
            raise DataError(f"task {self.name}: {', '.join(self.questions)} hold no question")
        return subset([question for question, _ in found.values()], self.limit_per_domain)

    def question_files(self) -> list[Path]:
        """The question files, globs and variables resolved."""
        files: dict[Path, None] = {}
        for pattern in self.questions:
            matches = sorted(glob.glob(str(self.resolve(pattern)), recursive=True))
            if not matches:
                raise ConfigError(
                    f"task {self.name}: no question file matches {pattern!r} (looked for {self.resolve(pattern)})",
                    hint="paths in a task are relative to its folder; ${RAGMOE_DATA} is the folder given with --data",
                )
            files.update(dict.fromkeys(Path(match) for match in matches))
        return list(files)

    def resolve(self, path: str) -> Path:
        """A path of this task with its variables and its folder put in."""
        return self._folder / expand(path, f"task {self.name}", given="--data FOLDER")


def subset(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most ``limit`` questions of each domain, chosen by a digest of their ids, in their own order.

    Unanswerable questions and those for yes, no or maybe keep their share of the domain. Which ones are chosen does
    not depend on the order of the files, and a smaller limit takes part of what a larger one takes.
    """
    if limit is None:
        return list(questions)
    strata: dict[tuple[str, str], list[str]] = defaultdict(list)
    for question in questions:
        strata[question.domain, question.answer_type if question.answers else "none"].append(question.id)
    ranked: dict[str, list[tuple[float, bytes, str]]] = defaultdict(list)
    for (domain, _), ids in strata.items():
        digests = sorted((hashlib.sha256(name.encode()).digest(), name) for name in ids)
        # How far into its stratum a question stands; so of the first ones of a domain each stratum has its share.
        ranked[domain] += [((at + 0.5) / len(ids), digest, name) for at, (digest, name) in enumerate(digests)]
    kept = {name for rows in ranked.values() for *_, name in sorted(rows)[:limit]}
    return [question for question in questions if question.id in kept]


def parse_task(content: object, folder: Path, where: str) -> Task:
    """Make a task of a mapping; ``where`` names its origin in errors."""
    if not isinstance(content, dict):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(content).__name__}")
    if isinstance(content.get("perturbations"), list):
        # A bare null in YAML is None, and would otherwise have to be written in quotes.
        content = {**content, "perturbations": ["null" if p is None else p for p in content["perturbations"]]}
    try:
        task = Task.model_validate(content)
    except ValidationError as error:
        raise ConfigError(
            f"{where}: {describe(error)}", hint=f"a task may have: {', '.join(Task.model_fields)}"
        ) from None
    if task.setting == "rejection" and task.perturbations:
        raise ConfigError(
            f"{where}: perturbations of the setting rejection, where half of the questions lack their passages among "
            "the neighbours as it is",
            hint="put them into a task of the setting gold or open",
        )
    if task.index and task.corpus:
        raise ConfigError(f"{where}: got both index and corpus; expected one of them")
    task._folder = folder
    return task


def describe(error: ValidationError) -> str:
    """What is wrong with a configuration, one clause a fault."""
    faults = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"])
        got = "" if fault["type"] in {"missing", "extra_forbidden"} else f" (got {fault['input']!r})"
        faults.append(f"{place}: {fault['msg']}{got}")
    return "; ".join(faults)


def load_task(path: str | Path) -> Task:
    """Read a task's YAML file. ConfigError where it is missing, no YAML, or has an unknown key or a wrong value."""
    path = Path(path)
    return parse_task(read_yaml(path, "task", "ragmoe eval ls"), path.parent, str(path))


def read_yaml(path: Path, kind: str, hint: str | None = None) -> object:
    """The content of a YAML file; ConfigError where there is none."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the {kind} {path}: {error.strerror or error}", hint=hint) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
