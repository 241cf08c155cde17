"""The tests themselves: they cannot reach the network, and start from the same seed."""

from __future__ import annotations

import os
import random
import socket

import numpy as np
import pytest
import torch


def test_the_network_is_out_of_reach() -> None:
    with socket.socket() as outside, pytest.raises(RuntimeError, match="tried to reach the network"):
        outside.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match=r"tried to reach the network.*example\.org"):
        socket.create_connection(("example.org", 80))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_this_machine_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_has_the_same_seed(time: str) -> None:
    drawn = (random.random(), float(np.random.random()), float(torch.rand(())))
    seeded = torch.Generator().manual_seed(20)
    expected = (random.Random(20).random(), np.random.RandomState(20).random(), float(torch.rand((), generator=seeded)))
    assert drawn == expected, time


def test_at_most_two_threads() -> None:
    assert torch.get_num_threads() <= 2
