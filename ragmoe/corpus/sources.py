"""The files that sources stand for: a file, a folder, a glob; each file once, each under a name of its own."""

from __future__ import annotations

import glob
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from ragmoe._errors import DataError
from ragmoe.corpus.files import CODECS, stem
from ragmoe.corpus.records import READERS, RUNNING, reader_of

#: Files, each with the name that its records' ids are made from.
Named = list[tuple[Path, str]]


def source_files(sources: Sequence[str]) -> list[tuple[str, Named]]:
    """The files of each source, in order of name; none for a ``hub:`` source.

    A name is the path within the folder, or within what stands before the first wildcard of a pattern. Where two
    files would get the same (two folders with an ``index.md`` each), the folders that tell them apart come in front.

    Raises:
        DataError: a source is not there, holds nothing to read, or is of an unknown format.
    """
    listed: list[tuple[str, Named]] = []
    seen: set[Path] = set()
    alike: dict[str, list[Path]] = defaultdict(list)
    for source in sources:
        files = []
        for path, name in [] if source.startswith("hub:") else _files(source):
            # Sources may overlap, as a folder and a pattern do: a file is read once.
            if path.resolve() not in seen:
                seen.add(path.resolve())
                alike[name].append(_absolute(path))
                files.append((path, name))
        listed.append((source, files))
    common = {name: os.path.commonpath(paths) for name, paths in alike.items() if len(paths) > 1}

    def unlike(path: Path, name: str) -> str:
        return _absolute(path).relative_to(common[name]).as_posix() if name in common else name

    return [(source, [(path, unlike(path, name)) for path, name in files]) for source, files in listed]


def _files(source: str) -> Named:
    path = Path(source).expanduser()
    if path.is_dir():
        files = _folder_files(path)
        if not files:
            raise DataError(f"folder {source} holds no file of a known format ({_formats()}) outside an index")
        return [(file, file.relative_to(path).as_posix()) for file in files]
    if not path.exists():
        return _matches(source, path)
    if reader_of(path) is None:
        found = f"format {path.suffix!r}" if path.suffix else "format of a name without a suffix"
        raise DataError(f"source {source}: the {found} is unknown; known are: {_formats()}")
    return [(path, path.name)]


def _matches(source: str, pattern: Path) -> Named:
    """What a pattern gives: files of a known format, and those in folders that match."""
    found = sorted(Path(match) for match in glob.glob(str(pattern), recursive=True))
    if not found:
        near = sorted(p.name for p in pattern.parent.iterdir())[:8] if pattern.parent.is_dir() else []
        there = f"; in {pattern.parent} there is: {', '.join(near)}" if near else ""
        raise DataError(f"source {source}: there is no such file, folder or match of a pattern{there}")
    files = [file for match in found for file in (_folder_files(match) if match.is_dir() else [match])]
    root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    files = _outside_indexes([file for file in files if reader_of(file)], root)
    if not files:
        raise DataError(
            f"source {source}: {len(found)} matches, none of a known format ({_formats()}) outside an index"
        )
    return [(file, file.relative_to(root).as_posix()) for file in files]


def _folder_files(folder: Path) -> list[Path]:
    """Files of known formats under a folder; hidden ones and an index that was built there are left out.

    In a folder that holds a ``corpus`` of records (as BEIR's and ours do, questions beside it) nothing else is read.
    """
    files = [path for path in sorted(_visible(folder)) if reader_of(path) and path.is_file()]
    files = _outside_indexes(files, folder)
    corpora = {path.parent for path in files if stem(path) == "corpus" and reader_of(path) not in RUNNING}
    return [path for path in files if stem(path) == "corpus" or path.parent not in corpora]


def _visible(folder: Path) -> Iterator[Path]:
    """All that is below a folder and not hidden, also behind links that lead neither up nor to what comes anyway."""
    tops, seen = [folder], set(folder.resolve().parents)
    for top in tops:
        for place, folders, names in os.walk(top):
            here, real = Path(place), Path(place).resolve()
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            # They come last: what has a place of its own is called after it.
            tops += [here / name for name in folders if (here / name).is_symlink()]
            yield from (here / name for name in names if not name.startswith("."))


def _outside_indexes(files: Sequence[Path], root: Path) -> list[Path]:
    """The files that are no part of an index at a folder or below it, be it only half built, as by who reads them."""
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(root)}
    indexes = {
        folder
        for folder in folders
        if any(folder.glob("passages-*.parquet"))
        and any((folder / name).exists() for name in ("manifest.json", "build.lock"))
    }
    return [file for file in files if not indexes.intersection(file.parents)]


def _absolute(path: Path) -> Path:
    # abspath takes ".." away and, unlike resolve, keeps links: names are as the user sees the folders.
    return Path(os.path.abspath(path))


def _formats() -> str:
    plain = sorted(suffix.lstrip(".") for suffix in READERS if suffix.count(".") == 1)
    return f"{' '.join(plain)}, all but parquet also with {' or '.join(CODECS)} behind"
