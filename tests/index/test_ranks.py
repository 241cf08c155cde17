"""Several processes encode one index together: it is what one makes, and a rank that is killed costs one block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_corpus import rows

from ragmoe import Index, IndexFolderError
from ragmoe._ranks import Meeting, Ranks
from ragmoe.index import Manifest
from ragmoe.index import blocks as blocks_module

IDS = [row["id"] for row in rows()]


def torchrun(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in two processes: what it printed and its exit code."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests", root / "tests" / "index")))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(Path(__file__).with_name("ranks_driver.py")), str(folder), "index", "build", *words],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_rank_is_killed_and_the_next_command_encodes_what_is_missing(
    build: Callable[..., Manifest], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "together"
    words = [str(corpus), "--out", str(out), "--resume"]
    # Rank 1 dies after block 1; of the blocks 0, 2 and 4 rank 0 has made some, or all before it was told.
    assert torchrun(tmp_path, *words, KILL="1").returncode != 0
    with pytest.raises(IndexFolderError, match=r"holds a build that did not finish\ngo on with: .* --resume"):
        Index.open(out)
    kept = {int(path.stem[-6:]) for path in (out / "partial").glob("block-*.npz")}
    assert 1 in kept and 3 not in kept
    missing = sorted({0, 2, 3, 4} - kept)

    done = torchrun(tmp_path, *words, "--json")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    assert f"{len(kept)} of 5 blocks are encoded, missing: " in said and " in 2 processes to encode, " in said
    assert done.stderr.count("stopped before") == 1
    # Only what is missing is encoded, each block by its rank; and one process prints.
    for rank in (0, 1):
        ids = [name for block in missing if block % 2 == rank for name in IDS[5 * block : 5 * block + 5]]
        assert (tmp_path / f"encoded-{rank}").read_text().split() == ids
    manifest = Manifest.model_validate({k: v for k, v in json.loads(done.stdout).items() if k in Manifest.model_fields})

    monkeypatch.setattr(blocks_module, "BLOCK", 5)
    alone = build(out=tmp_path / "alone")
    # Generation 1 is what the killed run had begun to write, if it came to that.
    one, two = Index.open(tmp_path / "alone"), Index.open(out)
    assert two.passage_ids == one.passage_ids == IDS and two.manifest == manifest
    assert np.array_equal(two.embeddings, one.embeddings)
    digests = [
        {name.split("-")[0]: f.sha256 for name, f in m.files.items() if "bm25" not in name} for m in (alone, manifest)
    ]
    assert digests[0] == digests[1]
    assert not (out / "partial").exists()


def test_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.launched() == Ranks(0, 1)
    monkeypatch.setenv("RANK", "2")
    assert Ranks.launched() == Ranks(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Ranks.launched() == Ranks(2, 3)


def test_one_process_meets_nobody() -> None:
    with Ranks().joined() as meeting:
        assert meeting == Meeting(None) and meeting.hear(True) and not meeting.hear(False)
        meeting.wait()


def test_others_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(IndexFolderError, match=r"was never there: .*MASTER_ADDR"), Ranks(0, 2).joined():
        pass
