"""One kernel file: header, constants, kernel, launch, eager reference, all as values a template lays out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx

from rewriter.emit.names import Names
from rewriter.emit.origins import Origins
from rewriter.emit.reference import Reference, reference_of
from rewriter.emit.render import render
from rewriter.emit.writer import Line, Writer
from rewriter.ir import Axis, Const, Load, Node, Output, Param, Tensor, walk
from rewriter.ir.printer import show, show_output
from rewriter.lift import Region
from rewriter.plan import KernelPlan

NAMESPACE = "flashlight"


@dataclass(frozen=True)
class Argument:
    """A tensor argument of the launch function."""

    name: str
    shape: str
    dtype: str
    doc: str


@dataclass(frozen=True)
class KernelFile:
    """The emitted text and what the patched module needs to call it."""

    name: str
    text: str
    tensors: tuple[Tensor, ...]
    sizes: tuple[Param, ...]
    plan: KernelPlan
    signature: dict[str, str] = field(default_factory=dict)


def emit_kernel(region: Region, plan: KernelPlan, source: "Source") -> KernelFile:
    """Raises NotEmittable where the plan does not fit Triton's tiles."""
    names = Names(plan, region.display)
    writer = Writer(plan, names, Origins(plan.chain.origins))
    writer.write()
    view = _View(plan, names, writer, region, source)
    text = render("kernel.py.jinja", **view.values())
    return KernelFile(plan.name, text, tuple(names.tensors), tuple(view.passed_sizes), plan, view.signature())


@dataclass(frozen=True)
class Source:
    """What the header says about the user's code."""

    title: str
    lines: str
    digest: str
    command: str


class _View:
    """Everything the kernel template shows."""

    def __init__(self, plan: KernelPlan, names: Names, writer: Writer, region: Region, source: Source):
        self.plan, self.names, self.writer, self.region, self.source = plan, names, writer, region, source
        self.chain = plan.chain
        self.known_sizes, self.passed_sizes = self._size_sources()

    def _size_sources(self) -> tuple[dict[Node, str], list[Param]]:
        """Where each named size is read off a tensor's shape, and the sizes the caller must pass."""
        shapes: dict[Node, str] = {}
        for tensor, name in self.names.tensors.items():
            for k, extent in enumerate(tensor.shape):
                shapes.setdefault(extent, f"{name}.shape[{k}]")
        known = {n: shapes[n] for n in self.names.sizes if n in shapes}
        passed = [n for n in self.names.sizes if n not in known and isinstance(n, Param)]
        for node in self.names.sizes:
            if node not in known and node not in passed:
                parts = [p for p in walk(node) if isinstance(p, Param) and p not in known and p not in passed]
                passed += [p for p in parts if p not in self.names.sizes]
                known[node] = show(node)
        return known, passed

    def values(self) -> dict[str, object]:
        plan, names = self.plan, self.names
        return {
            "source": self.source,
            "name": plan.name,
            "namespace": NAMESPACE,
            "math": self._math(),
            "derivation": [self._with_state(line) for line in self.chain.derivation],
            "fixed": self._fixed(),
            "dynamic": [f"{name} ({self.known_sizes.get(p, 'passed')})" for p, name in names.sizes.items()],
            "constants": self._constants(),
            "helpers": sorted(self.writer.helpers),
            "kernel_params": self._kernel_params(),
            "grid": self._grid(),
            "grid_decode": self._grid_decode(),
            "row": names.axes[plan.row],
            "stream": names.axes[plan.stream],
            "row_extent": self.text(plan.row.extent),
            "stream_extent": self.text(plan.stream.extent),
            "offsets": [names.axes[a] for a in plan.features if a in self.writer.needs_offsets],
            "initial": self.writer.initial(),
            "prologue": _commented(self.writer.prologue.lines),
            "segments": {k: _commented(v) for k, v in self.writer.segments.items()},
            "epilogue": _commented(self.writer.epilogue.lines),
            "config": plan.config,
            "arguments": self._arguments(),
            "sizes": [(names.sizes[p], e) for p, e in self.known_sizes.items()],
            "passed_sizes": [names.sizes.get(p, p.name) for p in self.passed_sizes],
            "outputs": [self._output(*o) for o in zip(self.chain.outputs, names.outputs, self._nodes())],
            "launch": self._launch(),
            "aligned": [text for stride, text in self.writer.strides.items() if stride in self.writer.aligned],
            "blocks": [(f"BLOCK_{names.axes[a].upper()}", plan.padded(a)) for a in plan.features],
            "reference": self._reference(),
        }

    def text(self, node: Node) -> str:
        return self.writer.value(node, self.writer.prologue).code

    def _axis_names(self) -> dict[Axis, str]:
        return self.names.axes

    def _nodes(self) -> list[fx.Node]:
        """The graph node of each output of the chain."""
        by_axes = dict(zip((o.name for o in self.region.program.outputs), self.region.outputs))
        return [by_axes[o.name] for o in self.chain.outputs]

    def _math(self) -> list[str]:
        tensors = self.names
        lines = [d.show(self.plan.stream, tensors.axes) for d in self.chain.definitions]
        lines += [show_output(o, tensors.axes) for o in self.chain.outputs]
        return [self._renamed(line) for line in lines]

    def _with_state(self, line: str) -> str:
        """Prose, with the running state called as in this file."""
        import re

        return re.sub(r"\w+", lambda m: self.names.state.get(m[0], m[0]), line)

    def _renamed(self, line: str) -> str:
        """Index notation with the names of this file."""
        import re

        table = {t.name: n for t, n in self.names.tensors.items()}
        table |= self.names.state | {p.name: n for p, n in self.names.sizes.items() if isinstance(p, Param)}
        table |= {f"r{k}_0": self.names.axes[a] for k, a in enumerate(d.axis for d in self.plan.dots[:1])}
        return re.sub(r"[A-Za-z_]\w*", lambda m: table.get(m[0], m[0]), line)

    def _fixed(self) -> list[str]:
        axes = [*self.plan.grid, self.plan.row, self.plan.stream, *self.plan.features]
        return [
            f"{self.names.axes[a].upper()} = {a.extent.value}" for a in axes if isinstance(a.extent, Const)
        ]

    def _constants(self) -> list[tuple[str, str]]:
        out = [("NEG_INF", 'float("-inf")')]
        if any("LOG2E" in line.code for lines in self.writer.segments.values() for line in lines):
            out.append(("LOG2E", repr(math.log2(math.e))))
        for axis in self.plan.grid:
            if isinstance(axis.extent, Const):
                out.append((self.names.axes[axis].upper(), str(axis.extent.value)))
        return out

    def _kernel_params(self) -> list[str]:
        params = [f"{n}_ptr" for n in (*self.names.tensors.values(), *self.names.outputs)]
        params += [*self.writer.strides, *self.names.sizes.values()]
        blocks = [self.plan.row, self.plan.stream, *self.plan.features]
        params += ["ALIGN: tl.constexpr"] if self.plan.aligns else []
        return params + [f"BLOCK_{self.names.axes[a].upper()}: tl.constexpr" for a in blocks]

    def _grid(self) -> list[str]:
        return [self.text(a.extent) for a in self.plan.grid]

    def _grid_decode(self) -> list[tuple[str, str]]:
        """(axis, extent) from the fastest to the slowest."""
        return [(self.names.axes[a], self._extent_name(a)) for a in reversed(self.plan.grid)]

    def _extent_name(self, axis: Axis) -> str:
        return self.names.axes[axis].upper() if isinstance(axis.extent, Const) else self.text(axis.extent)

    def _arguments(self) -> list[Argument]:
        return [
            Argument(
                n,
                f"({', '.join(map(self.text, t.shape))}{',' * (len(t.shape) == 1)})",
                str(t.dtype),
                _axes_doc(t),
            )
            for t, n in self.names.tensors.items()
        ]

    def _output(self, output: Output, name: str, node: fx.Node) -> dict[str, str]:
        """Shape and allocation; dimensions lie in memory as eager lays them out, so that a `.view` after it still works."""
        extents = [self.text(a.extent) for a in output.axes]
        order = memory_order(node.meta["val"])
        made = f"torch.empty({_tuple([extents[d] for d in order])}, device={self._first()}.device, dtype={output.dtype})"
        if order != sorted(order):
            made += f".permute({', '.join(str(order.index(d)) for d in range(len(order)))})"
        return {"name": name, "shape": _tuple(extents), "dtype": str(output.dtype), "made": made}

    def _first(self) -> str:
        return next(iter(self.names.tensors.values()))

    def _launch(self) -> list[str]:
        units = {s: " // align" if s in self.writer.aligned else "" for s in self.writer.strides}
        args = [*self.names.tensors.values(), *self.names.outputs]
        args += [f"{text}{units[stride]}" for stride, text in self.writer.strides.items()]
        return args + list(self.names.sizes.values()) + (["ALIGN=align"] if self.plan.aligns else [])

    def _reference(self) -> Reference:
        return reference_of(self.region, self.names, self.known_sizes)

    def signature(self) -> dict[str, str]:
        """Triton types of the kernel's parameters, for compiling it without a GPU."""
        from rewriter.emit.signature import kernel_signature

        return kernel_signature(self.names, self.writer.strides, self.chain.outputs)


def _tuple(items: list[str]) -> str:
    return f"({', '.join(items)}{',' * (len(items) == 1)})"


def memory_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost in memory."""
    strides = [_typical(s) for s in value.stride()]
    return sorted(range(value.dim()), key=lambda d: (-strides[d], d))


def _typical(size: torch.SymInt | int) -> int:
    """A size as a number: the traced one, or any where tracing kept none."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return (
        int(hint)
        if hint is not None
        else int(size.node.expr.subs({s: 64 for s in size.node.expr.free_symbols}))
    )


def _axes_doc(tensor: Tensor) -> str:
    return ", ".join(show(s) for s in tensor.shape)


def _commented(lines: list[Line]) -> list[Line]:
    """Drops a user's line that is the same as the one before."""
    out, last = [], ""
    for line in lines:
        out.append(Line(line.code, line.shape, line.source if line.source != last else ""))
        last = line.source or last
    return out


__all__ = ["KernelFile", "Load", "Source", "emit_kernel", "torch", "walk"]
