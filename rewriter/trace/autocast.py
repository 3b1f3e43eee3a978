"""What forward casts by itself depends on the device: tracing writes down what it does on its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def autocasts() -> Iterator[set[str]]:
    """The device types for which the program asks for autocast, whether or not this machine has them."""
    asked: set[str] = set()
    original = torch.autocast.__init__

    def init(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if enabled:
            asked.add(device_type)
        original(self, device_type, dtype, enabled, cache_enabled)

    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            torch.autocast.__init__ = init
            yield asked
    finally:
        torch.autocast.__init__ = original
