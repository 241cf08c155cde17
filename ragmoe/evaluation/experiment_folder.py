"""The output folder of an experiment: what each arm has left there, and how far it is.

    ARM/seed-0/bundle/     the trained model with training.yaml and history.jsonl
    ARM/seed-0/arm.json    index, base, machine and commit it was trained with, and the seconds it took
    ARM/seed-0/TASK/       its evaluation
    ARM/seed-0/perplexity.json   of a language model; SETTING/perplexity.json where documents have named settings

Nothing is trained or evaluated here; see experiment_run.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from statistics import fmean
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ValidationError

from ragmoe._differences import differences
from ragmoe._errors import ConfigError
from ragmoe.bundle import is_bundle, read_map
from ragmoe.evaluation.experiment import Experiment
from ragmoe.evaluation.machine import commit_of_run, machine
from ragmoe.evaluation.results import RESULTS_NAME, SCORING_VERSION, Results
from ragmoe.evaluation.samples import digest_of, write_text
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.training import TrainingConfig

# Where an arm of a language experiment has been measured (language_results.py).
_PERPLEXITIES = "perplexity.json"
# The commit of figures that do not say it.
_UNKNOWN = "not recorded"
_OF_BASE = ("*.safetensors", "*.bin", "config.json", "tokenizer*")
# What a history calls the loss of what is learned, the first that is there.
_LOSSES = ("answer_loss", "language_loss", "loss")


class ExperimentFolder:
    """What an experiment has left in ``root``; every arm is named with a seed.

    Attributes:
        index: digest of the index that arms are trained and evaluated over; None where it is not known yet.
    """

    def __init__(self, experiment: Experiment, root: Path, index: str | None = None) -> None:
        self.experiment, self.root, self.index = experiment, root, index

    def place(self, arm: str, seed: int) -> Path:
        """Where an arm lives."""
        return self.root / arm / f"seed-{seed}"

    def bundle(self, arm: str, seed: int) -> Path:
        """Where its model lives."""
        return self.place(arm, seed) / "bundle"

    def note(self, arm: str, seed: int) -> dict[str, Any]:
        """What is known of its training; empty before it began.

        Keys are ``index``, ``seconds``, ``machine``, ``commit``, ``base``, a digest of the folder that it began from
        (None where that was none), ``content``, what the trained bundle answers by (``BundleMap.content``), ``before``,
        machine and commit of those runs of a training that were stopped, and ``evaluated``, by task or setting the
        commits that its figures are of. An untrained arm has ``index``, ``base``, ``evaluated`` and ``config``, the
        configuration that made it; one that is joined of others ``index``, ``evaluated`` and ``joined``, by arm the
        content of their bundles.
        """
        return _read_json(self.place(arm, seed) / "arm.json")

    def begin(self, arm: str, seed: int, config: TrainingConfig) -> None:
        """Record that an arm's training begins, from what, and where; one that is taken up again began from that."""
        where = {"machine": machine(), "commit": commit_of_run(self.experiment.folder)}
        base, before = None, []
        if (self.bundle(arm, seed) / "training.yaml").is_file():
            note = self.note(arm, seed)
            earlier = {key: note[key] for key in where if key in note}
            base, before = note.get("base"), [*note.get("before", []), *([earlier] if earlier else [])]
        else:
            self._forget_figures(arm, seed)
        base = base or _digest_of_base(config)
        before = [one for one in before if one != where]
        self._write_note(arm, seed, {"index": self.index, "base": base, "seconds": None, **where, "before": before})

    def begin_untrained(self, arm: str, seed: int, config: TrainingConfig) -> None:
        """Record what an untrained arm is made of; figures of one that was made otherwise go."""
        if not self._is_current(arm, seed, config):
            self._forget_figures(arm, seed)
        made = {"index": self.index, "base": _digest_of_base(config), "config": config.model_dump(mode="json")}
        self._write_note(arm, seed, {**made, "evaluated": _evaluated(self.note(arm, seed))})

    def begin_joined(self, arm: str, seed: int) -> None:
        """Record of what bundles an arm is joined; figures of one that was joined of others go."""
        self._forget_figures(arm, seed)
        self._write_note(arm, seed, {"index": self.index, "joined": self._parts(arm, seed), "evaluated": {}})

    def _parts(self, arm: str, seed: int) -> dict[str, str | None]:
        """Of the arms that an arm is joined of, what their bundles answer by; None for one that is not here."""
        return {part: self._content(part, seed) for part in self.experiment.joined[arm]}

    def _is_joined(self, arm: str, seed: int) -> bool:
        """Whether an arm is joined of what the others are now; what is not here says nothing."""
        known = self.note(arm, seed).get("joined")
        if not is_bundle(self.bundle(arm, seed)) or not isinstance(known, dict):
            return False
        now = self._parts(arm, seed)
        return known.keys() == now.keys() and all(now[part] in (None, known[part]) for part in now)

    def _is_current(self, arm: str, seed: int, config: TrainingConfig) -> bool:
        """Whether an untrained arm is made as its note says; what has no note, or no base here, says nothing."""
        note = self.note(arm, seed)
        made = note.get("config")
        if made is None:
            return True
        bases = (note.get("base"), _digest_of_base(config))
        alike = _portable(_as(type(config), made)) == _portable(config.model_dump(mode="json"))
        return alike and (None in bases or bases[0] == bases[1])

    def _forget_figures(self, arm: str, seed: int) -> None:
        """What an earlier model of an arm was measured to be is not this one's."""
        for name in (RESULTS_NAME, _PERPLEXITIES):
            for stale in self.place(arm, seed).rglob(name):
                stale.unlink()
        if note := self.note(arm, seed):
            self._write_note(arm, seed, {**note, "evaluated": {}})

    def end(self, arm: str, seed: int, seconds: float | None) -> None:
        """Record what has been trained, and how long it took; None where that is not known."""
        self._write_note(arm, seed, {**self.note(arm, seed), "seconds": seconds, "content": self._content(arm, seed)})

    def _content(self, arm: str, seed: int) -> str | None:
        """What an arm's bundle answers by; None where there is none."""
        place = self.bundle(arm, seed)
        return read_map(place).content if is_bundle(place) else None

    def measured(self, arm: str, seed: int, name: str, *, anew: bool = False) -> None:
        """Record that figures of an arm on a task, or in a setting, were made, or scored, at this commit.

        Args:
            anew: none of those that were there before will be left.
        """
        note, now = self.note(arm, seed), commit_of_run(self.experiment.folder)
        known = _evaluated(note)
        commits = [*([] if anew else known.get(name, [])), *([now] if now else [])]
        self._write_note(arm, seed, {**note, "evaluated": {**known, name: [*dict.fromkeys(commits)]}})

    def _write_note(self, arm: str, seed: int, content: dict[str, Any]) -> None:
        write_text(self.place(arm, seed) / "arm.json", json.dumps(content) + "\n")

    def check_arms(self, index: Path, *, moved: bool = False) -> None:
        """``check`` every arm and seed, and that those which name the same files learned from the same material, and
        those which name the same base began from the same.

        Args:
            index: folder of the index that configurations are resolved with.
        """
        learned: dict[str, tuple[str, str]] = {}
        begun: dict[str, tuple[str, str]] = {}
        for seed in self.experiment.seeds:
            for arm in self.experiment.arm_names:
                config, of_arm = self.experiment.training(arm, seed, index), (arm, seed)
                self.check(arm, seed, config, moved=moved)
                untrained = arm in self.experiment.untrained_arms
                # An untrained arm of another base is measured anew, and one whose training never began begins from what
                # is there.
                begun_here = (self.bundle(arm, seed) / "training.yaml").is_file()
                if self._is_current(arm, seed, config) if untrained else begun_here:
                    self._check_same(begun, config.base, self.note(arm, seed).get("base"), of_arm, "base, and began")
                if not untrained:
                    named = json.dumps([config.data.model_dump(mode="json"), config.new_expert is None])
                    self._check_same(learned, named, self._material(arm, seed), of_arm, "files, and learned")

    def _material(self, arm: str, seed: int) -> str | None:
        """Digest of what an arm learned from; None where that is not known."""
        found = _read_json(self.bundle(arm, seed) / "started.json").get("questions")
        return found if isinstance(found, str) else None

    def learning_otherwise(self, reference: str) -> list[str]:
        """The arms that learned from other material than another: their losses are of other text."""
        found = {arm: {self._material(arm, seed) for seed in self.experiment.seeds} for arm in self.experiment.arms}
        known = {arm: digests - {None} for arm, digests in found.items() if digests - {None}}
        # Against a model before training the first arm stands for all.
        own = known.get(reference) or next(iter(known.values()), set())
        return [arm for arm, digests in known.items() if not digests & own]

    def _check_same(
        self, seen: dict[str, tuple[str, str]], named: str, content: str | None, of_arm: tuple[str, int], what: str
    ) -> None:
        """ConfigError where another arm names the same and had another content of it; None is not known."""
        if content is None:
            return
        said = "{}, seed {}".format(*of_arm)
        first, where = seen.setdefault(named, (content, said))
        if first != content:
            raise ConfigError(
                f"{where} and {said} in {self.root} name the same {what} from others: the content has changed between",
                hint=f"train again what is older: remove {self.place(*of_arm)}, or that of the other",
            )

    def check(self, arm: str, seed: int, config: TrainingConfig, *, moved: bool = False) -> None:
        """Refuse to mix what was trained otherwise into this experiment; nothing is written or removed here.

        Args:
            config: the arm's training configuration.
            moved: the folder may come from another machine: of a path only its last names have to agree.
        """
        kept = _read_yaml(self.bundle(arm, seed) / "training.yaml")
        if arm in self.experiment.untrained_arms or kept is None:
            return
        # Read back as a configuration: one that was written before a setting existed has that setting's default.
        before = _as(type(config), kept)
        now, note = config.model_dump(mode="json"), self.note(arm, seed)
        began, base = note.get("base"), None if moved else _digest_of_base(config)
        # What is known by its content may lie elsewhere now; a training that goes on wants it where it was.
        done = self.trained(arm, seed)
        if done and None not in (began, base):
            before = {**before, "base": now["base"]}
        if done and None not in (note.get("index"), self.index):
            before = {**before, "data": {**before.get("data", {}), "index": now["data"]["index"]}}
        if moved:
            before, now = _portable(before), _portable(now)
        differing = differences(before, now)
        if note.get("index", self.index) != self.index:
            differing.append("the index's content")
        # A base that is not here, or another machine's, says nothing.
        if None not in (began, base) and began != base:
            differing.append(f"the base's content ({config.base} has changed since)")
        trained = note.get("content")
        if trained is not None and self._content(arm, seed) not in (None, trained):
            raise ConfigError(
                f"{self.bundle(arm, seed)} answers otherwise than it was trained to: it was changed since",
                hint=f"go back (ragmoe bundle versions {self.bundle(arm, seed)} lists where to) and change a copy",
            )
        if differing:
            raise ConfigError(
                f"{self.place(arm, seed)} was trained with another configuration; it differs in {', '.join(differing)}",
                hint="name the folder that this file was run in with --out"
                if moved
                else "give another folder with --out, or remove this one",
            )

    def trained(self, arm: str, seed: int) -> bool:
        """Whether an arm has its model, saved whole; an untrained one needs none, but must be made as it was, and one
        that is joined of others of what these are."""
        from ragmoe.training.folder import is_finished

        if arm in self.experiment.joined:
            return self._is_joined(arm, seed)
        if arm in self.experiment.untrained_arms:
            return self._is_current(arm, seed, self.experiment.training(arm, seed, self.root))
        return is_finished(self.bundle(arm, seed))

    def evaluated(self, arm: str, seed: int, task: Task) -> bool:
        """Whether an arm's evaluation on a task is whole, of this task and index, and scored as today."""
        content = _read_json(self.place(arm, seed) / task.name / RESULTS_NAME)
        block = _block_of(content, task)
        scored = content.get("versions", {}).get(task.name) == SCORING_VERSION
        of_index = block.get("index_digest") == self.index
        return scored and of_index and _as(Task, block.get("task")) == task.model_dump(mode="json")

    def finished(self, arm: str, seed: int, tasks: Sequence[Task]) -> bool:
        """Whether an arm is trained, and evaluated on every task."""
        return self.trained(arm, seed) and all(self.evaluated(arm, seed, task) for task in tasks)

    def results(self, arm: str, tasks: Sequence[Task]) -> dict[str, list[Results]]:
        """By task name the results of a finished arm, one a seed."""
        places = [self.place(arm, seed) for seed in self.experiment.seeds]
        return {task.name: [Results.load(place / task.name) for place in places] for task in tasks}

    def progress(self, arm: str, seed: int, tasks: Sequence[Task]) -> str:
        """How far an arm is, in a few words; of one that is finished its macro F1 on the first task."""
        done = sum(self.evaluated(arm, seed, task) for task in tasks)
        if self.trained(arm, seed):
            if done < len(tasks):
                return f"{'' if arm in self.experiment.untrained_arms else 'trained, '}{done} of {len(tasks)} tasks"
            value = self.figures(arm, seed, tasks[0])["conditions"]["real"]["macro"]["f1"]
            return "finished" if value is None else f"F1 {value:.1f}"
        steps = [step for step, _ in self.losses(arm, seed)]
        if steps:
            planned = (_read_yaml(self.bundle(arm, seed) / "training.yaml") or {}).get("train", {}).get("steps")
            return f"step {steps[-1]} of {planned}"
        return "begun" if self.note(arm, seed) else "not begun"

    def losses(self, arm: str, seed: int) -> list[tuple[int, float]]:
        """Step and loss of the answers, or of the text, in nats, from the history of an arm's training.

        Without the losses of the routing; a model that has none says only ``loss``. Empty where there is no history.
        """
        try:
            lines = (self.bundle(arm, seed) / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        records = [_parse(line) for line in lines]
        named = [(r, next((name for name in _LOSSES if name in r), None)) for r in records if "step" in r]
        return [(int(r["step"]), float(r[name])) for r, name in named if name is not None]

    def seconds(self, arm: str) -> float | None:
        """Of training, as the mean over seeds; None where one is not known."""
        values = [self.note(arm, seed).get("seconds") for seed in self.experiment.seeds]
        present = [value for value in values if value is not None]
        return fmean(present) if present and len(present) == len(values) else None

    def machine(self) -> dict[str, Any]:
        """Where the arms were trained: a key in which their machines differ holds a list. This one where none says."""
        found = [where for _, where in self._recorded("machine")] or [machine()]
        merged: dict[str, Any] = {}
        for key in found[0]:
            values = [*dict.fromkeys(where.get(key) for where in found)]
            merged[key] = values[0] if len(values) == 1 else values
        return merged

    def commits(self) -> dict[str, list[str]]:
        """The arms by the commit they were trained at."""
        return _arms_by_value(self._recorded("commit"))

    def evaluated_at(self, arms: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
        """Some arms by the commit that their figures are of; empty where that is recorded of none.

        Args:
            names: of the tasks, or settings.
        """
        known = [(arm, _evaluated(self.note(arm, seed))) for arm in arms for seed in self.experiment.seeds]
        found = [(arm, value) for arm, of in known for name in names for value in of.get(name) or [_UNKNOWN]]
        by_value = _arms_by_value(found)
        return {} if by_value.keys() == {_UNKNOWN} else by_value

    def _recorded(self, key: str) -> list[tuple[str, Any]]:
        """Each arm with what a training of it recorded under a key."""
        notes = [(arm, self.note(arm, seed)) for arm in self.experiment.arms for seed in self.experiment.seeds]
        found = [(arm, one.get(key)) for arm, note in notes for one in (*note.get("before", ()), note)]
        return [(arm, value) for arm, value in found if value]

    def used_index(self, tasks: Sequence[Task]) -> str | None:
        """Digest of the index that was used here; None where nothing was run, ConfigError where there were several."""
        used: dict[str, str] = {}
        for arm in self.experiment.arm_names:
            for seed in self.experiment.seeds:
                digests = [self.note(arm, seed).get("index")]
                digests += [self.figures(arm, seed, task).get("index_digest") for task in tasks]
                used |= {digest: f"{arm} seed {seed}" for digest in digests if digest and digest not in used}
        if len(used) > 1:
            those = ", ".join(f"{digest[:12]} ({where})" for digest, where in used.items())
            raise ConfigError(
                f"{self.root} mixes arms over several indexes: {those}",
                hint="remove those of the old index; ragmoe eval experiment runs them again",
            )
        return next(iter(used), None)

    def figures(self, arm: str, seed: int, task: Task) -> dict[str, Any]:
        """What was found for an arm on a task, its block of ``results.json``; empty where nothing was."""
        return _block_of(_read_json(self.place(arm, seed) / task.name / RESULTS_NAME), task)


def _block_of(results: dict[str, Any], task: Task) -> dict[str, Any]:
    return results.get("ragmoe", {}).get("tasks", {}).get(task.name, {})


def _evaluated(note: Mapping[str, Any]) -> dict[str, list[str]]:
    """By task or setting the commits that figures are of, as far as a note says so."""
    found = note.get("evaluated")
    return found if isinstance(found, dict) else {}


def _arms_by_value(found: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    by_value: dict[str, dict[str, None]] = {}
    for arm, value in found:
        by_value.setdefault(value, {})[arm] = None
    return {value: list(arms) for value, arms in by_value.items()}


def _as(model: type[BaseModel], content: Any) -> Any:
    """Content as a model holds it, defaults filled in; as it is where the model does not take it."""
    try:
        return model.model_validate(content).model_dump(mode="json")
    except ValidationError:
        return content


def _portable(value: Any) -> Any:
    """Nested values without what depends on the machine: the folders that absolute paths begin with."""
    if isinstance(value, dict):
        return {key: _portable(entry) for key, entry in value.items() if key != "index"}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        # The bundle of an arm is EXPERIMENT/ARM/seed-0/bundle.
        parts = PurePath(value).parts
        return "/".join(parts[-4:] if parts[-1] == "bundle" else parts[-2:])
    return value


def _parse(line: str) -> dict[str, Any]:
    """A JSON object; empty where the text is none, such as a line torn by a kill."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def _digest_of_base(config: TrainingConfig) -> str | None:
    """A digest of what training begins from: of a bundle what it answers by, of another folder its weights, settings
    and tokenizer. None where it is no folder, or not here."""
    if is_bundle(config.base):
        return read_map(config.base).content
    files = sorted(path for name in _OF_BASE for path in Path(config.base).glob(name))
    return digest_of([(path.name, _content(path, path.stat().st_mtime_ns)) for path in files]) if files else None


@lru_cache
def _content(path: Path, changed: int) -> str:
    """sha256 of a file, read once for all arms that begin from it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_yaml(path: Path) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
