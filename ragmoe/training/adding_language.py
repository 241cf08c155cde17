"""What ``add_expert`` does otherwise for a causal language model: its training, and the certificate by perplexity.

The domains that the model knows are read three times, as a reader's tasks are: before; after without the new expert,
which must give every document the same loss to the bit; and after as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragmoe._errors import ConfigError, ModelError
from ragmoe.corpus import read_documents
from ragmoe.corpus.types import Passage
from ragmoe.evaluation.perplexity import DocumentLoss, compare_perplexity, document_losses, perplexity
from ragmoe.generation.batches import sees_neighbours
from ragmoe.index import Index
from ragmoe.moe import RoutingStatistics
from ragmoe.moe.layer import experts_a_token
from ragmoe.training.config import LanguageConfig, TrainingConfig
from ragmoe.training.digests import digest
from ragmoe.training.language import LanguageDataset, learned_documents
from ragmoe.training.language_expert import recalling
from ragmoe.training.retrieved import CACHE_NAME

if TYPE_CHECKING:
    from ragmoe.training.adding import Judges
    from ragmoe.training.certificate import Models

Losses = list[DocumentLoss]
Progress = Callable[[str, int, int], None]


def language_material(name: str, corpus: Sequence[str], questions: Sequence[str], judges: Judges) -> dict[str, Any]:
    """What a language model's new expert learns from, as ``DataConfig`` says it.

    Raises:
        ConfigError: what was given is a reader's, or there are no documents.
    """
    for option, given in (("--questions", questions), ("--task", judges.tasks)):
        if given:
            raise ConfigError(
                f"{option} is given, but a causal language model's expert learns from documents and is judged by them",
                hint="--corpus FILE to learn from, --dev and --known FILE to judge by",
            )
    if not corpus:
        raise ConfigError(f"there are no documents to learn the expert {name!r} from", hint="--corpus FILE")
    return {"documents": list(corpus)}


def certify_language(
    models: Models, tokenizer: Any, config: TrainingConfig, index: Index | None, judges: Judges, progress: Progress
) -> dict[str, Any]:
    """The figures of a language model's certificate: ``old``, a row a domain and their mean; and ``new``, one row.

    A row has ``domain``, ``tokens``, ``documents``; the perplexity ``before``, ``live`` and of old ones ``masked``;
    the ``difference`` of live and before in per cent with its 95 % interval ``low`` and ``high``; ``identical``, which
    is True; and ``routed``, the share of tokens that call the new expert, as a mean over layers.

    Raises:
        ModelError: without the new expert the loss of some document is another than before.
    """
    cache = index.folder / CACHE_NAME if index is not None else Path(CACHE_NAME)

    def judged(documents: Sequence[Passage], *, old: bool) -> list[dict[str, Any]]:
        data = LanguageDataset(
            _limited(documents, judges.limit),
            index if sees_neighbours(models.live) else None,
            tokenizer,
            config.language or LanguageConfig(),
            cache=cache,
        )
        return _certify(models, data, index, progress, old=old)

    known = list(read_documents([str(source) for source in judges.known]))
    new = list(read_documents([str(source) for source in judges.dev])) or learned_documents(config)[1]
    return {
        "index": index.digest if index is not None else None,
        "old": judged(known, old=True) if known else [],
        "new": judged(new, old=False)[-1] if new else None,
    }


def _certify(
    models: Models, data: LanguageDataset, index: Index | None, progress: Progress, *, old: bool
) -> list[dict[str, Any]]:
    what = "old documents" if old else "new documents"
    routed = RoutingStatistics(models.live.sparse_layers, models.live.config.experts)

    def losses(model: Any, when: str, statistics: RoutingStatistics | None = None) -> Losses:
        data.recall = recalling(model, index)
        return document_losses(model, data, statistics=statistics, progress=partial(progress, f"{what}, {when}"))

    before = losses(models.before, "before")
    if old and (differing := _differing(before, losses(models.masked, "without the expert"))):
        raise ModelError(
            f"without the new expert {len(differing)} of {len(before)} documents have another loss than before, for "
            f"example {differing[0]}: what was there has changed"
        )
    rows = _rows(before, losses(models.live, "with the expert", routed), routed, experts_a_token(models.live.config))
    return [{**row, "masked": row["before"], "identical": True} for row in rows] if old else rows


def _differing(before: Losses, masked: Losses) -> list[str]:
    return [a.document for a, b in zip(before, masked, strict=True) if a != b]


def _rows(before: Losses, live: Losses, routed: RoutingStatistics, top_k: int) -> list[dict[str, Any]]:
    """A row a domain; of several also their mean, the last."""
    old, new, change = perplexity(before), perplexity(live), compare_perplexity([live], [before])
    # Each token makes K choices, of which one at most is the new expert.
    called = dict(zip(routed.domains, (top_k * routed.load_DLE[:, :, -1].mean(axis=1)).tolist(), strict=True))
    rows = [
        _row(domain, old.tokens[domain], old.documents[domain], old.per_domain[domain][0], figures[0], moved, share)
        for domain, figures in new.per_domain.items()
        for moved, share in [(change.per_domain[domain], called[domain])]
    ]
    if len(rows) > 1:
        moved = (change.difference, change.low, change.high)
        share = top_k * float(routed.load_LE[:, -1].mean())
        rows.append(_row("all", change.n, change.documents, old.mean, new.mean, moved, share))
    return rows


def _row(
    domain: str,
    tokens: int,
    documents: int,
    before: float,
    live: float,
    moved: tuple[float, float, float],
    share: float,
) -> dict[str, Any]:
    difference, low, high = moved
    row = {"domain": domain, "tokens": tokens, "documents": documents, "before": before, "live": live}
    return {**row, "difference": difference, "low": low, "high": high, "routed": {"tokens": share}}


def _limited(documents: Sequence[Passage], limit: int | None) -> list[Passage]:
    """At most so many documents of each domain, drawn by their ids."""
    if limit is None:
        return list(documents)
    found: dict[str, list[Passage]] = {}
    for document in sorted(documents, key=lambda document: digest(document.id)):
        found.setdefault(document.domain, []).append(document)
    return [document for of_domain in found.values() for document in of_domain[:limit]]
