"""What forward returns, as source text: its containers are those of the user's program."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import Any

from torch import nn

from rewriter.errors import RewriteError
from rewriter.patch.literal import Text, literal


class ResultPrinter:
    """Prints values whose leaves are `Text`; `lines` make the classes of the user's that it names."""

    def __init__(self, program: Any):
        self.function = inspect.unwrap(type(program).forward if isinstance(program, nn.Module) else program)
        self.owner = "self._original.forward" if isinstance(program, nn.Module) else "function"
        self.lines: dict[str, str] = {}

    def text(self, value: Any) -> str:
        """Raises RewriteError for a container that cannot be made again."""
        if isinstance(value, Text):
            return str(value)
        inner = {k: self.text(v) for k, v in _items(value)}
        listed = ", ".join(inner.values())
        if type(value) is dict:
            return "{" + ", ".join(f"{literal(k)}: {v}" for k, v in inner.items()) + "}"
        if type(value) is list:
            return f"[{listed}]"
        if type(value) is tuple:
            return f"({listed}{',' * (len(inner) == 1)})"
        if type(value).__module__ == "torch.return_types":
            return f"torch.return_types.{type(value).__name__}(({listed},))"
        made = self._class(type(value))
        if type(value) is OrderedDict:
            return f"{made}([{', '.join(f'({literal(k)}, {v})' for k, v in inner.items())}])"
        by_name = isinstance(value, dict) or is_dataclass(value)
        return f"{made}({', '.join(f'{k}={v}' for k, v in inner.items()) if by_name else listed})"

    def _class(self, kind: type) -> str:
        """A class by its name in the user's file. Raises RewriteError where it has none."""
        names = getattr(self.function, "__globals__", {})
        name = next((n for n, v in names.items() if v is kind), None)
        if name is None:
            raise RewriteError(f"forward returns a {kind.__qualname__}, which cannot be made again")
        self.lines[name] = f"{name} = inspect.unwrap({self.owner}).__globals__[{name!r}]"
        return name


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    raise RewriteError(f"forward returns a {type(value).__qualname__}, which cannot be made again")
