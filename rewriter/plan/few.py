"""Kernels for few rows of a long stream: parts of it in programs of their own, then their states merged.

Programs have a tile of rows each. Where rows are too few for a program on every multiprocessor, as in decoding, the
stream is cut into as many parts as fill the rest. What is streamed is read once for all rows that share it (`folded`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from rewriter.derive import Chain
from rewriter.ir import Axis, Const, Load, Node, Param, Reduce, Ref, Tensor, fresh_axis, transform, walk
from rewriter.plan.bounds import by_bounds
from rewriter.plan.cost import LONG, MULTIPROCESSORS, Nominal, cost_of
from rewriter.plan.fold import folded
from rewriter.plan.kernel import Config, Few, KernelPlan, Sweep, padded
from rewriter.plan.parts import result_of, result_output
from rewriter.plan.states import MERGED, merging, state_output, state_tensor
from rewriter.plan.tape import tapes_of
from rewriter.plan.tiles import is_sound

MARGIN = 0.15  # of its time that splitting must save
LEAST_TILES = 2  # of a part
SHORT_ROWS = 64  # times as many stream positions as rows: the example is a short one of few rows
RESIDENTS = 8  # programs of a multiprocessor that together keep memory busy
WAVES = 4  # of programs where more of them than run at once have tiles of their own: the last leaves few idle
PARTS, PARTS_OF_FEATURES = 1024, 64  # at most, so that their states are one tile

HALF = (Config(16, 128, 4, 3), Config(16, 64, 4, 3), Config(32, 64, 4, 3), Config(64, 64, 4, 3), Config(128, 64, 8, 2))
SINGLE = (Config(16, 32, 4, 2), Config(32, 32, 4, 2), Config(64, 32, 4, 2))
# Of 16-bit operands: stream positions, warps and stages.
IN_FLIGHT = ((128, 4, 3), (128, 8, 3), (64, 4, 3), (64, 4, 4), (32, 4, 4))


class Example(Nominal):
    """Sizes of the example. A stream much longer than rows are many stands for a long one."""

    def __init__(self, chain: Chain, plan: KernelPlan, known: Mapping[Param, int]):
        super().__init__(chain, plan.rows)
        self.known = dict(known)
        rows = math.prod(self.extent(a.extent) for a in plan.rows or plan.grid)
        least = 2 if plan.dots and rows == 1 else SHORT_ROWS * rows  # one query is a step of decoding
        for stream in plan.streams:
            if isinstance(stream.extent, Param) and self.extent(stream.extent) >= least:
                self.known[stream.extent] = max(LONG, self.extent(stream.extent))

    def extent(self, node: Node) -> int:
        return self.known[node] if node in self.known else super().extent(node)


def with_few(plan: KernelPlan, known: Mapping[Param, int]) -> KernelPlan:
    """The kernel with what stands in for it where rows are few, if that is faster at the sizes of the example."""
    if why_whole(plan) or not known:
        return plan
    example = Example(plan.chain, plan, known)
    listed = [_few(plan, example, c) for c in _configs(plan, example)]
    few = next((f for f in listed if cost_of(f.kernels[0], example).held.may_fit), listed[-1])
    saves = _seconds(few, plan, example) < cost_of(plan, example).seconds * (1 - MARGIN)
    return replace(plan, few=few) if saves else plan


def why_whole(plan: KernelPlan) -> str:
    """Why the stream of a kernel's first sweep is not split; "" where it can be."""
    if not plan.sweeps or not plan.sweeps[0].definitions or plan.sweeps[0].outputs:
        return "nothing that is reduced before anything is written"
    if not all(map(_is_short, _between(plan))):
        return "another sweep as long"
    if plan.steps:
        return "tiles of two row axes"
    if plan.is_band:
        return "masks leave a narrow band"
    if any(d.op not in MERGED for d in plan.sweeps[0].definitions):
        return "a state that is not merged"
    later = [n for s in plan.sweeps[1:] for d in s.definitions for n in d.roots] + [o.body for o in plan.chain.outputs]
    if any(isinstance(n, Reduce) for n in walk(*later)):
        return "reductions inside what follows"
    return ""


def _between(plan: KernelPlan) -> tuple[Sweep, ...]:
    """The sweeps after the first that only reduce: they run with the merge."""
    return plan.sweeps[1:-1] if _written(plan) else plan.sweeps[1:]


def _written(plan: KernelPlan) -> Sweep | None:
    """The last sweep, where it only writes: its positions need not wait for each other."""
    last = plan.sweeps[-1]
    return last if last.outputs and not last.definitions else None


def _is_short(sweep: Sweep) -> bool:
    return isinstance(sweep.stream.extent, Const) and not sweep.outputs


def _seconds(few: Few, plan: KernelPlan, example: Example) -> float:
    splits = _splits(few, example)
    at = Example(plan.chain, plan, {**example.known, few.axis.extent: splits})
    return sum(cost_of(k, at).seconds for k in few.kernels)


def _splits(few: Few, example: Example) -> int:
    """As the launch will choose."""
    part, merge = few.kernels[:2]
    programs = math.prod(example.extent(a.extent) for a in part.grid if a is not few.axis)
    programs *= math.prod(math.ceil(example.extent(a.extent) / part.sizes[a]) for a in part.rows)
    most = math.ceil(example.extent(part.streams[0].extent) / few.least)
    wanted = few.programs // programs or few.waves // programs
    return max(1, min(wanted, most, merge.config.block_n))


def _configs(plan: KernelPlan, example: Example) -> list[Config]:
    """Tiles as high as rows are many, the best first; of a kernel without products its own."""
    if not plan.dots or not plan.rows:
        return [plan.config]
    rows = example.extent(folded(plan).rows[0].extent)
    listed = SINGLE if plan.dtype is torch.float32 else HALF
    high = next((c.block_m for c in listed if c.block_m >= rows), listed[-1].block_m)
    is_padded = any(a.extent.value != padded(a) for a in plan.features)
    enough = [c for c in listed if c.block_m == high]
    return [replace(c, num_stages=min(2, c.num_stages)) if is_padded else c for c in enough]


def _few(plan: KernelPlan, example: Example, config: Config) -> Few:
    part = fresh_axis(Param(f"{plan.name}_splits"), "part")
    whole = replace(folded(by_bounds(plan)), config=config, others=())
    split, results = _split(whole, part), _results(whole)
    kernels = (split, _merge(whole, part, results), *([_write(whole, results)] if _written(whole) else []))
    kernels = (replace(split, others=_others(split, example)), *kernels[1:])
    states = tuple(state_tensor(d, part) for d in split.sweeps[0].definitions)
    rows = MULTIPROCESSORS * (plan.config.block_m if plan.rows else 1) // 2
    programs = MULTIPROCESSORS * min(cost_of(split, example).held.residents, RESIDENTS)
    return Few(
        kernels, states, tuple(results.values()), part, rows, LEAST_TILES * config.block_n, programs, WAVES * programs
    )


def _others(split: KernelPlan, example: Example) -> tuple[Config, ...]:
    """Tiles to be measured beside a kernel's own: as many rows, and more or fewer bytes on their way."""
    first = split.config
    if not split.rows:
        listed = [(2 * first.block_n, 4, 1), (4 * first.block_n, 8, 1)]
    else:
        listed = IN_FLIGHT if split.dots and split.dtype is not torch.float32 else []
    tiles = [Config(first.block_m, *tile) for tile in listed]
    tapes = tapes_of(split)
    held = {c: cost_of(replace(split, config=c), example, tapes).held for c in tiles if is_sound(c, split)}
    return tuple(c for c in held if c != first and held[c].may_fit)


def _results(plan: KernelPlan) -> dict[str, Tensor]:
    """What the kernel that writes along the stream reads of the reductions, by their names."""
    written = _written(plan)
    read = {n.name for o in (written.outputs if written else ()) for n in walk(o.body) if isinstance(n, Ref)}
    return {d.name: result_of(d) for d in plan.chain.definitions if d.name in read}


def _split(plan: KernelPlan, part: Axis) -> KernelPlan:
    """The kernel of one part of the stream: what it writes are its states."""
    sweep = replace(plan.sweeps[0], part=part)
    outputs = tuple(state_output(d, part) for d in sweep.definitions)
    axes = (*plan.chain.axes, part)
    chain = replace(plan.chain, axes=axes, definitions=sweep.definitions, outputs=outputs)
    grid, name = (*plan.grid, part), f"{plan.name}_part"
    return replace(plan, name=name, chain=chain, grid=grid, sweeps=(sweep,), outputs=outputs)


def _merge(plan: KernelPlan, part: Axis, results: Mapping[str, Tensor]) -> KernelPlan:
    """The kernel that merges the states of a row's parts, all at once, and writes what follows from them."""
    merged = Sweep(part, merging(plan.sweeps[0].definitions, part), short=True)
    sweeps = (merged, *_between(plan))
    definitions = tuple(d for s in sweeps for d in s.definitions)
    kept = (result_output(d, results[d.name]) for d in definitions if d.name in results)
    outputs = (*kept, *plan.outputs)
    chain = replace(plan.chain, axes=(*plan.chain.axes, part), definitions=definitions, outputs=outputs)
    used = {a for d in definitions for a in d.axes} | {a for o in outputs for a in o.over}
    features = tuple(a for a in plan.features if a in used)
    config = Config(1, PARTS_OF_FEATURES if features else PARTS, 4, 1)
    return _of_rows(plan, f"{plan.name}_merge", chain, sweeps, features, config)


def _write(plan: KernelPlan, results: Mapping[str, Tensor]) -> KernelPlan:
    """The kernel that writes what is as long as the stream."""
    written = _written(plan)

    def rule(n: Node) -> Node:
        return Load(results[n.name], n.index) if isinstance(n, Ref) else n

    outputs = tuple(replace(o, body=transform(o.body, rule)) for o in written.outputs)
    chain = replace(plan.chain, definitions=(), outputs=outputs)
    config = Config(16, 64, 4, 1) if plan.rows else Config(PARTS, 1, 4, 1)
    kernel = _of_rows(plan, f"{plan.name}_write", chain, (), (), config)
    return replace(kernel, grid=plan.grid, rows=(written.stream, *plan.rows))


def _of_rows(
    plan: KernelPlan,
    name: str,
    chain: Chain,
    sweeps: tuple[Sweep, ...],
    features: tuple[Axis, ...],
    config: Config,
) -> KernelPlan:
    """A kernel each program of which has one row."""
    return KernelPlan(
        name=name,
        chain=chain,
        grid=(*plan.grid, *plan.rows),
        rows=(),
        sweeps=sweeps,
        outputs=chain.outputs,
        features=features,
        dots=(),
        loops=(),
        config=config,
        dtype=torch.float32,
        was=plan.was,
    )
