"""Files that ask for a GPU, on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

WITHOUT_GPU = "there is no GPU here: what asks for one is on the CPU"


@contextmanager
def without_gpu() -> Iterator[OnCpu | None]:
    """Replaces nothing where there is a GPU."""
    if torch.cuda.is_available():
        yield None
        return
    with OnCpu() as mode:
        yield mode


class OnCpu(TorchFunctionMode):
    """While active, tensors that are asked for on a GPU are made on the CPU; `used` tells of it."""

    def __init__(self) -> None:
        super().__init__()
        self.used = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            self.used = True
            return args[0]
        args, kwargs = tree_map(self._moved, (args, kwargs or {}))
        return func(*args, **kwargs)

    def _moved(self, value: Any) -> Any:
        is_gpu = isinstance(value, torch.device) and value.type == "cuda"
        is_named = isinstance(value, str) and value.split(":")[0] == "cuda"
        if not (is_gpu or is_named):
            return value
        self.used = True
        return "cpu" if is_named else torch.device("cpu")
