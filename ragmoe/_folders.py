"""Folders that are to be written, and those that are the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ragmoe._errors import ConfigError, RagmoeError


def expect_folder(folder: str | os.PathLike[str], error: type[RagmoeError] = ConfigError) -> Path:
    """The nearest folder that exists on the way to one that is to be written, itself included.

    Raises:
        RagmoeError: of the kind given; a file stands in its place, or in that of a folder above it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise error(f"{folder} is a file; expected a folder, new or empty", hint="name another with --out")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise error(f"{folder} cannot be made: {there} is a file", hint="name another with --out")
    return there


@contextmanager
def held(folder: Path, lock_name: str, otherwise: RagmoeError) -> Iterator[None]:
    """Hold a folder, made if need be, for one process; what was made for it and holds nothing in the end goes again.

    Args:
        lock_name: of the file that says so; it is there meanwhile.
        otherwise: raised where another process holds it.

    Raises:
        ConfigError: it is no folder and cannot become one.
    """
    expect_folder(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / lock_name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise otherwise from None
    try:
        yield
    finally:
        # While it is held: whoever comes next must not hold a file that is gone.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def share(path: Path) -> None:
    """Let a file be read by all who may read its folder; safetensors writes for the owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def refuse_link(path: Path, error: type[RagmoeError]) -> None:
    """Refuse to write to, or to remove, what stands elsewhere.

    Raises:
        RagmoeError: of the kind given; there is a symbolic link.
    """
    if path.is_symlink():
        raise error(
            f"{path} is a link to {path.readlink()}, where nothing is to be written or removed; expected a file or "
            "folder of its own",
            hint=f"remove the link; or, if you trust it, copy all with what is linked: cp -rL {path.parent} NEW",
        )


def cache_folder() -> Path:
    """What can be made again: ``$RAGMOE_CACHE``, else ``ragmoe`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("RAGMOE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ragmoe"


def state_folder() -> Path:
    """What is kept of earlier runs: ``ragmoe`` in ``$XDG_STATE_HOME`` or ``~/.local/state``."""
    return Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "ragmoe"
