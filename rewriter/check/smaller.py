"""The user's inputs cut to smaller sizes, where program and kernels take them.

A kernel must be right at sizes it was not traced at, and Triton's interpreter takes minutes for what a GPU does in
microseconds. Which sizes are free is found by trying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Call = tuple[tuple[Any, ...], dict[str, Any]]

# For the interpreter: more than one tile each way, and no whole number of tiles.
SHORT_BATCH, SHORT_LENGTH = 2, 97
SHORTER_LENGTHS = (31, 11)  # of images, whose positions are as many squared


def other_sizes(call: Call, fits: Callable[[Call], bool]) -> Call | None:
    """The inputs with every free size a third smaller, so that tiles are left half full; None if none is free."""
    return _cut(call, lambda size, _: size - size // 3, fits)


def short_sizes(call: Call, fits: Callable[[Call], bool], length: int = SHORT_LENGTH) -> Call | None:
    """The inputs with free sizes of at most SHORT_BATCH or `length`; None if none gets smaller."""

    def shorter(size: int, is_batch: bool) -> int:
        return min(size, SHORT_BATCH if is_batch else length)

    return _cut(call, shorter, fits)


def _cut(call: Call, shorter: Callable[[int, bool], int], fits: Callable[[Call], bool]) -> Call | None:
    """Cuts one size after the other and keeps what fits.

    Each in every tensor that has it; or, where that does not fit (a length that is equal to the width by chance), in
    those dimensions of every tensor where it does.
    """
    found, batches = call, _batches(call)
    rank = max((tensor.dim() for tensor in _tensors(call)), default=0)
    for size in _sizes(call):
        new = shorter(size, size in batches)
        for dims in [range(rank), *([d] for d in range(rank))] if new < size else []:
            cut = _resized(found, size, new, dims)
            if _shapes(cut) != _shapes(found) and fits(cut):
                found = cut
                if len(dims) == rank:
                    break
    return None if found is call else found


def _tensors(call: Call) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor)]


def _sizes(call: Call) -> list[int]:
    return sorted({size for tensor in _tensors(call) for size in tensor.shape}, reverse=True)


def _batches(call: Call) -> set[int]:
    return {tensor.shape[0] for tensor in _tensors(call) if tensor.dim() > 2}


def _resized(call: Call, old: int, new: int, dims: Iterable[int]) -> Call:
    """Those of `dims` that are `old` long become `new` long."""

    def cut(tensor: Tensor) -> Tensor:
        for dim in dims:
            if dim < tensor.dim() and tensor.shape[dim] == old:
                tensor = tensor.narrow(dim, 0, new)
        return tensor.clone()

    return tree_map_only(Tensor, cut, call)


def _shapes(call: Call) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in _tensors(call)]


def shown_sizes(call: Call) -> str:
    """`(2, 97, 64), (2, 97)`: the shapes of the inputs, each once."""
    return ", ".join(map(str, dict.fromkeys(_shapes(call))))
