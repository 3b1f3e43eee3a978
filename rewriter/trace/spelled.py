"""Calls that tracing would refuse or fix to a size, traced as what they mean.

A program that calls them decides nothing here: a guard that their stand-ins cause is one of the user's line.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_attention = torch.nn.functional.scaled_dot_product_attention
_fill_diagonal_ = torch.Tensor.fill_diagonal_


@contextmanager
def spelled() -> Iterator[None]:
    """While active, the calls are what they mean. Functions are replaced: argument parsing comes before any tracing hook."""
    torch.nn.functional.scaled_dot_product_attention = attention
    torch.Tensor.fill_diagonal_ = fill_diagonal_
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = _attention
        del torch.Tensor.fill_diagonal_


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: Any = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`is_causal=length > 1` is a branch of the program: decided while tracing, and guarded as any other."""
    return _attention(query, key, value, attn_mask, dropout_p, bool(is_causal), **kwargs)


def fill_diagonal_(x: torch.Tensor, fill_value: Any, wrap: bool = False) -> torch.Tensor:
    """where(i == j, fill_value, x): the op itself reads the sizes as numbers."""
    if wrap or x.dim() != 2:
        return _fill_diagonal_(x, fill_value, wrap)
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return x.masked_fill_(rows[:, None] == columns, fill_value)
