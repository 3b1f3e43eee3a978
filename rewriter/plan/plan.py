"""From a chain to kernel plans: which kernels there are, the roles of axes in each, tile sizes from the features' width."""

from __future__ import annotations

import re

import torch

from rewriter.derive import Chain
from rewriter.derive.factors import depends_on
from rewriter.ir import Axis, Const, Output, Param, Ref, Tensor, index, walk
from rewriter.plan.kernel import ChainPlan, Config, KernelPlan, Sweep, padded
from rewriter.plan.parts import Part, chains_of, features_of, parts_of
from rewriter.plan.roles import MAX_FEATURE, inner_reductions, lone_rows, tile_rows


LONGEST_TILE = 1024  # positions of one row in a tile


class NotPlannable(Exception):
    """No kernel shape fits the chain; the text says what is missing."""


class NeedsFixed(Exception):
    """Sizes that must be known before a kernel is written: axes it keeps whole."""

    def __init__(self, sizes: frozenset[Param]):
        super().__init__(f"sizes {sorted(s.name for s in sizes)} must be fixed")
        self.sizes = sizes


def plan(chain: Chain, name: str) -> ChainPlan:
    """The kernels of a chain. Raises NotPlannable, NeedsFixed."""
    parts = parts_of(chain)
    features = features_of(chain)
    chains, results = chains_of(chain, parts)
    names = [name] if len(parts) == 1 else [f"{name}_{k + 1}" for k in range(len(parts))]
    roles = [_Roles(own, part, features) for part, own in zip(parts, chains)]
    free = _to_be_fixed(chain).union(*(_sizes_kept_whole(r) for r in roles))
    if free:
        raise NeedsFixed(free)
    kernels = tuple(_kernel(called, own, r, results) for called, own, r in zip(names, chains, roles))
    return ChainPlan(name, chain, kernels, results)


class _Roles:
    """The roles of a part's axes, before sizes are known."""

    def __init__(self, chain: Chain, part: Part, features: frozenset[Axis]):
        ordered = tuple(a for a in chain.axes if a in part.rows)
        streams = tuple(dict.fromkeys(d.stream for d in chain.definitions))
        self.lone = lone_rows(chain, ordered)
        self.rows = tile_rows(chain, ordered) if self.lone is None else self.lone
        self.grid = tuple(a for a in ordered if a not in self.rows)
        tiles = self.rows if len(self.rows) > 1 else (*self.rows, *streams)
        self.dots, self.loops = inner_reductions(chain, tiles)
        used = {a for d in chain.definitions for a in d.axes} | {a for o in chain.outputs for a in o.axes}
        whole = [d.axis for d in self.dots if not d.long]
        self.features = (*dict.fromkeys(whole), *(a for a in chain.axes if a in features and a in used))


def _sizes_kept_whole(roles: _Roles) -> frozenset[Param]:
    axes = (*roles.features, *(d.axis for d in roles.dots))
    return frozenset(n for a in axes for n in walk(a.extent) if isinstance(n, Param))


def _to_be_fixed(chain: Chain) -> frozenset[Param]:
    """Symbols that the program took a float of (`<sqrt(s3)>`)."""
    floats = [n.name for n in walk(*chain.roots) if isinstance(n, Param) and n.dtype.is_floating_point]
    return frozenset(Param(name) for text in floats for name in re.findall(r"\b[a-z]+\d+\b", text))


def _kernel(name: str, chain: Chain, roles: _Roles, results: tuple[Tensor, ...]) -> KernelPlan:
    for axis in roles.features:
        if axis.extent.value > MAX_FEATURE:
            raise NotPlannable(f"a feature axis of {axis.extent.value} is wider than {MAX_FEATURE}")
    sweeps, outputs = _sweeps(chain, roles)
    dtype = _operand_dtype(chain, results)
    config = _config(chain, roles, dtype)
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
        config,
        dtype,
    )


def _sweeps(chain: Chain, roles: _Roles) -> tuple[tuple[Sweep, ...], tuple[Output, ...]]:
    """The loops in order, and the outputs that are written after them: an output as wide as a stream has a loop."""
    own = {*roles.rows, *roles.grid, *roles.features}
    wide = {o: a for o in chain.outputs for a in o.axes if a not in own and index(a).free}
    turns = {o: (_turn(o, chain), stream) for o, stream in wide.items()}
    keys = dict.fromkeys([*((d.sweep, d.stream) for d in chain.definitions), *turns.values()])
    sweeps = [
        Sweep(
            stream,
            tuple(d for d in chain.definitions if (d.sweep, d.stream) == (turn, stream)),
            tuple(o for o, at in turns.items() if at == (turn, stream)),
        )
        for turn, stream in sorted(keys, key=lambda key: key[0])
    ]
    return tuple(sweeps), tuple(o for o in chain.outputs if o not in wide)


def _turn(output: Output, chain: Chain) -> int:
    """The first sweep in which all that an output reads is final."""
    names = {n.name for n in walk(output.body) if isinstance(n, Ref)}
    return max((d.sweep + 1 for d in chain.definitions if d.name in names), default=0)


def _operand_dtype(chain: Chain, results: tuple[Tensor, ...]) -> torch.dtype:
    """The widest floating type among what the user's tensors hold."""
    floats = [t.dtype for t in chain.tensors if t.dtype.is_floating_point and t not in results]
    return max(floats, key=lambda d: d.itemsize) if floats else torch.float32


def _config(chain: Chain, roles: _Roles, dtype: torch.dtype) -> Config:
    """Tiles that fit registers and shared memory of an sm_80 or newer; 16-bit ones as swept on an H200."""
    width = max((padded(f) for f in roles.features), default=16)
    if _is_deep(chain, roles):
        return Config(16, 16, 4, 1)
    if roles.lone:  # the rows of a tile lie side by side in memory
        return Config(64, 32, 4, 2)
    if not roles.dots:
        lengths = [_whole(d.stream) for d in chain.definitions]
        return Config(16, 64, 4, 2) if roles.rows else Config(1, max(lengths, default=LONGEST_TILE), 4, 1)
    if roles.loops or any(d.long for d in roles.dots):
        return Config(64, 64, 4, 2) if width <= 128 else Config(32, 32, 4, 2)
    if dtype is torch.float32:
        return Config(64, 32, 4, 2) if width <= 64 else Config(32, 32, 4, 1)
    if width <= 64:
        return Config(128, 64, 8, 2)
    return Config(128, 64, 4, 2) if width <= 128 else Config(64, 32, 4, 2)


def _whole(stream: Axis) -> int:
    """The power of two that holds a stream, or the longest tile."""
    return min(LONGEST_TILE, padded(stream)) if isinstance(stream.extent, Const) else LONGEST_TILE


def _is_deep(chain: Chain, roles: _Roles) -> bool:
    """Whether a tile has rows, stream and features at once: values of a weighted sum that each row has for itself."""
    rows, features = frozenset(roles.rows), frozenset(roles.features) - {d.axis for d in roles.dots}
    factors = [(f, d.stream) for d in chain.definitions for f in d.rest]
    return any(f.free & features and f.free & rows and depends_on(f, stream) for f, stream in factors)
