"""``ragmoe ask``: one question, its answer, and the passage it stands in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ragmoe._words import many
from ragmoe.cli._bundles import BundleArgument, WithoutOption
from ragmoe.cli._output import JsonOption, check_question, print_json
from ragmoe.cli._thrift import ResidentOption, Thrift

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage
    from ragmoe.generation.answers import GeneratedAnswer
    from ragmoe.models import Answer


_SAID = ("threshold", "cited", "said", "shortened", "left_out")
ASK_EXAMPLES = """Examples:

  ragmoe ask runs/halvern 'How long do I keep biting on the gauze?' --index indexes/demo
  ragmoe ask runs/halvern 'Who may look at the parish registers?' --index indexes/demo -m 10 --json"""


def ask(
    bundle: BundleArgument,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)],
    index: Annotated[Path, typer.Option(metavar="DIR", help="The index to look it up in.", show_default=False)],
    passages: Annotated[int, typer.Option("-m", "--passages", min=1, help="How many retrieved passages are read.")] = 5,
    without: WithoutOption = None,
    resident_experts: ResidentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question from an index, with the passage it comes from, or say that nothing answers it."""
    check_question(question)
    from ragmoe.generation import Generator
    from ragmoe.index import Index

    opened, thrift = Index.open(index), Thrift(resident_experts, without=without or ())
    model = thrift.load(bundle)
    if isinstance(model, Generator) and _goes_on(bundle):
        typer.echo(
            f"{bundle} has learned to go on with documents and not to answer: what it says may be no answer; questions "
            "teach it: ragmoe train CONFIG.yaml data.questions=[FILE]",
            err=True,
        )
    answer = model.answer([question], opened, passages=passages)[0]
    passage = opened.passage(answer.passage_id) if answer.passage_id is not None else None
    if as_json:
        print_json(_record(question, answer, passage) | thrift.found())
    else:
        print_answer(answer, passage)
        thrift.tell()
    if cut := not isinstance(model, Generator) and model.question_tokens_lost(question):
        typer.echo(f"the first {many(cut, 'token')} of the question were not read: there is no room for more", err=True)
    if lost := getattr(answer, "shortened", 0) + getattr(answer, "left_out", 0):
        typer.echo(f"{many(lost, 'passage')} shortened or left out: the prompt has no room for more", err=True)


def _goes_on(bundle: Path) -> bool:
    """Whether documents are what a language model was trained on last."""
    from ragmoe._errors import ConfigError
    from ragmoe.training.folder import is_started, saved_config

    try:
        return is_started(bundle) and bool(saved_config(bundle)["data"]["documents"])
    except ConfigError:
        # Of another version: nothing is known of it.
        return False


def _record(question: str, answer: Answer | GeneratedAnswer, passage: Passage | None) -> dict[str, Any]:
    span = _span(answer, passage)
    return {
        "question": question,
        "answered": answer.answered,
        "answer": answer.final_text or None,
        "best_guess": answer.text or None,
        "answer_type": answer.answer_type,
        "score": answer.score,
        # JSON knows no infinity, which is what a question without anything to read gets.
        "no_answer_score": answer.no_answer_score if abs(answer.no_answer_score) < float("inf") else None,
        "passage": passage
        and {
            "id": passage.id,
            "title": passage.title,
            "domain": passage.domain,
            "text": passage.text,
            "start": span and span[0],
            "end": span and span[1],
        },
        # What a reader holds the no-answer score against, and what a generator says besides.
        **{name: getattr(answer, name) for name in _SAID if hasattr(answer, name)},
    }


def _span(answer: Answer | GeneratedAnswer, passage: Passage | None) -> tuple[int, int] | None:
    """Where the answer stands in the passage; None for yes, no and maybe."""
    if passage is None or answer.start is None or not answer.text:
        return None
    return answer.start, answer.start + len(answer.text)


def print_answer(answer: Answer | GeneratedAnswer, passage: Passage | None) -> None:
    from rich.console import Console
    from rich.text import Text

    # Into a pipe nothing is folded: there a line is a line.
    console = Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())
    if answer.answered:
        console.print(Text(answer.text, style="bold green"))
    else:
        console.print(Text("Nothing here answers it.", style="bold"))
        if answer.text:
            console.print(Text(f"best guess: {answer.text}", style="dim"))
    if passage is None:
        return
    head = Text(f"\n{passage.id}", style="cyan")
    head.append(f"  {passage.title}" if passage.title else "", style="bold")
    head.append(f"  score {answer.score:.2f}", style="dim")
    console.print(head)
    text = Text(passage.text, style="" if answer.answered else "dim")
    if span := _span(answer, passage):
        text.stylize("bold reverse" if answer.answered else "underline", *span)
    console.print(text)
    if further := list(getattr(answer, "cited", ()))[1:]:
        console.print(Text(f"also cited: {', '.join(further)}", style="cyan"))
