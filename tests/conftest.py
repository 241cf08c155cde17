"""What holds for every test: no network, one thread a process, the same seed each time."""

from __future__ import annotations

import os
import random
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

# Before any library is imported: they read these at import. Child processes inherit them. One thread: on tensors this
# small, waiting for a second one takes longer than the work.
_CACHE = tempfile.mkdtemp(prefix="ragmoe-tests-")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_CACHE,
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    XDG_STATE_HOME=_CACHE,
    TOKENIZERS_PARALLELISM="false",
)

_SEED = 20
_LOCAL = {"localhost", "127.0.0.1", "::1", ""}


def pytest_configure(config: pytest.Config) -> None:
    # pytest-randomly shuffles the order with a new seed each time; the tests themselves get a fixed one, below.
    config.option.randomly_reset_seed = False


def pytest_unconfigure() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Seed what is loaded; a test that first imports torch itself seeds it itself."""
    random.seed(_SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(_SEED)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(_SEED)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Fail at once where a test would reach beyond this machine."""
    connect, connect_ex, resolve = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def local_only(address: Any, family: int) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if family != socket.AF_UNIX and host not in _LOCAL:
            raise RuntimeError(f"a test tried to reach the network: {address!r}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        local_only(address, self.family)
        return connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        local_only(address, self.family)
        return connect_ex(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        local_only((host.decode() if isinstance(host, bytes) else host or "",), socket.AF_INET)
        return resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_resolve)
        yield
