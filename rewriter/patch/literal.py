"""Values as Python source."""

from __future__ import annotations

import math
from typing import Any

import torch

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size)


def is_plain(value: Any) -> bool:
    """Whether `literal` can write the value, and `==` compares it."""
    if type(value) is dict:
        return all(map(is_plain, [*value.keys(), *value.values()]))
    if type(value) in (list, tuple, set):
        return all(map(is_plain, value))
    return type(value) in PLAIN and value == value


def literal(value: Any) -> str:
    """Text that evaluates to a plain value: `float("-inf")`, not `-inf`."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if type(value) is dict:
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    if type(value) is list:
        return f"[{', '.join(map(literal, value))}]"
    if type(value) is set:
        return f"{{{', '.join(sorted(map(literal, value)))}}}" if value else "set()"
    if type(value) is tuple:
        return f"({', '.join(map(literal, value))}{',' * (len(value) == 1)})"
    return repr(value)


class Text(str):
    """Source text that prints as it is where a value would print its repr."""

    def __repr__(self) -> str:
        return str(self)
