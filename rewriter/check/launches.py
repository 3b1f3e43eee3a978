"""Which kernels a rewritten module launches, and with what: proof that they ran, and what to compile them for.

A launch specialises a kernel by its arguments: integers that are 1, multiples of 16, aligned pointers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

ALIGNMENT = 16  # what Triton looks for in pointers and integers


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch by name. `aligned` are the tensors whose pointer is a multiple of 16."""

    programs: int
    values: dict[str, Any]
    aligned: tuple[str, ...]


@dataclass
class Recorder:
    """Stands in for the kernels of a package; `launches` has the first of each since `clear`.

    While `dry`, nothing runs: results are whatever their memory held, shapes and guards are real, but for that of what
    Triton's interpreter would multiply wrongly.
    """

    files: tuple[ModuleType, ...] = ()
    dry: bool = False
    launches: dict[str, Launch] = field(default_factory=dict)

    def clear(self) -> None:
        self.launches.clear()

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Launch nothing inside the block; what kernels would write is 0, which may be read as a position."""
        before, self.dry = self.dry, True
        guarded = [file.MISMULTIPLIED for file in self.files]
        try:
            for file in self.files:
                file.MISMULTIPLIED = ()
            with _Zeros():
                yield
        finally:
            self.dry = before
            for file, held in zip(self.files, guarded):
                file.MISMULTIPLIED = held

    @property
    def programs(self) -> int:
        return sum(launch.programs for launch in self.launches.values())


class _Zeros(TorchFunctionMode):
    """torch.empty gives zeros."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.zeros if func is torch.empty else func)(*args, **(kwargs or {}))


def idle_among(kernels: Sequence[str], instead: Mapping[str, tuple[str, ...]], ran: Collection[str]) -> list[str]:
    """Those that should have run and did not: a kernel, or all that are `instead` of it."""
    done = {k for k, others in instead.items() if all(o in ran for o in others)}
    spared = {o for k, others in instead.items() if k in ran for o in others}
    return [k for k in kernels if k not in ran and k not in done | spared]


def record(package: ModuleType, kernels: Sequence[tuple[str, str]]) -> Recorder:
    """Put a recorder in front of each kernel, given as (name of its file, name of its function), of an imported
    package.
    """
    __import__(f"{package.__name__}.module")
    files = {name: sys.modules[f"{package.__name__}.kernels.{name}"] for name, _ in kernels}
    recorder = Recorder((sys.modules[f"{package.__name__}.module"], *files.values()))
    for name, function in kernels:
        file = files[name]
        setattr(file, function, _Recorded(function, getattr(file, function), recorder))
    return recorder


class _Recorded:
    """`kernel[grid](...)` as the emitted launch function writes it."""

    def __init__(self, name: str, kernel: Any, recorder: Recorder):
        self._name, self._kernel, self._recorder = name, kernel, recorder

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs
            self._recorder.launches.setdefault(self._name, _launch(grid, named))
            if not self._recorder.dry:
                self._kernel[grid](*args, **kwargs)

        return launch


def _launch(grid: tuple[int, ...], named: dict[str, Any]) -> Launch:
    programs = 1
    for extent in grid:
        programs *= extent
    named = {name: getattr(value, "base", value) for name, value in named.items()}  # of a descriptor the tensor
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    aligned = tuple(n for n, t in tensors.items() if t.data_ptr() % ALIGNMENT == 0)
    values = {name: value for name, value in named.items() if name not in tensors}
    return Launch(programs, values, aligned)
