"""What is otherwise while a program is traced."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
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
    to compute the same in another way. They also cut out padding by its values.
    """
    original, forward = transformer._detect_is_causal_mask, transformer.TransformerEncoder.forward
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    transformer.TransformerEncoder.forward = _padding_written_out(forward)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask, transformer.TransformerEncoder.forward = original, forward


def _padding_written_out(forward: Callable) -> Callable:
    """torch's encoder in eval mode leaves padding out where it is at the end of every row, and gives 0 for it: before
    its norm, if it has one. Here the same without nested tensors.
    """

    @functools.wraps(forward)
    def written_out(encoder, src, mask=None, src_key_padding_mask=None, is_causal=None):
        given = src, mask, src_key_padding_mask, is_causal
        nests = getattr(encoder, "use_nested_tensor", False) and torch.backends.mha.get_fastpath_enabled()
        if (
            not nests
            or encoder.layers[0].training
            or src.dim() != 3
            or mask is not None
            or src_key_padding_mask is None
        ):
            return forward(encoder, *given)
        norm = encoder._modules["norm"] if "norm" in encoder._modules else None
        vars(encoder)["use_nested_tensor"], encoder._modules["norm"] = False, None
        try:
            out = forward(encoder, *given)
        finally:
            vars(encoder)["use_nested_tensor"], encoder._modules["norm"] = True, norm
        padding = src_key_padding_mask if src_key_padding_mask.dtype is torch.bool else src_key_padding_mask != 0
        at_the_end = (padding[:, 1:] | ~padding[:, :-1]).all() | (not getattr(encoder, "mask_check", True))
        out = out.masked_fill((padding & at_the_end)[:, :, None], 0.0)
        return norm(out) if norm is not None else out

    return written_out


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
