"""Indexes on the Hugging Face Hub, as data set repositories: what was verified goes up, and is verified coming down."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ragmoe._errors import IndexFolderError, IndexLockedError, RagmoeError
from ragmoe._words import many
from ragmoe.index import card, memory
from ragmoe.index import manifest as manifests
from ragmoe.index.encoder import Encoder
from ragmoe.index.manifest import Manifest, pulled_beside, read_manifest
from ragmoe.index.target import NewIndex, locked
from ragmoe.index.verify import changed_files, verify_index

#: What another generation, pushed before, may have left in the repository.
_OLD = [
    *(f"{kind}-*" for kind in ("passages", "texts", "offsets", "embeddings", "digests", "index", "bm25")),
    f"{memory.FOLDER}/*",
]


def push_index(
    folder: str | os.PathLike[str], repo: str, *, public: bool = False, encoder: str | Encoder | None = None
) -> Manifest:
    """Verify an index and put it on the Hub, in one commit: its files, its card, and what was recorded with it.

    Args:
        repo: ``NAME`` or ``OWNER/NAME``; made where there is none.
        public: a repository that is made is readable by everybody.
        encoder: to verify with; the one that the index names if None.

    Raises:
        IndexLockedError: somebody else is building this index.
        IndexFolderError: there is no index, it is damaged, the repository holds something else, or the Hub cannot be
            reached or refuses.
    """
    path = Path(folder)
    read_manifest(path)
    # No other generation may take its place meanwhile. Where nobody can write, nobody can do that.
    with locked(path) if os.access(path, os.W_OK) else nullcontext():
        manifest = read_manifest(path)
        if problems := verify_index(path, encoder=encoder):
            raise IndexFolderError(f"{path} is damaged and was not pushed: {'; '.join(problems)}")
        _upload(path, manifest, repo, public)
    return manifest


def _upload(path: Path, manifest: Manifest, repo: str, public: bool) -> None:
    names = [manifests.NAME, *manifest.files]
    names += [sidecar.relative_to(path).as_posix() for sidecar in memory.sidecars(path, manifest.digest)]
    names += [card.NAME] if (path / card.NAME).is_file() else []
    with _hub(f"{path} cannot be pushed to {repo!r}") as api:
        # With its owner, where only a name was given.
        whole = api.create_repo(repo, repo_type="dataset", private=not public, exist_ok=True).repo_id
        there = api.list_repo_files(whole, repo_type="dataset")
        others = sorted({name for name in there if not name.startswith(".")} - {card.NAME})
        if others and not _holds_index(api, whole, there):
            shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
            raise IndexFolderError(
                f"{whole!r} is a data set that holds no index, but {shown}: nothing was pushed",
                hint="name a repository that does not exist yet, is empty, or holds an index",
            )
        api.upload_folder(
            repo_id=whole,
            repo_type="dataset",
            folder_path=path,
            allow_patterns=names,
            delete_patterns=_OLD,
            commit_message=f"Index of {many(manifest.passages, 'passage')}, {manifest.digest[:12]}",
        )


def _holds_index(api: Any, repo: str, there: Sequence[str]) -> bool:
    """Whether what a repository has as its manifest is one of ours."""
    if manifests.NAME not in there:
        return False
    with tempfile.TemporaryDirectory() as part:
        commit = api.dataset_info(repo, revision=None).sha
        how = {"repo_type": "dataset", "revision": commit, "local_dir": Path(part)}
        api.snapshot_download(repo, allow_patterns=[manifests.NAME], **how)
        try:
            read_manifest(Path(part))
        except RagmoeError:
            return False
    return True


def pull_index(
    repo: str, out: str | os.PathLike[str], *, revision: str | None = None, overwrite: bool = False
) -> Manifest:
    """Get an index from the Hub: beside ``out`` first, and into its place once every digest is right.

    Args:
        revision: a branch, tag or commit; the newest if None.
        overwrite: replace the index that is there.

    Raises:
        IndexLockedError: another pull to ``out`` is under way.
        IndexFolderError: ``out`` may not be written to, the Hub cannot be reached or has no such repository, or what
        came is no index or damaged; what was there stays.
    """
    NewIndex(Path(out), overwrite=overwrite).check()
    # Of a link what it leads to is replaced, and a folder's name is needed for those beside it.
    target = NewIndex(Path(out).resolve(), overwrite=overwrite)
    if target.folder == Path.cwd():
        raise IndexFolderError(
            f"{out} is the current folder, and what is pulled takes a folder's place", hint="name another with --out"
        )
    with _alone(target.folder):
        manifest = _fetch(repo, revision, pulled_beside(target.folder, "part"))
        _put(pulled_beside(target.folder, "part"), target)
    return manifest


def _fetch(repo: str, revision: str | None, part: Path) -> Manifest:
    """Get an index into a new folder, and verify it."""
    part.mkdir()
    with _hub(f"{repo!r} cannot be pulled") as api:
        commit = api.dataset_info(repo, revision=revision).sha
        how = {"repo_type": "dataset", "revision": commit, "local_dir": part}
        api.snapshot_download(repo, allow_patterns=[manifests.NAME], **how)
        if not (part / manifests.NAME).is_file():
            raise IndexFolderError(f"{repo!r} holds no index: it has no {manifests.NAME}")
        # Only what this manifest names is asked for, and its names were checked.
        manifest = read_manifest(part)
        wanted = [*manifest.files, card.NAME, f"{memory.FOLDER}/*.safetensors"]
        api.snapshot_download(repo, allow_patterns=wanted, **how)
    shutil.rmtree(part / ".cache", ignore_errors=True)
    if problems := changed_files(part, manifest):
        raise IndexFolderError(f"what came of {repo!r} is damaged: {'; '.join(problems)}")
    for path in (part, *part.rglob("*")):
        (manifests.sync_folder if path.is_dir() else manifests.sync)(path)
    return manifest


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only pull to a folder; what one that was killed has left beside it goes, or goes back into its place.

    Raises:
        IndexLockedError: another pull to this folder is under way.
        IndexFolderError: whatever goes wrong with files inside.
    """
    lock, part, old = (pulled_beside(folder, kind) for kind in ("lock", "part", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=0):
            try:
                shutil.rmtree(part, ignore_errors=True)
                if old.exists() and not folder.exists():
                    old.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
                yield
            finally:
                shutil.rmtree(part, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Timeout:
        raise IndexLockedError(f"another process pulls to {folder}", hint="wait until it has finished") from None
    except OSError as error:
        raise IndexFolderError(f"{folder} cannot be written: {error.strerror or error}") from error


def _put(part: Path, target: NewIndex) -> None:
    """Put a folder in the place of another, which goes only then."""
    folder = target.folder
    if not folder.exists():
        part.rename(folder)
        manifests.sync_folder(folder.parent)
        return
    old = pulled_beside(folder, "old")
    with locked(folder):
        target.check()
        folder.rename(old)
        try:
            part.rename(folder)
        except BaseException:
            # Also where the user stops it here: an index is there in any case.
            if not folder.exists():
                old.rename(folder)
            raise
    manifests.sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _hub(failure: str) -> Iterator[Any]:
    """The Hub; whatever goes wrong with it is an error of ours."""
    from huggingface_hub import HfApi

    try:
        yield HfApi()
    except RagmoeError:
        raise
    except Exception as error:  # the Hub raises many kinds: offline, no such name, no rights, no room
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise IndexFolderError(
            f"{failure}: {first}", hint="it needs the network (HF_HUB_OFFLINE unset) and, to write, `hf auth login`"
        ) from error
