"""``ragmoe index``: build, search, info, verify; the commands that change an index stand in ``index_change``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._errors import IndexFolderError, UsageError
from ragmoe._room import size
from ragmoe.cli._index_output import (
    LONG,
    built,
    chunking,
    console,
    domains,
    done_summary,
    kept,
    only_the_first_rank_prints,
    plain,
    plan_summary,
    print_lengths,
    print_pairs,
    print_plan,
    reads,
    run_plan,
)
from ragmoe.cli._output import JsonOption, print_json, tell_problems
from ragmoe.cli._stopped import on_stop
from ragmoe.cli.index_change import (
    ADD_EXAMPLES,
    MERGE_EXAMPLES,
    REMOVE_EXAMPLES,
    IndexArgument,
    OnErrorChoice,
    add,
    merge,
    remove,
)
from ragmoe.cli.index_exchange import EXPORT_EXAMPLES, IMPORT_EXAMPLES, export, import_
from ragmoe.cli.index_hub import PULL_EXAMPLES, PUSH_EXAMPLES, pull, push
from ragmoe.cli.progress import working

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage
    from ragmoe.index.build import BuildOptions
    from ragmoe.index.folder import Hit

app = typer.Typer(help="Build, search, inspect and verify indexes.", no_args_is_help=True)


@app.callback()
def _ranks(context: typer.Context) -> None:
    """Build, search, inspect and verify indexes."""
    context.with_resource(only_the_first_rank_prints())


app.command(epilog=ADD_EXAMPLES)(add)
app.command(epilog=REMOVE_EXAMPLES)(remove)
app.command(epilog=MERGE_EXAMPLES)(merge)
app.command(epilog=EXPORT_EXAMPLES)(export)
app.command("import", epilog=IMPORT_EXAMPLES)(import_)
app.command(epilog=PUSH_EXAMPLES)(push)
app.command(epilog=PULL_EXAMPLES)(pull)


class LongChoice(StrEnum):
    """What to do about passages longer than the encoder reads."""

    windows = "windows"
    truncate = "truncate"


class PrecisionChoice(StrEnum):
    """What the encoder computes in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


_BUILD_EXAMPLES = """Examples:

  ragmoe index build docs notes.md 'wiki/**/*.html' --out indexes/mine
  ragmoe index build corpus.jsonl --out indexes/mine --domain law --dry-run
  ragmoe index build docs --out e5 --encoder intfloat/e5-small-v2 --query-prompt 'query: ' --passage-prompt 'passage: '
  ragmoe index build docs --out indexes/mine --resume
  torchrun --nproc-per-node=2 -m ragmoe index build docs --out indexes/mine
  ragmoe index build --recipe indexes/demo.yaml"""
_SEARCH_EXAMPLES = """Examples:

  ragmoe index search indexes/demo 'when is the deposit returned?' -k 3
  ragmoe index search indexes/demo 'opening hours' --retriever bm25 --json
  ragmoe index search indexes/demo 'opening hours' --filter domain=archive"""

SourcesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SOURCE",
        help="jsonl, parquet, csv, txt, md or html files, folders of them, globs, or hub:NAME[:CONFIG][:SPLIT].",
        show_default=False,
    ),
]
OnErrorOption = Annotated[
    OnErrorChoice | None, typer.Option(help="At a bad line: stop, or skip and count it.", show_default="fail")
]
LongOption = Annotated[
    LongChoice | None,
    typer.Option(help="Passages longer than the encoder reads: mean of windows, or cut.", show_default="windows"),
]


@app.command(epilog=_BUILD_EXAMPLES)
def build(
    sources: SourcesArgument = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The index folder to write.", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A YAML file with sources, out and options; flags win.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="minilm (offline), a folder, or a Hub id.", show_default="minilm"),
    ] = None,
    query_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put before queries.", show_default="the encoder's own")
    ] = None,
    passage_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Put before passages.", show_default="the encoder's own")
    ] = None,
    domain: Annotated[str | None, typer.Option(metavar="NAME", help="The domain of records that name none.")] = None,
    chunk_words: Annotated[
        int | None, typer.Option(help="Words in a chunk at most, for text without ids.", show_default="200")
    ] = None,
    chunk_overlap: Annotated[
        int | None, typer.Option(help="Words that neighbouring chunks share.", show_default="40")
    ] = None,
    rechunk: Annotated[bool | None, typer.Option("--rechunk", help="Cut also passages that bring an id.")] = None,
    on_error: OnErrorOption = None,
    long_passages: LongOption = None,
    encoding: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Of text files: utf-8, latin-1, cp1252, utf-16 and others.", show_default="utf-8"
        ),
    ] = None,
    precision: Annotated[
        PrecisionChoice | None,
        typer.Option(help="Of the encoder's weights; auto measures first.", show_default="auto"),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Tokens in a batch of the encoder.", show_default="measured"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read, check and estimate; write nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a build that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build an index folder from sources or a recipe.

    Records of jsonl, parquet and csv files have a text, and may have id (or _id), title, domain, doc_id and split.
    What has an id stays whole; what has none, and running text, is cut into chunks.
    """
    flags: dict[str, Any] = {
        "sources": tuple(sources) if sources else None,
        "out": out,
        "encoder": encoder,
        "query_prompt": query_prompt,
        "passage_prompt": passage_prompt,
        "domain": domain,
        "chunk_words": chunk_words,
        "chunk_overlap": chunk_overlap,
        "rechunk": rechunk,
        "on_error": on_error and on_error.value,
        "long_passages": long_passages and long_passages.value,
        "text_encoding": encoding,
        "precision": precision and precision.value,
        "batch_tokens": batch_tokens,
    }
    options = _options(recipe, {key: value for key, value in flags.items() if value is not None}, resume, overwrite)
    with on_stop(lambda: kept(options.out)):
        # Loading the encoder's libraries takes its time, and so does reading much text.
        with working("reading the sources, measuring the encoder"):
            from ragmoe.index.build import plan_build

            plan = plan_build(options)
        print_plan(plan)
        plan.check_room()
        if dry_run:
            if as_json:
                print_json(plan_summary(plan))
            return
        manifest = run_plan(plan)
    if as_json:
        print_json(done_summary(plan, manifest))
    else:
        typer.echo(built(options.out, manifest))


@app.command(epilog=_SEARCH_EXAMPLES)
def search(
    folder: IndexArgument,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.", show_default=False)],
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="How many passages.")] = 10,
    retriever: Annotated[
        str | None, typer.Option(metavar="NAME", help="dense, bm25, hybrid or blend.", show_default="blend")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The encoder, where its folder has moved since the build.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="KEY=VALUE",
            help="Only passages of this domain, doc_id or split; may be repeated with another key.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Search an index: rank, score, domain, id, title and the best matching sentence of each passage."""
    if not query.strip():
        raise UsageError("the query is empty")
    pairs = [pair.partition("=") for pair in only or ()]
    if bad := [key for key, equals, _ in pairs if not equals]:
        raise UsageError(f"--filter {bad[0]!r} is not of the form KEY=VALUE", hint="for example: --filter domain=law")
    keys = [key for key, _, _ in pairs]
    if twice := [key for at, key in enumerate(keys) if key in keys[:at]]:
        raise UsageError(f"--filter {twice[0]} was given twice; a passage has one {twice[0]}")
    from ragmoe.index.folder import Index

    index = Index.open(folder, encoder=encoder, retriever=retriever)
    hits = index.search([query], k, where={key: value for key, _, value in pairs})[0]
    found = [(hit, index.passage(hit.passage_id)) for hit in hits]
    if as_json:
        print_json(
            [
                {"rank": hit.rank, "score": hit.score, "id": p.id, "domain": p.domain, "title": p.title, "text": p.text}
                for hit, p in found
            ]
        )
        return
    if not found:
        typer.echo("nothing found", err=True)
        return
    print_hits(found, query)


@app.command()
def info(folder: IndexArgument, as_json: JsonOption = False) -> None:
    """Show what an index says about itself."""
    from ragmoe.index.calibrate import described
    from ragmoe.index.folder import Index
    from ragmoe.index.summary import NEARLY, summarise

    index = Index.open(folder)
    manifest, figures = index.manifest, summarise(index)
    if as_json:
        print_json({**manifest.model_dump(), "summary": asdict(figures)})
        return
    encoder, long, cut = manifest.encoder, manifest.long_passages, manifest.chunking
    on_disk = sum(record.bytes for record in manifest.files.values())
    print_pairs(
        {
            "folder": f"{folder} (generation {manifest.generation}, {size(on_disk)} in {len(manifest.files)} files)",
            "passages": f"{manifest.passages:,}: {domains(manifest.domains)}",
            "encoder": f"{encoder.id} ({encoder.digest[:12]}), {reads(encoder)}",
            "encoding": described(manifest.encoding) if manifest.encoding else "not recorded",
            "prompts": f"query {encoder.query_prompt!r}, passage {encoder.passage_prompt!r}",
            "long passages": f"{long.longer:,} ({long.share:.1%}) exceed what the encoder reads: {LONG[long.mode]}",
            "near-duplicates": f"{figures.near_duplicates:.1%} have another with a cosine of {NEARLY} or more "
            f"({figures.sampled:,} looked at)",
            "chunking": chunking(cut.chunks, cut.words, cut.overlap, cut.rechunk),
            "faiss": f"{manifest.faiss.factory}: {manifest.faiss.reason}",
            "skipped lines": str(manifest.skipped),
            "versions": ", ".join(f"{name} {number}" for name, number in manifest.versions.items()),
            "digest": manifest.digest,
        },
        sys.stdout,
    )
    print_lengths(figures.lengths)


@app.command()
def verify(
    folder: IndexArgument,
    encoder: Annotated[
        str | None, typer.Option(metavar="NAME", help="The encoder, where its folder has moved since the build.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check digests, counts and shapes, and encode a sample again; exit 1 if anything differs."""
    from ragmoe.index.verify import verify_index

    problems = verify_index(folder, encoder=encoder)
    hint = f"build it anew: ragmoe index build ... --out {folder} --overwrite"
    tell_problems(folder, problems, IndexFolderError, hint, as_json)


def print_hits(found: list[tuple[Hit, Passage]], query: str) -> None:
    """A table of hits: what is longer than a line begins with the sentence that matches best, which is bold."""
    from rich.table import Table

    names = ("rank", "score", "domain", "id", "title")
    rows = [(str(hit.rank), f"{hit.score:.4f}", p.domain, p.id, _short(p.title, 40)) for hit, p in found]
    screen = console(sys.stdout)
    # Ids must stay whole, to be copied: only the text gives way to a narrow terminal.
    used = sum(max(len(cell) for cell in column) + 2 for column in zip(names, *rows, strict=True))
    table = Table(box=None, pad_edge=False)
    for name in (*names, "text"):
        table.add_column(name, justify="right" if name in names[:2] else "left", no_wrap=True)
    for row, (_, p) in zip(rows, found, strict=True):
        table.add_row(*plain(*row), _excerpt(p.text, query, max(screen.width - used, 20)))
    screen.print(table, soft_wrap=True)


def _excerpt(text: str, query: str, length: int) -> Any:
    from rich.text import Text

    from ragmoe.index.summary import best_sentence

    start, end = best_sentence(text, query)
    before, sentence, after = (" ".join(part.split()) for part in (text[:start], text[start:end], text[end:]))
    if before and len(f"{before} {sentence} {after}") > length:
        before = "…"
    shown = Text(f"{before} " if before else "")
    shown.append(sentence, style="bold").append(f" {after}" if after else "")
    shown.truncate(length, overflow="ellipsis")
    return shown


def _short(text: str, length: int) -> str:
    flat = " ".join(text[: 4 * length].split())
    return flat if len(flat) <= length else flat[: length - 1] + "…"


def _options(recipe: Path | None, flags: dict[str, Any], resume: bool, overwrite: bool) -> BuildOptions:
    """The options of a build: a recipe's, and flags over them."""
    from ragmoe.index.build import BuildOptions

    given: dict[str, Any] = {}
    if recipe is not None:
        if "sources" in flags:
            raise UsageError("both sources and --recipe were given; expected one of them")
        from ragmoe.index.recipe import read_recipe

        given = read_recipe(recipe).model_dump()
        given |= {"sources": tuple(given["sources"]), "out": Path(given["out"])}
    given |= flags
    if not given.get("sources"):
        raise UsageError("nothing to build from", hint="ragmoe index build SOURCE... --out DIR, or --recipe FILE")
    if not given.get("out"):
        raise UsageError("no folder to write to: --out DIR is missing")
    return BuildOptions(**given, resume=resume, overwrite=overwrite)
