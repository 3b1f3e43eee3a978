"""Names in an emitted file: the literature's for axes and state, the user's for tensors."""

from __future__ import annotations

import builtins
import copy
import keyword
import re
from collections.abc import Set as AbstractSet

from rewriter.derive import Definition
from rewriter.emit.render import helper_names
from rewriter.ir import Axis, Const, Node, Param, Tensor, walk
from rewriter.ir.printer import show
from rewriter.plan import ChainPlan
from rewriter.trace.sizes import renamed

# What every emitted file says by itself, in kernels and around them.
_RESERVED = set(dir(builtins)) | set(
    "tl triton torch math hashlib Path pid blocks rest start full m_new M N LOG2E ON_NVIDIA NEG_INF POS_INF LOWEST align"
    " few wanted SPLITS launch config milliseconds json os Launch Fastest Boxes Piece Pieces dense lies_in_rows laid_out lists"
    " prepared PREPARED go alike lying has_tma TMA ALIGN TILES"
    " TensorDescriptor functools reference LIBRARY OP UNDERFLOW"
    " turn tile tiles some every none flag flags wholes cuts whole_at cut_at low beyond left_out left_out_at".split()
)
_MADE = re.compile(
    r"(stride|offs|start|BLOCK|BOXED|write|launch)_|CONFIGS|(blocks|tiles)\d+$|.*_(ptr|new|kernel|boxes|numbers|by|few|pieces)$"
)  # made of names of tensors, axes and state


class Names:
    """Assigns every axis, size, tensor and running value of a plan a name, once for all its kernels."""

    def __init__(self, plan: ChainPlan, display: dict[str, str]):
        self.taken: set[str] = _RESERVED | helper_names()
        self.axes = self._axes(plan)
        self.own: dict[Node, str] = {}  # sizes of kernels for few rows alone
        self.sizes = self._sizes(plan)
        self.state = self._state(plan)
        results = {t.name for t in plan.results}
        inputs = [t for t in plan.chain.tensors if t.name not in results]
        self.tensors = {t: self.unique(_identifier(display.get(t.name, t.name))) for t in inputs}
        single = len(plan.chain.outputs) == 1
        self.outputs = {o.name: self.unique("out" if single else f"out_{o.name}") for o in plan.chain.outputs}
        for result in plan.results:
            called = self.unique(_stored(plan.chain.definition(result.name), self.state))
            self.tensors[result] = self.outputs[result.name] = called
        for few in plan.few:
            for state, definition in zip(few.states, few.part.chain.definitions):
                called = self.unique(_stored(definition, self.state).replace("row", "part", 1))
                self.tensors[state] = self.outputs[state.name] = called
            for result in few.results:
                called = self.unique(_stored(plan.chain.definition(result.name), self.state))
                self.tensors[result] = self.outputs[result.name] = called

    def for_kernel(self) -> Names:
        """The same names, with room of its own for the variables of one kernel."""
        own = copy.copy(self)
        own.taken = set(self.taken)
        return own

    def unique(self, wanted: str, besides: AbstractSet[str] = frozenset()) -> str:
        name, k = wanted, 2
        while name in self.taken or name in besides or keyword.iskeyword(name):
            name, k = f"{wanted}_{k}", k + 1
        self.taken.add(name)
        return name

    def _axes(self, plan: ChainPlan) -> dict[Axis, str]:
        """The last kernel, which gives the results, has rows m and stream n; the others share its letters. What the
        most grid axes are called goes for all.
        """
        out: dict[Axis, str] = {}
        kernels = plan.kernels[::-1]
        by_grid = sorted(kernels, key=lambda k: -len(k.grid))
        grid = list(dict.fromkeys(a for k in by_grid for a in k.grid[::-1]))
        few = [a for f in plan.few for a in f.part.grid[::-1] if a is not f.axis]
        for letters, axes in (
            ("mn", [a for k in kernels for a in k.rows]),
            ("nmjtuvw", [a for k in kernels for a in k.streams if not k.steps]),
            ("hbgijkxyz" if len(grid) > 1 else "bhg", [*grid, *few]),
            ("defc", [a for k in kernels for a in (*k.features, *k.long_axes)]),
            ("ghr", [a for k in kernels for a in k.streams]),
            ("drgux", [r.axis for k in kernels for r in k.loops]),
            ("ts", [s.axis for k in (*kernels, *(f.part for f in plan.few)) for s in k.skews]),
            ("r", [a for f in plan.few for a in f.part.rows]),
            (["part"], [f.axis for f in plan.few]),
        ):
            for axis in axes:
                if axis not in out:
                    free = (c for c in (*letters, *(f"{letters[0]}{k}" for k in range(1, 99))) if c not in out.values())
                    out[axis] = next(free)
        self.taken |= set(out.values())
        return out

    def _sizes(self, plan: ChainPlan) -> dict[Node, str]:
        """Names of the extents known only at the call, and of the sizes other expressions mention."""
        out: dict[Node, str] = {}
        few = {a for f in plan.few for a in (*f.part.grid, *f.part.rows)}
        few -= {a for k in plan.kernels for a in (*k.grid, *k.rows)}
        for axis in self.axes:
            if not isinstance(axis.extent, Const) and axis not in few:
                out.setdefault(axis.extent, self.axes[axis].upper())
        self.own |= {f.axis.extent: f"SPLITS_{k}" if k > 1 else "SPLITS" for k, f in enumerate(plan.few, 1)}
        self.own |= {a.extent: self.axes[a].upper() for a in few if not isinstance(a.extent, (Const, Param))}
        self.own = {extent: name for extent, name in self.own.items() if extent not in out}
        out |= self.own
        for param in dict.fromkeys(n for n in walk(*_all_nodes(plan)) if isinstance(n, Param)):
            if param not in out and _is_mentioned(param, plan, out):
                out[param] = self.unique(param.name.upper())
        self.taken |= set(out.values())
        return out

    def _state(self, plan: ChainPlan) -> dict[str, str]:
        """m_i for maxima, l_i for sums over a row, acc for sums with features; numbered where there are several."""
        out: dict[str, str] = {}
        features = {a for k in plan.kernels for a in k.features}
        for definition in plan.chain.definitions:
            base = _base(definition, features)
            count = sum(v.startswith(base) for v in out.values())
            out[definition.name] = base if not count else f"{base}{count + 1}"
        self.taken |= set(out.values())
        return out


def _base(definition: Definition, features: set[Axis]) -> str:
    if any(a in features for a in definition.axes):
        return "acc"
    return {"max": "m_i", "sum": "l_i"}.get(definition.op, f"{definition.op}_i")


def _stored(definition: Definition, state: dict[str, str]) -> str:
    """What one kernel writes for the next: for each of its own rows a value, or the features of an accumulator."""
    return "row_acc" if state[definition.name].startswith("acc") else f"row_{definition.op}"


def _all_nodes(plan: ChainPlan) -> list[Node]:
    chain = plan.chain
    shapes = [s for t in chain.tensors for s in (*t.given, *t.shape)]
    shapes += [s for o in chain.outputs for s in (*o.shape, *(a.extent for a in o.axes))]
    return chain.roots + shapes


def _is_mentioned(param: Param, plan: ChainPlan, named: dict[Node, str]) -> bool:
    """Whether a size occurs other than inside an extent that has a name."""
    return any(_mentions(root, param, named) for root in _all_nodes(plan))


def _mentions(node: Node, param: Param, named: dict[Node, str]) -> bool:
    if node is param:
        return True
    return node not in named and any(_mentions(c, param, named) for c in node.children)


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"t_{name}" if not name or name[0].isdigit() or _MADE.match(name) else name


def stride_name(tensor: str, k: int, letters: tuple[str, ...]) -> str:
    """stride_qb, stride_qh, ...: the tensor's name and the axis that moves it."""
    return f"stride_{tensor}{letters[k]}" if len(tensor) == 1 else f"stride_{tensor}_{letters[k]}"


def size_text(node: Node, names: Names) -> str:
    """An extent as Python, of the sizes that have names."""
    if node in names.sizes:
        return names.sizes[node]
    return renamed(show(node), {p.name: n for p, n in names.sizes.items() if isinstance(p, Param)})


__all__ = ["Names", "Tensor", "size_text", "stride_name"]
