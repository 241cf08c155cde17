"""Options that spare memory or work while a model answers, and what they have brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import UsageError

if TYPE_CHECKING:
    from ragmoe.generation.generator import Generator
    from ragmoe.models import RagmoeBertForQuestionAnswering

ResidentOption = Annotated[
    int | None,
    typer.Option(
        "--resident-experts",
        min=1,
        metavar="N",
        help="Keep N experts a layer in memory; the others stay in their files until they are needed.",
        show_default=False,
    ),
]
CacheOption = Annotated[
    int | None,
    typer.Option(
        "--output-cache",
        min=1,
        metavar="N",
        help="Keep what was found in N passages, for the same question with the same passage and neighbours again.",
        show_default=False,
    ),
]


@dataclass
class Thrift:
    """A command's wish to spare memory or work, or to do without experts, and what that has brought."""

    resident_experts: int | None = None
    output_cache: int | None = None
    without: Sequence[str] = ()
    reader: RagmoeBertForQuestionAnswering | None = None

    def load(self, bundle: Path) -> RagmoeBertForQuestionAnswering | Generator:
        """Open a bundle, or a generator, as was wished."""
        from ragmoe.generation.generator import Generator, is_generator
        from ragmoe.models import OutputCache, load

        if is_generator(bundle):
            for name, given in (("resident-experts", self.resident_experts), ("output-cache", self.output_cache),
                                ("without", self.without)):  # fmt: skip
                if given:
                    raise UsageError(f"--{name} is for readers, but {bundle} holds a causal language model")
            return Generator.load(bundle)
        self.reader = load(bundle, resident_experts=self.resident_experts, without=self.without)
        self.reader.output_cache = OutputCache(self.output_cache) if self.output_cache is not None else None
        return self.reader

    def found(self) -> dict[str, Any]:
        """What it has brought, by the names that --json has for it; empty where nothing was wished."""
        found: dict[str, Any] = {}
        if self.reader is not None and self.reader.expert_store is not None:
            found["experts_on_demand"] = self.reader.expert_store.summary()
        if self.reader is not None and self.reader.output_cache is not None:
            found["output_cache"] = self.reader.output_cache.summary()
        return found

    def tell(self) -> None:
        """The same in words, on stderr."""
        found = self.found()
        if store := found.get("experts_on_demand"):
            typer.echo(
                f"experts on demand: {store['resident']} of {store['experts']} a layer in memory, {_hits(store)}, "
                f"{store['prefetched']} read ahead ({store['prefetched_used']} of them used), "
                f"{store['bytes_read'] / 1e6:.1f} MB read",
                err=True,
            )
        if cache := found.get("output_cache"):
            places = f"{cache['entries']} of {cache['max_entries']} places taken"
            typer.echo(f"output cache: {_hits(cache)}, {places}", err=True)


def _hits(counted: dict[str, Any]) -> str:
    asked = counted["hits"] + counted["misses"]
    return f"{counted['hits']} hits of {asked}" + (f" ({counted['hit_rate']:.0%})" if asked else "")
