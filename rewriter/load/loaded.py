"""What the stage gives: a model that runs, and where it came from. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewriter.errors import Reason, Site

if TYPE_CHECKING:
    from torch import nn

FROM_FILE, FROM_OPTIONS = "get_inputs", "--input"
LIST, DICT, PAIR = "list", "dict", "pair"  # [args], {kwargs}, [[args], {kwargs}]


@dataclass(frozen=True)
class Loaded:
    """A module (or plain function) that runs on `args` and `kwargs`, and where it came from.

    `file` is absolute, as frames and `inspect` have it; `shown` is as the user wrote it. `line` is
    where the class or function is defined, 0 where that is another file. `init_form` and `inputs_form`
    say how `get_init_inputs` and `get_inputs` give arguments, "" where they were not asked. `package`
    is what its relative imports start from, "" where it has none.
    """

    module: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    file: Path
    shown: str
    class_name: str
    module_name: str
    inputs_from: str
    line: int = 0
    init_form: str = ""
    inputs_form: str = ""
    package: str = ""
    notes: tuple[Reason, ...] = ()

    def site(self, line: int = 0) -> Site:
        """A place in the user's file, as messages show it."""
        return Site(self.shown, line)
