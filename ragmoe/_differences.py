"""What two configurations disagree about."""

from __future__ import annotations

from typing import Any


def differences(before: Any, now: Any, at: str = "") -> list[str]:
    """The dotted keys in which two nested mappings differ, each with both values: ``train.steps (2, now 3)``."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*before, *now]))
        return [found for k in keys for found in differences(before.get(k), now.get(k), f"{at}.{k}" if at else str(k))]
    return [] if before == now else [f"{at} ({before!r}, now {now!r})"]
