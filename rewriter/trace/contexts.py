"""What is otherwise while a program is traced."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs each guard it finds and prints the graph it gave up on; that is not worth the user's attention."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def decided() -> Iterator[None]:
    """`is_causal=length > 1` is a branch of the program: decided while tracing, and guarded as any other.

    The argument parser refuses a symbolic truth value before any tracing hook sees it, so the function itself is wrapped.
    """
    original = torch.nn.functional.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        return original(query, key, value, attn_mask, dropout_p, bool(is_causal), **kwargs)

    torch.nn.functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = original


@contextmanager
def autocasts() -> Iterator[set[str]]:
    """The device types for which the program asks for autocast, whether or not this machine has them."""
    asked: set[str] = set()
    original = torch.autocast.__init__

    def init(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if enabled:
            asked.add(device_type)
        original(self, device_type, dtype, enabled, cache_enabled)

    torch.autocast.__init__ = init
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield asked
    finally:
        torch.autocast.__init__ = original
