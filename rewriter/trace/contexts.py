"""What is otherwise while a program is traced."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from types import FunctionType

import torch
from torch._export.verifier import Verifier
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules import transformer


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs each guard it finds and prints the graph it gave up on; that is not worth the user's
    attention.
    """
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def any_function() -> Iterator[None]:
    """A graph may hold functions of symbolic numbers (`torch._sym_log2`): export knows one of them alone."""
    original = Verifier.allowed_op_types
    Verifier.allowed_op_types = lambda self: (*original(self), FunctionType)
    try:
        yield
    finally:
        Verifier.allowed_op_types = original


@contextmanager
def masks_as_given() -> Iterator[None]:
    """torch's encoders and decoders look whether a mask's values are those of a causal one, and say so to their layers:
    to compute the same in another way.
    """
    original = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = original


@contextmanager
def autocasts() -> Iterator[set[str]]:
    """The device types for which the program asks for autocast, whether or not this machine has them: what it casts
    depends on the device, and a trace holds what it casts on its own.
    """
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


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Runs a module without data. Fake tensors log every failure at length, and what is compiled for them
    (`torch.cond` does) must not be found again by an export.
    """
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            torch.no_grad(),
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
        ):
            yield mode
    finally:
        logging.disable(level)
