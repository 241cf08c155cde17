"""Pushing to and pulling from the Hub, with a folder in its place: verified both ways, all or nothing."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from stub_encoder import StubEncoder
from test_verify import reseal
from typer.testing import CliRunner

from ragmoe import Index, IndexFolderError, IndexLockedError
from ragmoe.cli.main import app
from ragmoe.index import plan_remove, pull_index, push_index, verify_index
from ragmoe.index.manifest import read_manifest
from ragmoe.index.memory import ExpertMemory


def bound_to(real: Any) -> Callable[[type], type]:
    """Make a stand-in that is called as the real class would let it be: an argument that it lacks is a TypeError."""

    def bound(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(getattr(real, name))

        def call(*words: Any, **how: Any) -> Any:
            signature.bind(*words, **how)
            return method(*words, **how)

        return call

    def bind(standing_in: type) -> type:
        for name, method in list(vars(standing_in).items()):
            if inspect.isfunction(method) and not name.startswith("_"):
                setattr(standing_in, name, bound(name, method))
        return standing_in

    return bind


@bound_to(HfApi)
class Hub:
    """Stands in for `huggingface_hub.HfApi`: one repository is one folder."""

    root: Path
    made: list[dict[str, Any]]

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool, exist_ok: bool) -> SimpleNamespace:
        self.made.append({"repo": repo_id, "type": repo_type, "private": private, "exist_ok": exist_ok})
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def list_repo_files(self, repo_id: str, *, repo_type: str) -> list[str]:
        return _names(self.root / repo_id)

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str,
        folder_path: Path,
        allow_patterns: list[str],
        delete_patterns: list[str],
        commit_message: str,
    ) -> None:
        there = self.root / repo_id
        new = set(filter_repo_objects(_names(folder_path), allow_patterns=allow_patterns))
        for name in set(filter_repo_objects(_names(there), allow_patterns=delete_patterns)) - new:
            (there / name).unlink()
        self._copy(folder_path, there, new)

    def dataset_info(self, repo_id: str, *, revision: str | None) -> SimpleNamespace:
        if not (self.root / repo_id).is_dir():
            raise OSError(f"404 Client Error: Repository Not Found for {repo_id}\nand more")
        return SimpleNamespace(sha="c0ffee")

    def snapshot_download(
        self, repo_id: str, *, repo_type: str, revision: str, local_dir: Path, allow_patterns: list[str]
    ) -> None:
        assert (repo_type, revision) == ("dataset", "c0ffee")
        there = self.root / repo_id
        self._copy(there, local_dir, filter_repo_objects(_names(there), allow_patterns=allow_patterns))
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)

    def _copy(self, source: Path, to: Path, names: Any) -> None:
        for name in names:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, to / name)


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the repository ``me/mine``."""
    monkeypatch.setattr(Hub, "root", tmp_path / "hub", raising=False)
    monkeypatch.setattr(Hub, "made", [], raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return tmp_path / "hub" / "me" / "mine"


def push(folder: Path) -> None:
    push_index(folder, "me/mine", encoder=StubEncoder())


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("create_repo", {"type": "dataset"}),
        ("upload_folder", {"repo_id": "me/mine"}),  # of no folder
        ("dataset_info", {"commit": None}),
        ("snapshot_download", {"out": "here"}),
    ],
)
def test_the_stand_in_takes_no_call_that_the_hub_would_not(name: str, how: dict[str, Any], hub: Path) -> None:
    words = [] if "repo_id" in how else ["me/mine"]
    with pytest.raises(TypeError, match=r"^(missing a required argument: 'folder_path'|got an unexpected keyword)"):
        getattr(Hub(), name)(*words, **how)
    assert not hub.exists() and not Hub.made


def test_there_and_back(folder: Path, hub: Path, tmp_path: Path) -> None:
    index = Index.open(folder, encoder=StubEncoder())
    (folder / "notes.txt").write_text("not of the index")
    (folder / "partial").mkdir()
    (folder / "partial" / "block-000001.npz").write_bytes(b"?")
    ExpertMemory.of_domains(index, ["river"], [0], [1]).save(index)
    (folder / "memory" / "old.safetensors").write_bytes(b"of another index")
    push(folder)
    assert Hub.made == [{"repo": "me/mine", "type": "dataset", "private": True, "exist_ok": True}]
    memories = [f"memory/{path.name}" for path in (folder / "memory").iterdir() if path.name != "old.safetensors"]
    assert _names(hub) == sorted(["README.md", "manifest.json", *index.manifest.files, *memories])
    out = tmp_path / "new" / "pulled"
    assert pull_index("me/mine", out).digest == index.digest
    assert _names(out) == _names(hub) and [path.name for path in out.parent.iterdir()] == ["pulled"]
    assert verify_index(out, encoder=StubEncoder()) == []


def test_an_index_of_links_is_pushed(folder: Path, hub: Path, tmp_path: Path) -> None:
    """The Hub's own cache is one; nothing is written to it but the lock."""
    (tmp_path / "cache").mkdir()
    for path in folder.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(path)
    (tmp_path / "cache" / "build.lock").unlink()
    push(tmp_path / "cache")
    assert read_manifest(hub) == read_manifest(folder)
    (tmp_path / "cache" / "build.lock").unlink()
    (tmp_path / "cache" / "build.lock").symlink_to(tmp_path / "own.txt")
    with pytest.raises(IndexFolderError, match=r"build\.lock is a link to"):
        push(tmp_path / "cache")
    assert not (tmp_path / "own.txt").exists()


def test_an_older_generation_goes_from_the_hub(folder: Path, hub: Path) -> None:
    push(folder)
    plan = plan_remove(folder, domain="river")
    plan.run()
    push(folder)
    assert _names(hub) == sorted(["README.md", "manifest.json", *read_manifest(folder).files])


def test_a_data_set_that_is_no_index_is_left_alone(folder: Path, hub: Path) -> None:
    there = hub.parent / "city"
    (there / "data").mkdir(parents=True)
    for name in ("README.md", ".gitattributes", "data/train.parquet", "embeddings-1.npy", "manifest.json"):
        (there / name).write_text("mine")
    with pytest.raises(IndexFolderError, match=r"holds no index, but data/train\.parquet, embeddings-1\.npy, manifest"):
        push_index(folder, "me/city", encoder=StubEncoder())
    assert {path.read_text() for path in there.rglob("*") if path.is_file()} == {"mine"}
    for name in ("data/train.parquet", "embeddings-1.npy", "manifest.json"):
        (there / name).unlink()
    push_index(folder, "me/city", encoder=StubEncoder())
    assert (there / "manifest.json").is_file()


def test_what_is_damaged_is_not_pushed(folder: Path, hub: Path) -> None:
    (folder / "texts-1.bin").write_bytes(b"?")
    with pytest.raises(IndexFolderError, match=r"was not pushed: texts-1\.bin has 1 bytes"):
        push(folder)
    assert not hub.exists()


def test_no_build_takes_the_place_of_what_is_being_pushed(folder: Path, hub: Path, monkeypatch: Any) -> None:
    upload = Hub.upload_folder

    def meanwhile(self: Hub, **how: Any) -> None:
        plan = plan_remove(folder, domain="river")
        with pytest.raises(IndexLockedError):
            plan.run()
        upload(self, **how)

    monkeypatch.setattr(Hub, "upload_folder", meanwhile)
    push(folder)
    assert read_manifest(hub) == read_manifest(folder)


def test_a_pull_that_is_stopped_at_the_last_leaves_what_was_there(
    folder: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder)
    rename = Path.rename

    def stopped(self: Path, to: Path) -> Path:
        if self.name.endswith("part"):
            raise KeyboardInterrupt
        return rename(self, to)

    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        pull_index("me/mine", folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert verify_index(folder, encoder=StubEncoder()) == []


@pytest.mark.parametrize("then", ["", "refused", "other"])
def test_what_a_killed_pull_left_is_put_right_by_the_next(folder: Path, hub: Path, tmp_path: Path, then: str) -> None:
    push(folder)
    child = os.fork()
    if child == 0:
        # It ends without any clean-up, as one that is killed.
        rename = Path.rename
        Path.rename = lambda self, to: os._exit(9) if self.name.endswith("part") else rename(self, to)  # type: ignore
        try:
            pull_index("me/mine", folder, overwrite=True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    # The worst moment: the old index was moved away, the new one is not yet in its place.
    assert not folder.exists()
    assert {path.name for path in tmp_path.glob(".*")} == {f".{folder.name}.pull-{x}" for x in ("lock", "part", "old")}
    with pytest.raises(IndexFolderError, match=r"there is no index at .* lies in .*\.pull-old\nput it back: mv "):
        Index.open(folder)
    if then == "refused":
        with pytest.raises(IndexFolderError, match="holds an index already"):
            pull_index("me/mine", folder)
    elif then == "other":
        with pytest.raises(IndexFolderError, match="cannot be pulled"):
            pull_index("me/none", folder, overwrite=True)
    else:
        pull_index("me/mine", folder, overwrite=True)
    assert not list(tmp_path.glob(".*")) and verify_index(folder, encoder=StubEncoder()) == []


def test_what_was_pulled_is_on_the_disk_before_the_old_index_goes(
    folder: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder)
    synced: list[Path] = []
    for name in ("sync", "sync_folder"):
        monkeypatch.setattr(f"ragmoe.index.manifest.{name}", synced.append)
    pull_index("me/mine", folder, overwrite=True)
    part = tmp_path / f".{folder.name}.pull-part"
    there = {part / path.relative_to(folder) for path in folder.rglob("*")} - {part / "build.lock"}
    assert set(synced[:-1]) == {part, *there} and synced[-1] == tmp_path


def test_one_pull_to_a_folder_at_a_time(
    folder: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder)
    download = Hub.snapshot_download

    def meanwhile(self: Hub, *words: Any, **how: Any) -> None:
        with pytest.raises(IndexLockedError, match="another process pulls to"):
            pull_index("me/mine", tmp_path / "new")
        download(self, *words, **how)

    monkeypatch.setattr(Hub, "snapshot_download", meanwhile)
    pull_index("me/mine", tmp_path / "new")
    assert verify_index(tmp_path / "new", encoder=StubEncoder()) == [] and not list(tmp_path.glob(".*"))


def test_the_current_folder_is_not_replaced_and_of_a_link_what_it_leads_to(
    folder: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    with pytest.raises(IndexFolderError, match=r"^\. is the current folder"):
        pull_index("me/mine", ".")
    monkeypatch.chdir(tmp_path)
    pull_index("me/mine", "link")
    assert (tmp_path / "link").is_symlink() and verify_index(tmp_path / "real", encoder=StubEncoder()) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nothing_is_overwritten_unasked(folder: Path, hub: Path, tmp_path: Path) -> None:
    push(folder)
    plan = plan_remove(folder, domain="river")
    newer = plan.run().digest
    with pytest.raises(IndexFolderError, match="holds an index already\nreplace it with --overwrite"):
        pull_index("me/mine", folder)
    assert read_manifest(folder).digest == newer
    assert pull_index("me/mine", folder, overwrite=True).passages == 24
    assert verify_index(folder, encoder=StubEncoder()) == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(IndexFolderError, match=r"holds other things than an index: thesis\.txt"):
        pull_index("me/mine", tmp_path / "mine", overwrite=True)


def _flip(hub: Path) -> None:
    content = bytearray((hub / "embeddings-1.npy").read_bytes())
    content[-1] ^= 1
    (hub / "embeddings-1.npy").write_bytes(content)


def _leave(hub: Path) -> None:
    text = (hub / "manifest.json").read_text()
    (hub / "manifest.json").write_text(text.replace('"texts-1.bin"', '"../texts-1.bin"'))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_flip, r"what came of 'me/mine' is damaged: embeddings-1\.npy was changed"),
        (lambda hub: (hub / "texts-1.bin").unlink(), r"texts-1\.bin is missing"),
        (lambda hub: (hub / "manifest.json").unlink(), r"'me/mine' holds no index: it has no manifest\.json"),
        (_leave, r"'\.\./texts-1\.bin' is no file of generation 1"),
    ],
    ids=["flipped", "missing", "no index", "leads elsewhere"],
)
def test_what_came_damaged_does_not_take_the_place(
    harm: Any, reason: str, folder: Path, hub: Path, tmp_path: Path
) -> None:
    push(folder)
    harm(hub)
    before = sorted(path.name for path in tmp_path.iterdir())
    for out in (folder, tmp_path / "fresh"):
        with pytest.raises(IndexFolderError, match=reason):
            pull_index("me/mine", out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert verify_index(folder, encoder=StubEncoder()) == []


def test_a_pulled_faiss_file_is_not_parsed(
    folder: Path, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ragmoe._threads import import_faiss

    push(folder)
    (hub / "index-1.faiss").write_bytes(b"IxFI" + bytes(100))
    reseal(hub)
    pull_index("me/mine", tmp_path / "pulled")
    monkeypatch.setattr(import_faiss(), "read_index", lambda *_: pytest.fail("parsed"))
    (hits,) = Index.open(tmp_path / "pulled", encoder=StubEncoder()).search(["honey"], 1, retriever="dense")
    assert hits[0].passage_id == "market-5"


def test_offline_and_unknown_names_are_said(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client: the tests are offline."""
    for work in (lambda: push(folder), lambda: pull_index("me/mine", tmp_path / "out")):
        with pytest.raises(IndexFolderError, match=r"'me/mine'.*: .*\nit needs the network \(HF_HUB_OFFLINE unset\)"):
            work()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Hub, "root", tmp_path, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with pytest.raises(IndexFolderError, match=r"'me/none' cannot be pulled: 404 Client Error: .* me/none\nit needs"):
        pull_index("me/none", tmp_path / "out")


def test_the_commands(folder: Path, hub: Path, tmp_path: Path) -> None:
    push(folder)
    digest = read_manifest(folder).digest
    done = CliRunner().invoke(app, ["index", "pull", "me/mine", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0 and digest in done.stdout
    again = CliRunner().invoke(app, ["index", "pull", "me/mine", "--out", str(tmp_path / "out")])
    assert isinstance(again.exception, IndexFolderError) and again.exception.exit_code == 1
    (folder / "texts-1.bin").unlink()
    refused = CliRunner().invoke(app, ["index", "push", str(folder), "me/mine"])
    assert isinstance(refused.exception, IndexFolderError) and "was not pushed" in refused.exception.message
