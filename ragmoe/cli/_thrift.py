"""Options that spare memory or work while a model answers, and what they have brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import UsageError
from ragmoe.cli._bundles import called

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
    """A command's wish to spare memory or work, or to do without experts, and what that has brought.

    Attributes:
        model: what was loaded, once it is.
    """

    resident_experts: int | None = None
    output_cache: int | None = None
    without: Sequence[str] = ()
    model: Any = None

    def load(self, bundle: Path) -> RagmoeBertForQuestionAnswering | Generator:
        """Open a bundle, or a generator, as was wished."""
        from ragmoe.generation.generator import Generator, is_generator
        from ragmoe.models import OutputCache, load

        if is_generator(bundle):
            if self.output_cache is not None:
                raise UsageError(f"--output-cache is for readers, but {bundle} holds a causal language model")
            generator = Generator.load(bundle, resident_experts=self.resident_experts, without=self.without)
            self.model = generator.model
            return generator
        self.model = load(bundle, resident_experts=self.resident_experts, without=self.without)
        self.model.output_cache = OutputCache(self.output_cache) if self.output_cache is not None else None
        return self.model

    def name(self, bundle: Path) -> str:
        """What the model is called in results."""
        name = called(bundle)
        return f"{name} without {', '.join(sorted(self.without))}" if self.without else name

    def found(self) -> dict[str, Any]:
        """What it has brought, by the names that --json has for it; empty where nothing was wished."""
        found: dict[str, Any] = {}
        for key, name in (("experts_on_demand", "expert_store"), ("output_cache", "output_cache")):
            # Any causal language model may be asked: most have neither.
            if (kept := getattr(self.model, name, None)) is not None:
                found[key] = kept.summary()
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
