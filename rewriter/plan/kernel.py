"""What planning decides for one kernel: the role of every axis, the tile sizes, and how contractions become `tl.dot`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewriter.derive import Chain
from rewriter.ir import Axis, Const, Node, Reduce


@dataclass(frozen=True)
class Dot:
    """An inner contraction sum_d left[row, d] · right[stream, d] as one matrix product of two tiles."""

    node: Reduce
    axis: Axis
    left: Node
    right: Node
    scale: tuple[Node, ...]


@dataclass(frozen=True)
class Config:
    """Launch parameters. `block_m` rows and `block_n` stream positions a tile; warps and pipeline stages as Triton's."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class KernelPlan:
    """One kernel of one pass. `features` are kept whole in a tile, padded to the power of two in `padded`."""

    name: str
    chain: Chain
    grid: tuple[Axis, ...]
    row: Axis
    stream: Axis
    features: tuple[Axis, ...]
    dots: tuple[Dot, ...]
    config: Config
    dtype: torch.dtype

    def padded(self, axis: Axis) -> int:
        return padded(axis)

    @property
    def aligns(self) -> bool:
        """Whether strides are passed in units of ALIGN elements: a stride of 40 is a multiple of 8, but Triton only asks
        for 16, and without knowing either loads one element at a time."""
        return any(int(a.extent.value) % 16 for a in self.features)

    @property
    def segments(self) -> tuple[str, ...]:
        """Forms of the loop's body: 'full' tiles, and a 'tail' where the stream may not fill its last tile."""
        extent = self.stream.extent
        if not isinstance(extent, Const):
            return ("full", "tail")
        full, rest = divmod(int(extent.value), self.config.block_n)
        return (("full",) if full else ()) + (("tail",) if rest else ())

    @property
    def tile_axes(self) -> tuple[Axis, ...]:
        """In the order of a tile's dimensions."""
        return (self.row, self.stream, *self.features)


def padded(axis: Axis) -> int:
    """The power of two, at least 16 (what `tl.dot` takes), that holds a feature axis."""
    assert isinstance(axis.extent, Const)
    return max(16, 1 << (int(axis.extent.value) - 1).bit_length())
