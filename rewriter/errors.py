"""What can go wrong, as values: a reason with the user's line, and the one exception that crosses the boundary."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of `flashlight-rewrite`."""

    DONE = 0
    CHECK_FAILED = 1
    BAD_INPUT = 2
    FAILED = 3
    NOTHING_TO_FUSE = 4
    INTERRUPTED = 130


@dataclass(frozen=True)
class Site:
    """A place in the user's source. `line` is 1-based; 0 where only the file is known."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Reason:
    """Why something was not done, and where: the value every stage returns instead of raising."""

    text: str
    site: Site | None = None

    def __str__(self) -> str:
        return f"{self.site}: {self.text}" if self.site else self.text


class RewriteError(Exception):
    """A failure the user sees as one line, `file:line: reason`, with the exit code it leads to."""

    def __init__(self, text: str, *, site: Site | None = None, code: ExitCode = ExitCode.FAILED):
        super().__init__(text)
        self.reason = Reason(text, site)
        self.code = code
