"""What a reader found in a passage, kept for when the same question comes to the same passage again.

    model.output_cache = OutputCache(max_entries=10_000)

A reader reads question and passage together, so an output belongs to both, to the neighbours where the gate looks at
them, to the weights, and to how these are run. The key is a digest of all of these: whatever changes, the passage is
read anew. What is kept is the same to the last bit; a passage that is read beside fewer others, because theirs are
known, may differ in the last digits, as it does in any batch of another size.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ragmoe._errors import ModelError
from ragmoe.gates import Gate
from ragmoe.models.digest import remembered_digest
from ragmoe.models.windows import Window
from ragmoe.neighbours import Neighbours

Value = TypeVar("Value")


class OutputCache:
    """Values by key, at most so many; the least recently used goes first. Safe to share between threads and models.

    Attributes:
        hits, misses: values that were there, and that had to be computed.
        evictions: values that had to go.
    """

    def __init__(self, max_entries: int = 10_000) -> None:
        """Start empty; an entry of a reader takes about a kilobyte. ModelError for room for less than one."""
        if max_entries < 1:
            raise ModelError(f"max_entries is {max_entries}: expected at least 1")
        self.max_entries = max_entries
        self.hits = self.misses = self.evictions = 0
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, _: dict[int, Any]) -> OutputCache:
        """Itself: a copied model shares it, and its values are told apart by their keys."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {**self.__dict__, "_entries": self._entries.copy(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._entries)

    def values(self, keys: Sequence[Hashable], compute: Callable[[list[int]], Sequence[Value]]) -> list[Value]:
        """The value of each key.

        Args:
            compute: is given the places of the keys whose values are not there, each key once, and returns these.
        """
        found: dict[Hashable, Value] = {}
        missing: dict[Hashable, int] = {}
        with self._lock:
            for place, key in enumerate(keys):
                if key in self._entries:
                    self._entries.move_to_end(key)
                    found[key] = self._entries[key]
                else:
                    missing.setdefault(key, place)
            self.misses += len(missing)
            self.hits += len(keys) - len(missing)
        if missing:
            made = dict(zip(missing, compute(list(missing.values())), strict=True))
            self._keep(made)
            found |= made
        return [found[key] for key in keys]

    def _keep(self, made: dict[Hashable, Any]) -> None:
        with self._lock:
            for key, value in made.items():
                self._entries[key] = value
                self._entries.move_to_end(key)
            while len(self._entries) > self.max_entries:
                self._entries.popitem(last=False)
                self.evictions += 1

    def clear(self) -> None:
        """Forget all values and count from zero."""
        with self._lock:
            self._entries.clear()
            self.hits = self.misses = self.evictions = 0

    def summary(self) -> dict[str, Any]:
        """Entries, counters and the share of hits (None where nothing was asked for), as JSON holds it."""
        asked = self.hits + self.misses
        return {
            "entries": len(self),
            "max_entries": self.max_entries,
            "hits": self.hits,
            "misses": self.misses,
            "evictions": self.evictions,
            "hit_rate": self.hits / asked if asked else None,
        }


def sequence_keys(
    model: Any, sequences: Sequence[tuple[int, Window]], neighbours: Neighbours | None, device: torch.device
) -> list[bytes]:
    """For each sequence a digest of everything that its output depends on.

    Args:
        sequences: of each its question's place among the neighbours, and its tokens.
        neighbours: what the gate sees; None where it sees none.
    """
    common = _model_key(model, device)
    shown = {b: _neighbours_key(neighbours, b) for b in {b for b, _ in sequences}} if neighbours is not None else {}
    keys = []
    for b, window in sequences:
        # Parts of a fixed length first, so that no two lists of parts read the same.
        tokens = np.asarray([window.context_start, len(window.offsets), *window.input_ids], dtype=np.int64)
        keys.append(hashlib.sha256(common + shown.get(b, bytes(32)) + tokens.tobytes()).digest())
    return keys


def _model_key(model: Any, device: torch.device) -> bytes:
    """Of weights, configuration, kernels, precision, adapters, and which experts are available."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    available = [gate.available.tolist() for gate in model.modules() if isinstance(gate, Gate)]
    kernels = [model.config._experts_implementation, model.config._attn_implementation, str(device)]
    precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    parts = [remembered_digest(model), config, kernels, available, precision, _adapters(model)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).digest()


def _adapters(model: Any) -> list[list[Any]]:
    """Of each layer with PEFT adapters which ones it adds, and how strongly: their weights do not say."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [[x.active_adapters, x.disable_adapters, x.merged, getattr(x, "scaling", None)] for x in layers]


def _neighbours_key(neighbours: Neighbours, row: int) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in neighbours.tensors().items():
        x: Tensor = tensor[row].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()
