"""From a chain to kernel plans: which kernels there may be, the roles of axes in each, and of these the cheapest."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import torch

from rewriter.derive import Chain, Definition
from rewriter.ir import Apply, Axis, Const, Load, Node, Output, Param, Ref, Tensor, index, walk
from rewriter.plan.bounds import sweep_support
from rewriter.plan.candidates import Option, Options, choose
from rewriter.plan.cost import Nominal, cost_of
from rewriter.plan.few import with_few
from rewriter.plan.fills import Fill, fill_of
from rewriter.plan.fold import grouped
from rewriter.plan.kernel import ChainPlan, Config, KernelPlan, Loop, Sweep
from rewriter.plan.maps import BlockMap, block_map
from rewriter.plan.merge import merged
from rewriter.plan.parts import (
    Part,
    carried,
    chains_of,
    deep_groups,
    features_of,
    independent_groups,
    is_deep,
    parts_of,
)
from rewriter.plan.roles import can_be_whole, inner_reductions, lone_rows, tile_rows
from rewriter.plan.tape import tapes_of
from rewriter.plan.tiles import configs, contenders
from rewriter.plan.unroll import unrolled
from rewriter.plan.wide import MAX_FEATURE, in_parts
from rewriter.plan.within import divides, within
from rewriter.sparsity import Support


class NotPlannable(Exception):
    """No kernel shape fits the chain; the text says what is missing."""


class NeedsFixed(Exception):
    """Sizes that must be known before a kernel is written: axes it keeps whole."""

    def __init__(self, sizes: frozenset[Param]):
        super().__init__(f"sizes {sorted(s.name for s in sizes)} must be fixed")
        self.sizes = sizes


def plan(chain: Chain, name: str, example: Mapping[Param, int] = MappingProxyType({})) -> ChainPlan:
    """The kernels of a chain. Raises NotPlannable, NeedsFixed.

    Sizes are settled for the plain structure; what else is considered needs no other. `example`: those of the call
    that was traced, which tell what is few.
    """
    chain, shown = within(merged(chain))
    chain, was = in_parts(chain)
    was = shown | {n: shown.get(old, old) for n, old in was.items()}
    parts = parts_of(chain)
    plain = Structure(chain, name, parts, was)
    free = _to_be_fixed(chain).union(_few_per_value(plain, example), _sizes_of_sums(plain))
    free = free.union(*(_sizes_kept_whole(r) for r in plain.roles))
    if free:
        raise NeedsFixed(free)
    structures = [*_grouped(plain), plain, *_apart(plain), *_deep_apart(plain)]
    nominal = Nominal(chain, [a for r in plain.roles for a in r.rows])
    ranked = choose([s.options(nominal) for s in structures])
    kernels = tuple(unrolled(k, example) for k in ranked[0].kernels)
    kernels = tuple(with_few(replace(k, others=_others(k, nominal)), example) for k in kernels)
    chain = next(s.chain for s in structures if s.chain.axes == kernels[0].chain.axes)
    return ChainPlan(name, chain, kernels, ranked[0].results, tuple(ranked))


def _others(kernel: KernelPlan, nominal: Nominal) -> tuple[Config, ...]:
    """Tiles to be measured beside a kernel's own: those that fit where it does."""
    tapes = tapes_of(kernel)
    costs = {c: cost_of(replace(kernel, config=c), nominal, tapes) for c in contenders(kernel)}
    return tuple(c for c, cost in costs.items() if c != kernel.config and cost.held.may_fit)


def _apart(plain: Structure) -> list[Structure]:
    """What is independent in kernels of its own, where that may be faster. Of fp32 operands it is not considered: what
    would speak for it is spilling, and estimates of that say little about the time of products element by element.
    """
    chain = plain.chain
    groups = independent_groups(chain, plain.parts)
    are_apart = len(set(groups.values())) == len({groups[p.definitions[0].name] for p in plain.parts if p.definitions})
    if are_apart or _operand_dtype(chain, ()) is torch.float32:
        return []
    return [plain.by(groups)]


def _deep_apart(plain: Structure) -> list[Structure]:
    """Values that each row has for itself in kernels of their own: the others keep tiles of two dimensions, and rows of
    those may be another axis, along which the values are shared.
    """
    rows = frozenset().union(*(r.rows for r in plain.roles if len(r.rows) == 1))
    groups = deep_groups(plain.chain, rows)
    return [plain.by(groups)] if groups else []


def _grouped(plain: Structure) -> list[Structure]:
    """Of groups that are streamed together the members as rows, where no others share what is streamed: products of
    matrices, that are slow in fp32.
    """
    is_slow = _operand_dtype(plain.chain, ()) is torch.float32
    found = None if is_slow or any(r.dots for r in plain.roles) else grouped(plain.chain)
    if found is None:
        return []
    chain, was = found
    was = {n: plain.was.get(old, old) for n, old in was.items()}
    structure = Structure(chain, plain.name, parts_of(chain), was, grouped=True)
    return [] if any(map(_sizes_kept_whole, structure.roles)) else [structure]


class Structure:
    """Which kernel computes what, before tiles are chosen. `results` are what one writes for those after it; `was` has
    the program's values, where they have moved to other axes.
    """

    def __init__(self, chain: Chain, name: str, parts: list[Part], was: Mapping[Node, Node], *, grouped: bool = False):
        self.chain, self.name, self.was, self.grouped = chain, name, was, grouped
        self.chains, self.results = chains_of(chain, parts)
        self.features = features_of(chain)
        self.parts = parts
        self.names = [name] if len(parts) == 1 else [f"{name}_{k + 1}" for k in range(len(parts))]
        self.roles = [_Roles(own, part, self.features) for part, own in zip(parts, self.chains)]

    def by(self, groups: dict[str, int]) -> Structure:
        """The same with different groups in kernels of their own."""
        return Structure(self.chain, self.name, parts_of(self.chain, groups), self.was)

    def options(self, nominal: Nominal) -> Options:
        """For each kernel what it may be: with its own roles first, each with the tiles for its situation."""
        return Options([self._options_of(k, nominal) for k in range(len(self.parts))], self.results)

    def _options_of(self, k: int, nominal: Nominal) -> list[Option]:
        own = self._kernel(k, self.roles[k])
        kernels = [*self._alone(k, own), own, *self._other_rows(k, own)]
        return [option for kernel in kernels for option in _tiled(kernel, nominal)]

    def _kernel(self, k: int, roles: _Roles) -> KernelPlan:
        kernel = _kernel(self.names[k], self.chains[k], roles, self.results)
        return replace(kernel, was=self.was, grouped=self.grouped)

    def _alone(self, k: int, own: KernelPlan) -> list[KernelPlan]:
        """A program for each row, where rows share nothing that is streamed: short sums are over whole tiles."""
        if own.dots or not own.loops or len(own.rows) != 1 or not self.roles[k].is_deep(self.chains[k]):
            return []
        roles = _Roles(self.chains[k], self.parts[k], self.features, ())
        roles.keep_whole()
        return [self._kernel(k, roles)] if roles.loops and not _sizes_kept_whole(roles) else []

    def _other_rows(self, k: int, own: KernelPlan) -> list[KernelPlan]:
        """The same with another grid axis as rows, where every matrix product stays one, and tiles stay as flat, or
        where tiles become flatter.
        """
        if len(own.rows) != 1:
            return []
        roles = [_Roles(self.chains[k], self.parts[k], self.features, (axis,)) for axis in own.grid]
        others = [self._kernel(k, r) for r in roles if not _sizes_kept_whole(r)]
        return [other for other in others if _shape(other) == _shape(own) or _shape(other)[2] < _shape(own)[2]]


def _shape(kernel: KernelPlan) -> tuple[int, int, int]:
    """How many products and inner loops a kernel has, and how many dimensions its tiles."""
    steps = [s for tape in tapes_of(kernel) for s in tape.steps]
    tiles = (len(s.axes if s.kind == "product" else s.over) for s in steps)
    return sum(s.kind == "product" for s in steps), len(kernel.loops), max(tiles, default=0)


def _tiled(kernel: KernelPlan, nominal: Nominal) -> list[Option]:
    tapes = tapes_of(kernel)
    tiled = [replace(kernel, config=c) for c in configs(kernel)]
    return [Option(t, cost_of(t, nominal, tapes)) for t in tiled]


class _Roles:
    """The roles of a part's axes, before sizes are known. `rows` overrides which are a tile's rows."""

    def __init__(self, chain: Chain, part: Part, features: frozenset[Axis], rows: tuple[Axis, ...] | None = None):
        ordered = tuple(a for a in chain.axes if a in part.rows)
        streams = tuple(dict.fromkeys(d.stream for d in chain.definitions))
        lone = lone_rows(chain, ordered) if rows is None else rows
        self.rows = tile_rows(chain, ordered) if lone is None else lone
        self.grid = tuple(a for a in ordered if a not in self.rows)
        self.dots, self.loops = inner_reductions(chain, self.rows, streams)
        used = {a for d in chain.definitions for a in d.axes} | {a for o in chain.outputs for a in o.over}
        whole = [d.axis for d in self.dots if not d.long]
        self.features = (*dict.fromkeys(whole), *(a for a in chain.axes if a in features and a in used))

    def is_deep(self, chain: Chain) -> bool:
        return any(is_deep(d, frozenset(self.rows), frozenset(self.features)) for d in chain.definitions)

    def keep_whole(self) -> None:
        """Loops that can be reductions of a whole tile become those; none where not all can."""
        can = all(can_be_whole(r) for r in self.loops)
        self.loops = tuple(replace(r, whole=True) for r in self.loops) if can else ()
        self.features = (*dict.fromkeys(r.axis for r in self.loops), *self.features)


def _sizes_kept_whole(roles: _Roles) -> frozenset[Param]:
    axes = (*roles.features, *(d.axis for d in roles.dots))
    return frozenset(n for a in axes for n in walk(a.extent) if isinstance(n, Param))


def _sizes_of_sums(plain: Structure) -> frozenset[Param]:
    """Of short sums beside values that each row has for itself: programs of one row keep them whole."""
    deep = [r for r, own in zip(plain.roles, plain.chains) if not r.dots and r.is_deep(own)]
    extents = (loop.axis.extent for r in deep for loop in r.loops if loop.node.depth == 1)
    return frozenset(n for extent in extents for n in walk(extent) if isinstance(n, Param))


def _to_be_fixed(chain: Chain) -> frozenset[Param]:
    """Symbols that the program took a float of (`<sqrt(s3)>`)."""
    floats = [n.name for n in walk(*chain.roots) if isinstance(n, Param) and n.dtype.is_floating_point]
    return frozenset(Param(name) for text in floats for name in re.findall(r"\b[a-z]+\d+\b", text))


def _few_per_value(plain: Structure, example: Mapping[Param, int]) -> frozenset[Param]:
    """Sizes of axes that only values carry, several of them, where a tile holds all: `a @ v` of v[n, p, c] computes the
    weights again for every p that is not in the tile.
    """
    few: set[Param] = set()
    rows = {a for r in plain.roles for a in r.rows}
    for axes in carried(plain.chain).values():
        sizes = [a.extent.value if isinstance(a.extent, Const) else example.get(a.extent) for a in axes]
        if len(axes) > 1 and not rows & set(axes) and None not in sizes and math.prod(sizes) <= MAX_FEATURE:
            few |= {a.extent for a in axes if isinstance(a.extent, Param)}
    return frozenset(few)


def _kernel(name: str, chain: Chain, roles: _Roles, results: tuple[Tensor, ...]) -> KernelPlan:
    """A kernel before its tile is chosen. Raises NotPlannable."""
    for axis in roles.features:
        if axis.extent.value > MAX_FEATURE:
            raise NotPlannable(f"a feature axis of {axis.extent.value} is wider than {MAX_FEATURE}, and not in parts")
    tiles = {*roles.rows, *(d.stream for d in chain.definitions)}
    if any(not isinstance(r.axis.extent, Const) and _is_of_another_row(r, tiles) for r in roles.loops):
        raise NotPlannable("each pair of a row and a position would reduce a row of another value again")
    sweeps, outputs = _sweeps(chain, roles)
    dtype = _operand_dtype(chain, results)
    return KernelPlan(
        name,
        chain,
        roles.grid,
        roles.rows,
        sweeps,
        outputs,
        roles.features,
        roles.dots,
        roles.loops,
        Config(16, 16, 4, 1),
        dtype,
    )


def _is_of_another_row(loop: Loop, tiles: set[Axis]) -> bool:
    """Whether a row is reduced that each pair finds by a quotient, as of a view whose rows have another length."""
    return any(divides(n) and len(n.free & tiles) > 1 for n in walk(loop.predicate, loop.body))


def _sweeps(chain: Chain, roles: _Roles) -> tuple[tuple[Sweep, ...], tuple[Output, ...]]:
    """The loops in order, and the outputs that are written after them: an output as wide as a stream has a loop."""
    own = {*roles.rows, *roles.grid, *roles.features}
    wide = {o: a for o in chain.outputs for a in o.over if a not in own and index(a).free}
    turns = {o: (_turn(o, chain), stream) for o, stream in wide.items()}
    keys = dict.fromkeys([*((d.sweep, d.stream) for d in chain.definitions), *turns.values()])
    sweeps = []
    for turn, stream in sorted(keys, key=lambda key: key[0]):
        definitions = tuple(d for d in chain.definitions if (d.sweep, d.stream) == (turn, stream))
        outputs = tuple(o for o, at in turns.items() if at == (turn, stream))
        sweeps.append(_sweep(stream, definitions, outputs, roles))
    return tuple(sweeps), tuple(o for o in chain.outputs if o not in wide)


def _sweep(stream: Axis, definitions: tuple[Definition, ...], outputs: tuple[Output, ...], roles: _Roles) -> Sweep:
    """What is written position by position is written everywhere: masks leave nothing of it out."""
    if outputs:
        return Sweep(stream, definitions, outputs)
    fill = fill_of(definitions, stream)
    if fill:
        support, found, why = _left_of(fill.masked(definitions), stream, roles, fill)
        if found or (support and support.inner):
            return Sweep(stream, definitions, outputs, support, found, why, fill)
    return Sweep(stream, definitions, outputs, *_left_of(definitions, stream, roles))


def _left_of(
    definitions: tuple[Definition, ...], stream: Axis, roles: _Roles, fill: Fill | None = None
) -> tuple[Support | None, BlockMap | None, str]:
    """What predicates leave of a stream: bounds, a map, and why there is one or not."""
    support = sweep_support(definitions, stream, roles.rows, roles.grid)
    found, why = block_map(definitions, stream, roles.rows, roles.grid, support, multiplies=bool(roles.dots))
    return support, found and replace(found, lists_rest=fill is not None), why


def _turn(output: Output, chain: Chain) -> int:
    """The first sweep in which all that an output reads is final."""
    names = {n.name for n in walk(output.body) if isinstance(n, Ref)}
    return max((d.sweep + 1 for d in chain.definitions if d.name in names), default=0)


def _operand_dtype(chain: Chain, results: tuple[Tensor, ...]) -> torch.dtype:
    """The widest floating type among what the user's tensors hold that are reduced; of all, where results are. Where
    fp32 is written, tensors that the user has widened count as that.
    """
    reduced = list(walk(*(n for d in chain.definitions for n in d.roots)))
    loaded = (n.tensor for n in reduced if isinstance(n, Load))
    users = [t for t in loaded if t not in results] or [t for t in chain.tensors if t not in results]
    floats = [t.dtype for t in users if t.dtype.is_floating_point]
    if any(o.dtype is torch.float32 for o in chain.outputs):
        floats += [n.dtype for n in reduced if isinstance(n, Apply) and n.op == "cast" and isinstance(n.args[0], Load)]
    return max((d for d in floats if d.is_floating_point), key=lambda d: d.itemsize, default=torch.float32)
