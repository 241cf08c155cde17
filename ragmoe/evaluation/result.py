"""A result worth keeping: the file ``eval/results/NAME.json``, whose shape other tools rely on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ragmoe._errors import DataError
from ragmoe.evaluation.samples import write_text


class _Exact(BaseModel):
    """No key may be missing and none may be added; what does not apply is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DomainResult(_Exact):
    """F1 and EM in 0..100 over the n answerable questions of a domain that were scored."""

    f1: float | None
    em: float | None
    n: int


class ArmResult(_Exact):
    """One arm, as the mean over its seeds.

    Attributes:
        macro_f1, macro_em: 0..100, means over domains.
        normalised_mi: of domain and expert, 0..1; ``gate_entropy`` in nats; ``max_load`` as a share. Means over layers.
        seconds: of training.
    """

    macro_f1: float | None
    macro_em: float | None
    per_domain: dict[str, DomainResult]
    perplexity: float | None
    active_params: int | None
    total_params: int | None
    normalised_mi: float | None
    gate_entropy: float | None
    max_load: float | None
    seconds: float | None


class ComparisonResult(_Exact):
    """``difference`` is a minus b in points; ``low`` and ``high`` bound its 95 % interval."""

    a: str
    b: str
    metric: str
    setting: str
    difference: float
    low: float
    high: float


class Result(_Exact):
    """What an experiment found, with everything that is needed to find it again."""

    experiment: str
    command: str
    commit: str | None
    machine: dict[str, Any]
    seeds: list[int]
    arms: dict[str, ArmResult]
    comparisons: list[ComparisonResult]

    def write(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Read it back; DataError where it is missing or of another shape."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the result {path}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path} has not the shape of a result: {place}: {first['msg']}") from None
