"""What planning decides: the kernels of a chain, the role of every axis in each, and how contractions are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rewriter.derive import Chain, Definition
from rewriter.ir import Axis, Const, Node, Output, Reduce, Tensor
from rewriter.ir.integer import from_poly, plus, to_poly
from rewriter.plan.estimates import KernelCost
from rewriter.plan.fills import Fill
from rewriter.plan.maps import BlockMap
from rewriter.sparsity import Interval, Support

LONG_BLOCK = 64  # positions of a long contraction in one block
NARROW_BAND = 512  # positions that a mask leaves of each row
NARROW = 64  # features


@dataclass(frozen=True)
class Dot:
    """An inner contraction sum_d left[x, d] · right[y, d] as one matrix product of two tiles; x and y are tile axes.

    A `long` one does not keep d whole: it adds up products of BLOCK_D positions each. Of a skewed one y are distances
    (`skew`), all that a tile of rows and stream positions has.
    """

    node: Reduce
    axis: Axis
    rows: Axis
    columns: Axis
    left: Node
    right: Node
    scale: tuple[Node, ...]
    long: bool = False
    skew: Skew | None = None


@dataclass(frozen=True)
class Skew:
    """Distances n - m + M - 1 of stream positions n to rows m, numbered along `axis`."""

    rows: Axis
    stream: Axis
    axis: Axis


@dataclass(frozen=True)
class Loop:
    """An inner reduction that is no matrix product, one position of `axis` after the other, or of a `whole` tile. Of an
    `unrolled` one all positions are written out when the kernel is compiled.
    """

    node: Reduce
    axis: Axis
    predicate: Node
    body: Node
    whole: bool = False
    unrolled: bool = False


@dataclass(frozen=True)
class Config:
    """Launch parameters. `block_m` rows and `block_n` stream positions a tile; warps and pipeline stages as Triton's."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Sweep:
    """One loop over a stream: what it reduces, and the outputs it writes position by position.

    `support`: the part of the stream that predicates leave, where it is less than all of it. `map` lists the tiles
    that they leave, where bounds do not tell; `mapped` is how it does, or why there is none. Where there is a `fill`,
    support and map are of what is not filled: the rest waits until the maxima of rows are known.
    `part` is the grid axis along which each program has a part of the stream. A `short` one is no longer than a tile.
    """

    stream: Axis
    definitions: tuple[Definition, ...]
    outputs: tuple[Output, ...] = ()
    support: Support | None = None
    map: BlockMap | None = None
    mapped: str = ""
    fill: Fill | None = None
    part: Axis | None = None
    short: bool = False

    def definitions_in(self, segment: str) -> tuple[Definition, ...]:
        """As they are in one form of the loop's body."""
        if self.fill is None:
            return self.definitions
        return {"full": self.fill.kept, "filled": self.fill.filled}.get(segment, self.definitions)

    @property
    def has_whole_tiles(self) -> bool:
        """Whether full tiles are those in which every predicate holds: the others are cut by it, or by the end."""
        return self.map is not None or (self.support is not None and self.support.inner is not None)


@dataclass(frozen=True)
class KernelPlan:
    """One kernel. A program of it has one position of every `grid` axis and a tile of `rows`, at most two.

    Streams are cut into tiles, unless `rows` are two: then they go one position at a time. `features` are kept whole
    in a tile, padded to a power of two. `outputs` are written after all sweeps. `others` are tiles that may be faster
    than `config` on a GPU at hand.

    `few` stands in for it where rows are few. `was` has the program's values by those over other axes; it is `grouped`
    where one of those numbers the members of a group.
    """

    name: str
    chain: Chain
    grid: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    sweeps: tuple[Sweep, ...]
    outputs: tuple[Output, ...]
    features: tuple[Axis, ...]
    dots: tuple[Dot, ...]
    loops: tuple[Loop, ...]
    config: Config
    dtype: torch.dtype
    others: tuple[Config, ...] = ()
    few: Few | None = field(default=None, compare=False)
    was: Mapping[Node, Node] = field(default_factory=dict, compare=False)
    grouped: bool = False

    def padded(self, axis: Axis) -> int:
        return padded(axis)

    @property
    def sizes(self) -> dict[Axis, int]:
        """Positions of every tile axis that one tile has."""
        sizes = dict.fromkeys(self.rows[:1], self.config.block_m) | dict.fromkeys(self.rows[1:], self.config.block_n)
        sizes |= {} if self.steps else dict.fromkeys(self.streams, self.config.block_n)
        distances = self.config.block_m + self.config.block_n - 1
        sizes |= dict.fromkeys((s.axis for s in self.skews), 1 << (distances - 1).bit_length())
        return sizes | {a: self.padded(a) for a in self.features} | dict.fromkeys(self.long_axes, LONG_BLOCK)

    @property
    def streams(self) -> tuple[Axis, ...]:
        return tuple(dict.fromkeys(s.stream for s in self.sweeps))

    @property
    def maps(self) -> tuple[BlockMap, ...]:
        """The block maps that are made before this kernel: sweeps under the same masks share one."""
        return tuple(dict.fromkeys(s.map for s in self.sweeps if s.map))

    @property
    def steps(self) -> bool:
        """Whether streams go one position at a time."""
        return len(self.rows) > 1

    @property
    def grows(self) -> bool:
        """Whether later tiles of rows have more to do, as under a causal mask: they start first."""
        ends = [s.support.outer for s in self.sweeps if s.support]
        rows = self.rows[0] if self.rows else None
        return any(e.upper and rows in e.upper.free and not (e.lower and rows in e.lower.free) for e in ends)

    @property
    def is_band(self) -> bool:
        """Whether masks leave narrow bands of all streams: most tiles are cut by their edges."""
        ends = [s.support.outer if s.support else Interval() for s in self.sweeps]
        if not ends or any(e.lower is None or e.upper is None for e in ends):
            return False
        widths = [from_poly(plus(to_poly(e.upper), to_poly(e.lower), -1)) for e in ends]
        return all(isinstance(w, Const) and w.value <= NARROW_BAND for w in widths)

    @property
    def pipelines_cut(self) -> bool:
        """Whether loads of tiles that masks cut are pipelined: where there are many, and where each has much to load (of
        two tiles of 64 features a pipeline was slower, of 128 faster, on an H200).
        """
        return self.is_band or any(padded(a) > NARROW for a in self.features)

    @property
    def skews(self) -> tuple[Skew, ...]:
        """Distances that contractions are made for."""
        return tuple(dict.fromkeys(d.skew for d in self.dots if d.skew))

    @property
    def long_axes(self) -> tuple[Axis, ...]:
        """Contracted axes that are cut into blocks."""
        return tuple(dict.fromkeys(d.axis for d in self.dots if d.long))

    @property
    def unrolled_axes(self) -> frozenset[Axis]:
        """Those whose lengths a kernel is compiled for, and the strides along them."""
        return frozenset(r.axis for r in self.loops if r.unrolled)

    @property
    def aligns(self) -> bool:
        """Whether strides are passed in units of ALIGN elements: a stride of 40 is a multiple of 8, but Triton only
        asks for 16, and without knowing either loads one element at a time.
        """
        return any(int(a.extent.value) % 16 for a in self.features)

    def segments(self, sweep: Sweep) -> tuple[str, ...]:
        """Forms of a loop's body: 'full' tiles, and a 'tail' where the stream may not fill its last tile, or predicates
        cut tiles; 'filled' ones in which nothing is left beside fills.
        """
        extent = sweep.stream.extent
        if self.steps:
            return ("full",)
        if sweep.short:
            return ("tail",)
        if sweep.has_whole_tiles or not isinstance(extent, Const):
            return ("full", "tail", *(["filled"] if sweep.fill else []))
        full, rest = divmod(int(extent.value), self.config.block_n)
        return (("full",) if full else ()) + (("tail",) if rest else ())

    @property
    def tile_axes(self) -> tuple[Axis, ...]:
        """In the order of a tile's dimensions."""
        streams = () if self.steps else self.streams
        return (*self.rows, *streams, *(s.axis for s in self.skews), *self.features, *self.long_axes)


@dataclass(frozen=True)
class Few:
    """What computes the same where rows are few.

    The first of its `kernels` leaves the `states` of parts of the stream, numbered along `axis`; the second merges
    them; a third writes what is as long as the stream, and reads their `results`. It is for fewer than `rows` rows of
    more than `least` positions, which a part has at least. As many parts make `programs`, which run at once, or, where
    there are more without, `waves`.
    """

    kernels: tuple[KernelPlan, ...]
    states: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    axis: Axis
    rows: int
    least: int
    programs: int
    waves: int

    @property
    def part(self) -> KernelPlan:
        return self.kernels[0]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a chain: its kernels, what each costs, what they hand on, and why it was chosen or not.

    `apart` says why there are more kernels than the fewest, if there are.
    """

    kernels: tuple[KernelPlan, ...]
    costs: tuple[KernelCost, ...]
    results: tuple[Tensor, ...] = ()
    reason: str = ""
    apart: str = ""

    @property
    def seconds(self) -> float:
        return sum(c.seconds for c in self.costs)

    @property
    def excess(self) -> float:
        return max(c.excess for c in self.costs)

    @property
    def portable(self) -> bool:
        return all(c.portable for c in self.costs)


@dataclass(frozen=True)
class ChainPlan:
    """The kernels of a chain, in the order they run. `results` are what one writes for those after it, row by row.

    `candidates` are what was considered: the one that was chosen, then the others, best first.
    """

    name: str
    chain: Chain
    kernels: tuple[KernelPlan, ...]
    results: tuple[Tensor, ...] = ()
    candidates: tuple[Candidate, ...] = field(default=(), compare=False)

    @property
    def sweeps(self) -> int:
        return sum(len(k.sweeps) for k in self.kernels)

    @property
    def few(self) -> tuple[Few, ...]:
        return tuple(k.few for k in self.kernels if k.few)

    @property
    def written(self) -> tuple[KernelPlan, ...]:
        """All kernels, those for few rows after the one they stand in for."""
        return tuple(w for k in self.kernels for w in (k, *(k.few.kernels if k.few else ())))


def padded(axis: Axis) -> int:
    """The power of two, at least 16 (what `tl.dot` takes), that holds a feature axis."""
    assert isinstance(axis.extent, Const)
    return max(16, 1 << (int(axis.extent.value) - 1).bit_length())
