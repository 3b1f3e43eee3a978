"""What `run.py` and its process say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rewriter.check.launches import Launch
from rewriter.options import Options


@dataclass(frozen=True)
class Request:
    """What the process is to do. `device` is "cuda" or "cpu". A kernel runs, or all that are `instead` of it."""

    options: Options
    kernels: tuple[tuple[str, str], ...]
    device: str
    numerics: bool = True
    instead: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What it found; `eager_error` says why the original program does not run on this device."""

    device: str
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    launches: dict[str, Launch] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    eager_error: str = ""
