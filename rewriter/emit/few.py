"""What the template shows of the kernels that stand in for one where rows are few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rewriter.emit.names import Names, size_text
from rewriter.emit.shapes import shape_text
from rewriter.ir import Axis, Const, Node, Param, Tensor
from rewriter.ir.printer import show
from rewriter.plan import KernelPlan
from rewriter.trace.sizes import renamed

STANDING_IN = PART, MERGE, WRITE = "_PART", "_MERGE", "_WRITE"  # what ends the names of their configs


class FewView:
    """Its kernels, and how their launch chooses the number of parts. `view` shows one kernel."""

    def __init__(self, plan: KernelPlan, names: Names, config_name: str, view: Callable[..., Any]):
        self.plan, self.names = plan, names
        self.config_name = f"{config_name.replace('CONFIGS', 'FEW')}"
        self.kernels = [view(k, names, config_name + end) for k, end in zip(plan.few.kernels, STANDING_IN)]

    def values(self) -> dict[str, Any]:
        few = self.plan.few
        part, merge, *_ = self.kernels
        return {
            "config_name": self.config_name,
            "rows": few.rows,
            "least": few.least,
            "programs": few.programs,
            "waves": few.waves,
            "of_rows": " * ".join(self._extent(a) for a in (*self.plan.grid, *self.plan.rows)) or "1",
            "stream": size_text(self.plan.streams[0].extent, self.names),
            "is_known": isinstance(self.plan.streams[0].extent, Const),
            "sizes": [(name, self._computed(size)) for size, name in self._own_sizes().items()],
            "splits": self.names.sizes[few.axis.extent],
            "most": f'{merge.config_name}[0]["BLOCK_{self.names.axes[few.axis].upper()}"]',
            "states": [self._piece(t) for t in (*few.states, *few.results)],
            "beside": next(iter(self.names.tensors.values())),
            "tiles": part.programs(f"{part.config_name}[0]", few.part.grid[:-1]),
            "kernels": [k.values() for k in self.kernels],
        }

    def _piece(self, tensor: Tensor) -> dict[str, str]:
        name, shape = self.names.tensors[tensor], shape_text(tensor, self.names)
        return {"name": name, "shape": shape, "dtype": str(tensor.dtype)}

    def _extent(self, axis: Axis) -> str:
        text = size_text(axis.extent, self.names)
        return text if text.isidentifier() or text.isdigit() else f"({text})"

    def _own_sizes(self) -> dict[Node, str]:
        """What these kernels alone are passed, the number of parts aside."""
        few = self.plan.few
        used = {a.extent for a in (*few.part.grid, *few.part.rows)}
        return {n: name for n, name in self.names.own.items() if n in used and n is not few.axis.extent}

    def _computed(self, size: Node) -> str:
        """An extent by those that it is made of."""
        names = {p.name: n for p, n in self.names.sizes.items() if isinstance(p, Param)}
        return renamed(show(size), names)
