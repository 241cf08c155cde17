"""The public names: which there are, that each is there, and that importing them costs nothing before they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ragmoe

NAMES = [
    "Answer",
    "BundleError",
    "ConfigError",
    "DataError",
    "EncoderMismatchError",
    "Hit",
    "Index",
    "IndexFolderError",
    "IndexLockedError",
    "ModelError",
    "Neighbours",
    "OutputCache",
    "Passage",
    "Question",
    "RagmoeError",
    "Routing",
    "RoutingStatistics",
    "UsageError",
    "__version__",
    "evaluate",
    "load",
    "load_decoder",
    "train",
]


def test_names() -> None:
    assert sorted(ragmoe.__all__) == NAMES
    assert set(NAMES) <= set(dir(ragmoe))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_resolves_to_what_it_says(name: str) -> None:
    value = getattr(ragmoe, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__.startswith("ragmoe.")
        assert value.__doc__


def test_errors_are_one_tree() -> None:
    for name in NAMES:
        if name.endswith("Error"):
            assert issubclass(getattr(ragmoe, name), ragmoe.RagmoeError)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'ragmoe' has no attribute 'router'"):
        _ = ragmoe.router


def test_importing_is_light() -> None:
    heavy = {"torch", "faiss", "transformers", "numpy", "pydantic"}
    code = f"import sys, ragmoe; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
