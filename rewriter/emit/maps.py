"""Block maps in a kernel file: kernels that run before a kernel and list for it the tiles that masks leave."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from rewriter.emit.expr import ATOM, Text, operand
from rewriter.emit.names import Names, size_text
from rewriter.emit.origins import Origins
from rewriter.emit.scope import Scope
from rewriter.emit.shapes import strides_text, tuple_text
from rewriter.emit.signature import POINTER
from rewriter.emit.values import Values
from rewriter.ir import Apply, Axis, Index, Load, Node, walk
from rewriter.plan import BlockMap, KernelPlan, Sweep
from rewriter.sparsity import GREATEST, LEAST

AT_ONCE = 4096  # stream positions whose ranges a program takes together
LISTED = 256  # tiles that a program lists together
FOLD = {LEAST: "min", GREATEST: "max"}


class MapWriter(Values):
    """Writes whether a predicate holds anywhere in a tile, and whether everywhere: `some` and `every`.

    Told by ranges, that is for several tiles of a stream together; else for one.
    """

    def __init__(self, kernel: KernelPlan, found: BlockMap, names: Names, origins: Origins):
        self.found = found
        self.tile_axis = Axis("tile", found.stream.extent)
        super().__init__(_plan_of(kernel, found), names, origins)
        self.loop = Scope(self.prologue, found.stream)
        ways = found.ranges or found
        self.some, self.every = self._told(ways.some, "max"), self._told(ways.every, "min")

    def _told(self, node: Node, fold: str) -> str:
        """By ranges for each of several tiles; else a number, 0 or 1, for one."""
        text = self.value(node, self.loop)
        if self.found.ranges:
            return operand(text, (self.tile_axis,), 5)
        return f"tl.{fold}({text.tight(ATOM)}.to(tl.int32))" if text.axes else f"tl.cast({text.code}, tl.int32)"

    def _compute(self, node: Node, scope: Scope) -> Text:
        if not _is_end(node):
            return super()._compute(node, scope)
        if node.args[0] == Index(self.found.stream):
            return self._end_of_tile(node.op)
        text = self.value(node.args[0], scope)
        of_stream = self.found.stream in text.axes
        is_bool = node.dtype is torch.bool
        code = f"{text.tight(ATOM)}.to(tl.int32)" if is_bool else text.code
        folded = f"tl.{FOLD[node.op]}({code}, {int(of_stream)})"
        return Text(
            f"{folded} != 0" if is_bool else folded, (self.tile_axis,) if of_stream else (), 2 if is_bool else 9
        )

    def _end_of_tile(self, op: str) -> Text:
        """The first or last position of each tile."""
        block = self.block(self.found.stream)
        if op == LEAST:
            return Text(f"tile * {block}", (self.tile_axis,), 6)
        extent = self.value(self.found.stream.extent, self.prologue)
        return Text(f"tl.minimum((tile + 1) * {block}, {extent.code}) - 1", (self.tile_axis,), 5)

    def _deserves_name(self, node: Node, text: Text, home: Scope, scope: Scope) -> bool:
        return _is_end(node) or super()._deserves_name(node, text, home, scope)

    def _default_name(self, node: Node) -> str:
        if not _is_end(node):
            return super()._default_name(node)
        of = node.args[0]
        own = self.names.tensors[of.tensor] if isinstance(of, Load) else ""
        own = self.names.axes[of.axis] if isinstance(of, Index) else own
        return f"{node.op}_{own}" if own else node.op

    def _joined(self, texts: list[Text]) -> tuple[Axis, ...]:
        found = {a for t in texts for a in t.axes}
        return tuple(a for a in (*self.plan.tile_axes, self.tile_axis) if a in found)

    def shape(self, axes: tuple[Axis, ...]) -> str:
        if axes == (self.tile_axis,):
            return "[TILES]"
        return (
            f"[TILES, {self.block(self.found.stream)}]"
            if self.found.ranges and axes == (self.found.stream,)
            else super().shape(axes)
        )

    def is_rough(self, node: Node) -> bool:
        """All is compared in the end."""
        return False

    def _fills(self, axis: Axis, scope: Scope) -> bool:
        """Positions past an end stand for the last one."""
        return True


def _is_end(node: Node) -> bool:
    return isinstance(node, Apply) and node.op in FOLD


def _plan_of(kernel: KernelPlan, found: BlockMap) -> KernelPlan:
    """What of a kernel its map has too: tiles of rows and of the stream, positions of grid axes."""
    chain = replace(kernel.chain, definitions=(), outputs=())
    rows = (found.row,) if found.row else ()
    return replace(
        kernel,
        chain=chain,
        grid=found.grid,
        rows=rows,
        sweeps=(Sweep(found.stream, ()),),
        outputs=(),
        features=(),
        dots=(),
        loops=(),
    )


@dataclass(frozen=True)
class MapKernel:
    """One of the kernels that make a map, its parameters with their Triton types, and what they are at a launch.

    `config`: its sizes, warps and stages, each with its text at a launch, that of the main kernel's `config` at hand.
    `name`: what its launch is called.
    """

    function: str
    name: str
    config: dict[str, tuple[str, int]]
    signature: dict[str, str]
    tensors: tuple[str, ...]
    numbers: str

    @property
    def params(self) -> list[str]:
        return [*self.signature, *(f"{name}: tl.constexpr" for name in self.config if name.isupper())]

    @property
    def values(self) -> dict[str, int]:
        return {name: value for name, (_, value) in self.config.items()}


class MapView:
    """What the template shows of a map. `number` tells it from others of its kernel."""

    def __init__(self, kernel: KernelPlan, found: BlockMap, names: Names, origins: Origins, number: int):
        self.found, self.names = found, names
        self.name = names.unique("tile_map")
        self._number = number or ""
        self._function = f"{kernel.name}_{{}}{self._number}_kernel"
        self.writer = MapWriter(kernel, found, names.for_kernel(), origins)
        self.kernels = self._kernels()

    def values(self) -> dict[str, object]:
        axes, found = self.names.axes, self.found
        return {
            "name": self.name,
            "number": self._number,
            "kernels": self.kernels,
            "rows": [{"name": axes[a], "extent": self._extent(a)} for a in self.writer.plan.rows],
            "stream": {"name": axes[found.stream], "extent": self._extent(found.stream)},
            "grid": [_factor(self._extent(a)) for a in found.grid],
            "grid_decode": [(axes[a], _factor(self._extent(a))) for a in reversed(found.grid)],
            "lists": found.lists,
            "by_ranges": found.ranges is not None,
            "prologue": self.writer.prologue.lines,
            "lines": self.writer.loop.lines,
            "some": self.writer.some,
            "every": self.writer.every,
        }

    def at(self, block: str) -> str:
        """Which list is that of a program of the main kernel, `block` its tile of rows."""
        parts = [(self.names.axes[a], self._extent(a)) for a in self.found.grid]
        parts += [(block, "blocks")] if self.found.row else []
        out = ""
        for name, extent in parts:
            out = f"{_factor(out)} * {_factor(extent)} + {name}" if out else name
        return out

    def _kernels(self) -> tuple[MapKernel, ...]:
        """By ranges one kernel tells tiles and lists them; else one tells tiles and another lists them."""
        names = {self._block(a): size for a, size in self.writer.plan.sizes.items()}
        blocks = {name: (f'config["{name}"]', size) for name, size in names.items()}
        stream = self._block(self.found.stream)
        if self.found.ranges:
            text, step = blocks[stream]
            config = blocks | {"TILES": (f"{AT_ONCE} // {text}", AT_ONCE // step)} | _run_by(8)
            return (self._looking("map", config, self.name, "*i32"),)
        flags = self._looking("flags", blocks | _run_by(8), "flags", "*i8")
        lists = {stream: blocks[stream], "TILES": (str(LISTED), LISTED)} | _run_by(4)
        sizes = self._sizes(self._extent(self.found.stream))
        signature = {"flags_ptr": "*i8", f"{self.name}_ptr": "*i32"} | sizes
        return flags, self._made("map", lists, signature, ["flags", self.name], [*sizes])

    def _looking(self, what: str, config: dict[str, tuple[str, int]], result: str, kind: str) -> MapKernel:
        """The kernel that looks at what the predicates read."""
        read = dict.fromkeys(n.tensor for n in walk(self.found.some, self.found.every) if isinstance(n, Load))
        tensors = {self.names.tensors[t]: POINTER[t.dtype] for t in read}
        strides, sizes = self.writer.strides, self._sizes(*self._texts())
        pointers = {f"{name}_ptr": kind for name, kind in (tensors | {result: kind}).items()}
        signature = pointers | dict.fromkeys(strides, "i32") | sizes
        numbers = [*strides_text(strides, frozenset()), *sizes]
        return self._made(what, config, signature, [*tensors, result], numbers)

    def _made(
        self,
        what: str,
        config: dict[str, tuple[str, int]],
        signature: dict[str, str],
        tensors: list[str],
        numbers: list[str],
    ) -> MapKernel:
        function = self._function.format(what)
        name = f"write_{what}{self._number}"
        return MapKernel(function, name, config, signature, tuple(tensors), tuple_text(numbers) if numbers else "")

    def _texts(self) -> list[str]:
        axes = (*self.writer.plan.rows, self.found.stream, *self.found.grid)
        lines = [*self.writer.prologue.text, *self.writer.loop.text]
        return [*lines, self.writer.some, self.writer.every, *map(self._extent, axes)]

    def _sizes(self, *texts: str) -> dict[str, str]:
        """The sizes that texts mention."""
        words = set(re.findall(r"\w+", " ".join(texts)))
        return {name: "i32" for name in self.names.sizes.values() if name in words}

    def _block(self, axis: Axis) -> str:
        return f"BLOCK_{self.names.axes[axis].upper()}"

    def _extent(self, axis: Axis) -> str:
        return size_text(axis.extent, self.names)


def _run_by(warps: int) -> dict[str, tuple[str, int]]:
    return {"num_warps": (str(warps), warps), "num_stages": ("1", 1)}


def _factor(code: str) -> str:
    return code if code.isidentifier() else f"({code})"
