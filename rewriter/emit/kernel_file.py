"""One kernel file: header, constants, kernel, launch, eager reference, all as values a template lays out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from rewriter.emit.expr import NotEmittable
from rewriter.emit.few import STANDING_IN, FewView
from rewriter.emit.maps import MapView
from rewriter.emit.names import Names, size_text
from rewriter.emit.origins import Origins
from rewriter.emit.reference import reference_of
from rewriter.emit.render import render
from rewriter.emit.scope import Line
from rewriter.emit.shapes import allocated, kept, strides_text, tuple_text
from rewriter.emit.signature import kernel_signature
from rewriter.emit.values import Descriptor
from rewriter.emit.writer import Writer
from rewriter.ir import Axis, Const, Node, Output, Param, Tensor, walk
from rewriter.ir.printer import show, show_output
from rewriter.lift import Region
from rewriter.plan import ChainPlan, Config, KernelPlan, Sweep
from rewriter.trace.sizes import renamed

NAMESPACE = "flashlight"
TMA = "TMA"


@dataclass(frozen=True)
class Argument:
    """A tensor argument of the launch function."""

    name: str
    shape: str
    dtype: str
    doc: str


@dataclass(frozen=True)
class Entry:
    """A kernel of a file: its function's name, and its parameters' Triton types, for compiling it without a GPU.

    `config` names what it is launched with in the file, or `values` are that. `instead`: the functions that run in its
    place where rows are few. `flags`: its parameters that are true where a GPU loads boxes. `likely` are numbers that a
    launch settles and it is compiled for.
    """

    function: str
    config: str
    signature: dict[str, str]
    values: dict[str, int] | None = None
    instead: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    likely: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelFile:
    """The emitted text and what the patched module needs to call it."""

    name: str
    text: str
    tensors: tuple[Tensor, ...]
    sizes: tuple[Param, ...]
    plan: ChainPlan
    entries: tuple[Entry, ...]


def emit_kernel(region: Region, plan: ChainPlan, source: Source) -> KernelFile:
    """The file of a chain's kernels. Raises NotEmittable where a plan does not fit Triton's tiles."""
    names = Names(plan, region.display)
    several = len(plan.kernels) > 1
    kernels = [_KernelView(k, names, f"CONFIGS_{n + 1}" if several else "CONFIGS") for n, k in enumerate(plan.kernels)]
    view = _FileView(plan, names, kernels, region, source)
    text = render("kernel.py.jinja", **view.values())
    inputs = tuple(view.inputs)
    entries = tuple(e for k in view.written for e in k.entries(view.innermost()))
    return KernelFile(plan.name, text, inputs, tuple(view.passed_sizes), plan, entries)


@dataclass(frozen=True)
class Source:
    """What the header says about the user's code."""

    title: str
    lines: str
    digest: str
    command: str


class _KernelView:
    """Everything the template shows of one kernel, and of those that stand in for it where rows are few."""

    def __init__(self, plan: KernelPlan, names: Names, config_name: str):
        self.few = plan.few and FewView(plan, names, config_name, _KernelView)
        self.is_few = config_name.endswith(STANDING_IN)
        self.plan, self.names, self.config_name = plan, names.for_kernel(), config_name
        origins, several = Origins(plan.chain.origins, plan.was), len(plan.maps) > 1
        numbers = {m: k + 1 if several else 0 for k, m in enumerate(plan.maps)}
        self.maps = {m: MapView(plan, m, self.names, origins, k) for m, k in numbers.items()}
        self.writer = Writer(plan, self.names, origins)
        self.writer.write()
        loads = dict.fromkeys(t.name for t in plan.chain.tensors)
        self.tensors = {t: n for t, n in names.tensors.items() if t.name in loads}
        self.outputs = {o.name: names.outputs[o.name] for o in plan.chain.outputs}
        self.boxes = [self.writer.described(box) for box in self.writer.boxes]
        self.pointers = {t: n for t, n in self.tensors.items() if n in self.writer.pointed or not self.boxes}

    def values(self) -> dict[str, object]:
        plan, names, writer = self.plan, self.names, self.writer
        rows = [self._tile(a) for a in plan.rows]
        places = [(len(self.pointers) + k, self._sizes_of(b)) for k, b in enumerate(self.boxes)]
        return {
            "name": plan.name,
            "config_name": self.config_name,
            "configs": [(self._blocks(c), c) for c in (plan.config, *plan.others)],
            "extents": self._extents(),
            "label": repr(plan.name),
            "params": self._params(),
            "boxes": self.boxes,
            "rows": rows,
            "maps": [m.values() for m in self.maps.values()],
            "boxes_of": self._boxes_of(),
            "grows": plan.grows,
            "pipelines_cut": plan.pipelines_cut,
            "grid": [self.text(a.extent) for a in plan.grid],
            "grid_decode": [(names.axes[a], self._extent_name(a)) for a in reversed(plan.grid)],
            "offsets": [names.axes[a] for a in plan.features if a in writer.needs_offsets],
            "does": self._does(),
            "prologue": commented(writer.prologue.lines),
            "sweeps": [self._sweep(k) for k in range(len(plan.sweeps))],
            "epilogue": commented(writer.epilogue.lines) if plan.sweeps else [],
            "aligned": [text for stride, text in writer.strides.items() if stride in writer.aligned],
            "aligns": plan.aligns,
            "numbers": self._numbers(),
            "tensors": [*self.pointers.values(), *(b.name for b in self.boxes), *self.outputs.values()],
            "passed": [*self.pointers.values(), *(b.seen for b in self.boxes), *self.outputs.values()],
            "boxed": [p for p, b in zip(places, self.boxes) if not b.flag],
            "pairs": [p for p, b in zip(places, self.boxes) if b.flag],
            "programs": self.programs("config", plan.grid),
            "few": self.few and self.few.values(),
        }

    def _boxes_of(self) -> dict[str, str]:
        """Tensors that it is passed as boxes alone, as maps read them: in the order of their own dimensions."""
        found = {}
        for box, passed in zip(self.writer.boxes, self.boxes):
            own = tuple(sorted(range(len(box.order)), key=box.order.__getitem__))
            moved = "" if passed.seen == self.tensors[box.tensor] else f".permute{own}"
            found[self.tensors[box.tensor]] = f"{passed.name}{moved}"
        return {name: text for name, text in found.items() if name not in self.pointers.values()}

    @property
    def helpers(self) -> set[str]:
        return self.writer.helpers.union(*(m.writer.helpers for m in self.maps.values()))

    def text(self, node: Node) -> str:
        return size_text(node, self.names)

    def _tile(self, axis: Axis) -> dict[str, str]:
        return {"name": self.names.axes[axis], "extent": self.text(axis.extent)}

    def _does(self) -> str:
        """One program's work, for the docstring."""
        names, plan = self.names.axes, self.plan
        rows = " x ".join(f"BLOCK_{names[a].upper()}" for a in plan.rows)
        several = f"{rows} {'rows' if len(plan.rows) == 1 else 'positions'}"
        what = several if rows else "one row" if plan.grid else "everything"
        sweeps = len(plan.sweeps)
        along = " and ".join(dict.fromkeys(names[s.stream] for s in plan.sweeps))
        times = "" if sweeps < 2 else f", {'twice' if sweeps == 2 else f'{sweeps} times'}"
        if sweeps and plan.sweeps[0].part:
            return f"One program: {what}, one part of {along}, and what it leaves."
        if sweeps and plan.sweeps[0].short:
            return f"One program: {what}, what all parts have left, merged as in the loop over a part."
        return f"One program: {what}" + (f", all of {along}{times}." if sweeps else ".")

    def _sweep(self, k: int) -> dict[str, object]:
        sweep = self.plan.sweeps[k]
        return {
            "stream": self.names.axes[sweep.stream],
            "extent": self.text(sweep.stream.extent),
            "steps": self.plan.steps,
            "span": self.writer.spans[k],
            "map": self._map_of(sweep),
            "low": self.writer.low[k],
            "short": sweep.short,
            "part": bool(sweep.part),
            "is_new": k == 0 or not self._has_full(self.plan.sweeps[k - 1], sweep),
            "before": commented(self.writer.before[k].lines) if k else [],
            "initial": self.writer.initial(sweep),
            "segments": {name: commented(lines) for name, lines in self.writer.segments[k].items()},
        }

    def _map_of(self, sweep: Sweep) -> dict[str, str] | None:
        """Where a program finds its lists: that of its rows, at its positions of the grid axes that the map has."""
        if sweep.map is None:
            return None
        found = self.maps[sweep.map]
        block = "blocks - 1 - pid % blocks" if self.plan.grows else "pid % blocks"
        return {
            "name": found.name,
            "kernel": found.kernels[-1].function,
            "at": found.at(block),
            "lists": sweep.map.lists,
        }

    def _has_full(self, before: Sweep, sweep: Sweep) -> bool:
        """Whether the loop before has computed where the stream's full tiles end."""
        return before.stream == sweep.stream and not before.has_whole_tiles

    def _blocks(self, config: Config) -> list[tuple[str, int]]:
        sizes = replace(self.plan, config=config).sizes
        return [(f"BLOCK_{self.names.axes[a].upper()}", size) for a, size in sizes.items()]

    def _extents(self) -> list[str]:
        """The lengths on which it depends how fast a config is."""
        axes = (*self.plan.rows, *self.plan.grid, *self.plan.streams)
        return list(dict.fromkeys(self.text(a.extent) for a in axes if not isinstance(a.extent, Const)))

    def _params(self) -> list[str]:
        params = [f"{n}_ptr" for n in self.pointers.values()] + [b.name for b in self.boxes]
        params += [f"{n}_ptr" for n in (*self.outputs.values(), *self._map_names())]
        params += [f"{n}: tl.constexpr" if n in self.fixed else n for n in (*self.writer.strides, *self.sizes.values())]
        params += ["ALIGN: tl.constexpr"] if self.plan.aligns else []
        params += [f"{flag}: tl.constexpr" for flag in self.flags]
        return params + [f"{name}: tl.constexpr" for name, _ in self._blocks(self.plan.config)]

    def _map_names(self) -> list[str]:
        return [m.name for m in self.maps.values()]

    @property
    def sizes(self) -> dict[Node, str]:
        """What is passed to it: of sizes of kernels for few rows its own."""
        plan, own = self.plan, self.names.own
        its = {a.extent for a in (*plan.grid, *plan.rows, *plan.chain.axes)} if self.is_few else set()
        return {n: name for n, name in self.names.sizes.items() if n not in own or n in its}

    @property
    def fixed(self) -> set[str]:
        """Numbers that it is compiled for: how long loops are that it has written out, and strides along them."""
        return {name for n, name in self.sizes.items() if n in self._unrolled()} | self.writer.unrolled

    def _unrolled(self) -> set[Node]:
        return {a.extent for a in self.plan.unrolled_axes}

    def _extent_name(self, axis: Axis) -> str:
        return self.names.axes[axis].upper() if isinstance(axis.extent, Const) else self.text(axis.extent)

    def programs(self, config: str, grid: tuple[Axis, ...]) -> str:
        """How many run: one for each tile of rows and each position of the grid."""
        blocks = {a: f'{config}["BLOCK_{self.names.axes[a].upper()}"]' for a in self.plan.rows}
        tiles = [f"triton.cdiv({self.text(a.extent)}, {block})" for a, block in blocks.items()]
        return " * ".join([*tiles, *(f"({self.text(a.extent)})" for a in grid)]) or "1"

    def _numbers(self) -> str:
        """What it is passed after its tensors. Other kernels of the file may have other strides by the same names."""
        has_tma = f"has_tma({self.boxes[0].name}.device)" if self.boxes else ""
        is_box = [f"{has_tma} and lies_in_rows({b.name})" for b in self.boxes if b.flag]
        is_box = [has_tma, *is_box] if TMA in self.flags else is_box
        sizes = [*self.sizes.values(), *(["align"] if self.plan.aligns else [])]
        numbers = [*strides_text(self.writer.strides, self.writer.aligned), *sizes, *is_box]
        return tuple_text(numbers) if numbers else ""

    @property
    def flags(self) -> list[str]:
        """Parameters that say how tensors are loaded."""
        of_pairs = [b.flag for b in self.boxes if b.flag]
        return of_pairs if len(of_pairs) == len(self.boxes) else [TMA, *of_pairs]

    def _sizes_of(self, box: Descriptor) -> str:
        return tuple_text([f'config["{s}"]' if s.startswith("BLOCK") else s for s in box.sizes])

    def entries(self, innermost: Mapping[str, int]) -> list[Entry]:
        """Those of the maps, then its own."""
        of_maps = [k for m in self.maps.values() for k in m.kernels]
        signature = kernel_signature(
            self.pointers, self.boxes, self.writer.strides, self.plan.chain.outputs, self.outputs, self.sizes
        ) | {f"{name}_ptr": "*i32" for name in self._map_names()}
        signature = {name: kind for name, kind in signature.items() if name not in self.fixed}
        likely = (
            self._dense(innermost) | ({"ALIGN": 8} if self.plan.aligns else {}) | dict.fromkeys(sorted(self.fixed), 4)
        )
        own = Entry(
            f"{self.plan.name}_kernel", self.config_name, signature, None, self._instead(), tuple(self.flags), likely
        )
        return [*(Entry(k.function, "", k.signature, k.values, self._instead()) for k in of_maps), own]

    def _dense(self, innermost: Mapping[str, int]) -> dict[str, int]:
        """Strides that are 1 where tensors lie as in the example; what is not in `innermost` lies row by row."""
        dense = {f"{name}.stride({tensor.lanes})" for tensor, name in self.pointers.items()}
        dense |= {
            f"{self.outputs[o.name]}.stride({innermost.get(o.name, len(o.axes) - 1)})" for o in self.plan.chain.outputs
        }
        return {stride: 1 for stride, text in self.writer.strides.items() if text in dense}

    def _instead(self) -> tuple[str, ...]:
        return tuple(f"{k.name}_kernel" for k in self.plan.few.kernels) if self.plan.few else ()


class _FileView:
    """Everything the kernel template shows beside the kernels."""

    def __init__(self, plan: ChainPlan, names: Names, kernels: list[_KernelView], region: Region, source: Source):
        self.plan, self.names, self.kernels, self.region, self.source = plan, names, kernels, region, source
        self.chain = plan.chain
        made = {*plan.results, *(t for f in plan.few for t in (*f.states, *f.results))}
        self.inputs = {t: n for t, n in names.tensors.items() if t not in made}
        self.written = [w for k in kernels for w in (k, *(k.few.kernels if k.few else ()))]
        self.known_sizes, self.passed_sizes = self._size_sources()

    def _size_sources(self) -> tuple[dict[Node, str], list[Param]]:
        """Where each named size is read off a tensor's shape, and the sizes the caller must pass."""
        shapes: dict[Node, str] = {}
        for tensor, name in self.inputs.items():
            for k, extent in enumerate(tensor.given or tensor.shape):
                shapes.setdefault(extent, f"{name}.shape[{k}]")
        sizes = [n for n in self.names.sizes if n not in self.names.own]
        known = {n: shapes[n] for n in sizes if n in shapes}
        passed = [n for n in sizes if n not in known and isinstance(n, Param)]
        for node in sizes:
            if node not in known and node not in passed:
                parts = [p for p in walk(node) if isinstance(p, Param) and p not in known and p not in passed]
                passed += [p for p in parts if p not in self.names.sizes]
                known[node] = renamed(show(node), self._size_names())
        return known, passed

    def _size_names(self) -> dict[str, str]:
        return {p.name: n for p, n in self.names.sizes.items() if isinstance(p, Param)}

    def values(self) -> dict[str, object]:
        names = self.names
        kernels = [k.values() for k in self.kernels]
        return {
            "source": self.source,
            "name": self.plan.name,
            "namespace": NAMESPACE,
            "math": self._math(),
            "derivation": [*map(self._with_state, self.chain.derivation), *self._apart()],
            "sweeps": self.plan.sweeps,
            "fixed": self._fixed(),
            "dynamic": [
                f"{name} ({self.known_sizes.get(p, 'passed')})" for p, name in names.sizes.items() if p not in names.own
            ],
            "constants": self._constants(),
            "helpers": sorted(set().union(*(k.helpers for k in self.written))),
            "kernels": kernels,
            "written": [k.values() for k in self.written],
            "streams": self._dynamic_streams(),
            "aligned": any(k.writer.aligned for k in self.written),
            "has_boxes": any(k.boxes for k in self.written),
            "has_pairs": any(b.flag for k in self.written for b in k.boxes),
            "has_maps": any(k.maps for k in self.written),
            "has_parts": any(k.few for k in self.written),
            "tunes": any(k.plan.others for k in self.written),
            "arguments": self._arguments(),
            "sizes": [(names.sizes[p], e) for p, e in self.known_sizes.items()],
            "passed_sizes": [names.sizes.get(p, p.name) for p in self.passed_sizes],
            "seen": [(n, tuple_text([self.text(e) for e in t.shape])) for t, n in self.inputs.items() if t.given],
            "results": [self._result(t) for t in self.plan.results],
            "outputs": [self._output(o, names.outputs[o.name], node) for o, node in self._written_as()],
            "reference": reference_of(self.region, names, self.known_sizes),
        }

    def text(self, node: Node) -> str:
        return size_text(node, self.names)

    def _dynamic_streams(self) -> list[str]:
        streams = dict.fromkeys(a.extent for k in self.plan.kernels for a in k.streams)
        return [self.text(e) for e in streams if not isinstance(e, Const)]

    def _math(self) -> list[str]:
        """Index notation with the names of this file."""
        lines = [d.show(self.names.axes) for d in self.chain.definitions]
        lines += [show_output(o, self.names.axes) for o in self.chain.outputs]
        table = {t.name: n for t, n in self.inputs.items()} | self.names.state | self._size_names()
        contracted = [d.axis for k in self.plan.kernels for d in k.dots[:1]]
        table |= {"r0_0": self.names.axes[a] for a in contracted[:1]}
        return [renamed(line, table) for line in lines]

    def _apart(self) -> list[str]:
        """Why one sweep became several, in kernels of their own."""
        apart = self.plan.candidates[0].apart if self.plan.candidates else ""
        lines = [f"kernels: {len(self.plan.kernels)}, since {apart} (estimated)"] if apart else []
        return lines + (["split: few rows take parts of the stream, merged by the same T"] if self.plan.few else [])

    def _with_state(self, line: str) -> str:
        """Prose, with the running state called as in this file."""
        return renamed(line, self.names.state)

    def _fixed(self) -> list[str]:
        axes = dict.fromkeys(a for a in self.names.axes if isinstance(a.extent, Const))
        return [f"{self.names.axes[a].upper()} = {a.extent.value}" for a in axes]

    def _constants(self) -> list[tuple[str, str]]:
        lines = [line.code for k in self.written for line in k.writer.every_line()]
        out = []
        if any("NEG_INF" in code for code in lines):
            out.append(("NEG_INF", 'float("-inf")'))
        if any("LOWEST" in code for code in lines):
            out.append(("LOWEST", repr(torch.finfo(torch.float32).min)))
        if any("POS_INF" in code for code in lines):
            out.append(("POS_INF", 'float("inf")'))
        if any("LOG2E" in code for code in lines):
            out.append(("LOG2E", repr(math.log2(math.e))))
        if any("fast_tanh" in code for code in lines):
            out.append(("ON_NVIDIA", "torch.version.hip is None and not triton.knobs.runtime.interpret"))
        if any(s.fill for k in self.plan.written for s in k.sweeps):
            out.append(("UNDERFLOW", "104.0"))
        grid = dict.fromkeys(a for k in self.plan.written for a in k.grid if isinstance(a.extent, Const))
        return out + [(self.names.axes[a].upper(), str(a.extent.value)) for a in grid]

    def _arguments(self) -> list[Argument]:
        return [
            Argument(
                n,
                tuple_text([self.text(e) for e in t.given or t.shape]),
                str(t.dtype),
                _axes_doc(t),
            )
            for t, n in self.inputs.items()
        ]

    def _result(self, tensor: Tensor) -> dict[str, str]:
        return kept(tensor, self.names, self._first())

    def _output(self, output: Output, name: str, node: fx.Node) -> dict[str, str]:
        """Shape and allocation; dimensions lie in memory as eager lays them out, so that a `.view` after it still
        works.
        """
        extents, order = [self.text(a.extent) for a in output.axes], _order(output, node)
        laid = tuple_text([extents[d] for d in order])
        made = allocated(self._first(), self.names, laid, output.dtype)
        if order != sorted(order):
            made += f".permute({', '.join(str(order.index(d)) for d in range(len(order)))})"
        shape = tuple_text([self.text(e) for e in output.shape] or extents)
        view = f".view({shape})" if output.shape else ""
        return {"name": name, "shape": shape, "dtype": str(output.dtype), "made": made, "view": view}

    def _written_as(self) -> list[tuple[Output, fx.Node]]:
        """What is written, and what of the traced graph it is."""
        nodes = {o.name: n for o, n in zip(self.region.program.outputs, self.region.outputs)}
        return [(o, nodes[o.name]) for o in self.chain.outputs]

    def innermost(self) -> dict[str, int]:
        """By the names of outputs, the dimension along which they are dense."""
        orders = {o.name: _order(o, node) for o, node in self._written_as()}
        return {name: order[-1] for name, order in orders.items() if order}

    def _first(self) -> Tensor:
        return next(iter(self.inputs))


def _order(output: Output, node: fx.Node) -> list[int]:
    """The axes of an output from the outermost to the innermost in memory, where eager has them."""
    order = memory_order(node.meta["val"])
    if not output.shape:
        return order
    if order != sorted(order):
        raise NotEmittable("what is written does not lie in memory as its rows do")
    return list(range(len(output.axes)))


def memory_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost in memory."""
    strides = [_typical(s) for s in value.stride()]
    return sorted(range(value.dim()), key=lambda d: (-strides[d], d))


def _typical(size: torch.SymInt | int) -> int:
    """A size as a number: the traced one, or any where tracing kept none."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return int(hint) if hint is not None else int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, 64)))


def _axes_doc(tensor: Tensor) -> str:
    return ", ".join(show(s) for s in tensor.given or tensor.shape)


def commented(lines: list[Line]) -> list[Line]:
    """Drops a user's line that is the same as the one before."""
    out, last = [], ""
    for line in lines:
        out.append(Line(line.code, line.shape, line.source if line.source != last else ""))
        last = line.source or last
    return out
