"""From what a task or an experiment names to an opened index, built first where it has to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ragmoe._errors import IndexFolderError, UsageError
from ragmoe.evaluation.samples import digest_of
from ragmoe.evaluation.task import Task

if TYPE_CHECKING:
    from ragmoe.index import Index
    from ragmoe.index.build import BuildOptions

BUILT = Path("runs") / "indexes"

Progress = Callable[[str, int, int], None]


def index_of_task(task: Task, *, given: str | Path | None = None, progress: Progress | None = None) -> Index:
    """The index a task is evaluated over: the one given, else the task's, else one built of the task's corpus.

    An index of a corpus stays in ``runs/indexes`` below the working directory, shared by all tasks over the same
    sources, and is built again only where the corpus has changed. UsageError where neither task nor caller names one.
    """
    from ragmoe.index import Index
    from ragmoe.index.build import BuildOptions

    if given is not None:
        return Index.open(given)
    if task.index is not None:
        return index_of_recipe(task.resolve(task.index), progress=progress)
    if task.corpus:
        sources = tuple(source if source.startswith("hub:") else str(task.resolve(source)) for source in task.corpus)
        out = BUILT / f"corpus-{digest_of(sorted(sources))[:8]}"
        # The folder is ours alone; vectors of texts that stayed are taken over.
        return _build(BuildOptions(sources=sources, out=out, resume=True, overwrite=True), progress)
    raise UsageError(f"the task {task.name} names no index and no corpus", hint="give the index with --index DIR")


def index_of_recipe(path: Path, *, progress: Progress | None = None) -> Index:
    """The index in a folder, or the one that a recipe describes; it is built unless it stands already."""
    from ragmoe.index import Index
    from ragmoe.index.build import BuildOptions
    from ragmoe.index.recipe import read_recipe
    from ragmoe.index.target import OtherIndexError

    if path.suffix not in {".yaml", ".yml"}:
        return Index.open(path)
    recipe = read_recipe(path).model_dump()
    recipe |= {"sources": tuple(recipe["sources"]), "out": Path(recipe["out"]), "resume": True}
    try:
        return _build(BuildOptions(**recipe), progress)
    except OtherIndexError as error:
        raise IndexFolderError(
            f"{error.message}: what the recipe {path} reads has changed since",
            hint=f"ragmoe index build --recipe {path} --overwrite",
        ) from None


def _build(options: BuildOptions, progress: Progress | None) -> Index:
    from ragmoe.index import Index
    from ragmoe.index.build import build_index

    build_index(options, progress=progress)
    return Index.open(options.out)
