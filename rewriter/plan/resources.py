"""Estimates of what one program of a kernel holds: registers a thread, and shared memory.

Both follow from how Triton places tiles. A thread holds its share of every tile that is alive at once: running state,
scores between the product that makes them and the last use of their weights, fragments of operands where the matrix
unit takes them from registers. The operands of products lie in shared memory, those that move with the stream as
often as they are buffered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from rewriter.ir import Axis, Load
from rewriter.plan.boxes import box_of
from rewriter.plan.estimates import Registers
from rewriter.plan.kernel import KernelPlan
from rewriter.plan.tape import Key, Step, Tape

WARP = 32  # threads
REGISTER_FILE = 65_536  # registers of a multiprocessor
SHARED_OF_SM = 233_472  # bytes that the programs on one multiprocessor share, on sm_90

ADDRESSES = 40  # registers of a thread for positions, strides, counters and what is on its way through an operation
VECTOR = 16  # bytes that one load of a thread brings
QUAD = 4  # threads that hold the same number of a row, in the layout of matrix products


def threads(plan: KernelPlan) -> int:
    return plan.config.num_warps * WARP


def unit(plan: KernelPlan, step: Step) -> str:
    """What computes a product: Hopper's `wgmma` for 64 rows and more, `mma` for fewer, `fma` in fp32; `tf32` where a
    program of 16 bits reads what an earlier kernel left in fp32.
    """
    if step.bytes > 2:
        return "fma" if plan.dtype is torch.float32 else "tf32"
    return "wgmma" if plan.config.block_m >= 64 and plan.config.num_warps >= 4 else "mma"


def elements(plan: KernelPlan, axes: Iterable[Axis]) -> int:
    """Of a tile over some axes."""
    sizes = plan.sizes
    return math.prod(sizes[a] for a in axes)


# -- registers ------------------------------------------------------------------------------------------------------


def registers(plan: KernelPlan, tapes: list[Tape]) -> Registers:
    """The most that any sweep wants."""
    return max((_of_tape(plan, t) for t in tapes), key=lambda r: r.hot + r.cold)


def _of_tape(plan: KernelPlan, tape: Tape) -> Registers:
    state = sum(_held(plan, frozenset(d.axes) & set(plan.tile_axes), 4) for d in tape.states)
    addresses = sum(_address_registers(plan, s) for s in tape.steps if _streams(s))
    return Registers(state + _operands(plan, tape) + _peak(plan, tape), ADDRESSES + addresses)


def _operands(plan: KernelPlan, tape: Tape) -> float:
    """Weights in the type of the values: a product still reads them while the next are made."""
    made = {s.key: s for s in tape.steps if s.kind != "load"}
    lefts = {s.reads[0]: s.bytes for s in tape.steps if s.kind == "product" and s.reads[0] in made}
    return sum(_held(plan, made[key].axes, size) for key, size in lefts.items() if size == 2)


def _held(plan: KernelPlan, axes: Iterable[Axis], size: int) -> float:
    """Registers of a thread for its part of a tile."""
    if not axes:
        return 1
    share = elements(plan, axes) * size / 4 / threads(plan)
    return max(1, share) if len(axes) > 1 else max(1, share * QUAD)


def _streams(step: Step) -> bool:
    """A tile loaded anew for every part of the stream."""
    return step.kind == "load" and step.moves and len(step.axes) > 1


def _address_registers(plan: KernelPlan, step: Step) -> float:
    """A 64-bit address for each vector that a thread loads; none for a box."""
    if isinstance(step.key, Load) and box_of(plan, step.key):
        return 0
    return 2 * max(1, elements(plan, step.axes) * step.bytes / VECTOR / threads(plan))


def _peak(plan: KernelPlan, tape: Tape) -> float:
    """The most that tiles take which are alive at once.

    Pointwise steps are free: they go element by element. What counts is alive across a product or a reduction, which
    needs a whole tile.
    """
    lives = _lives(tape)
    barriers = [(at, s) for at, s in enumerate(tape.steps) if s.kind in ("product", "fold")]
    return max((_alive(plan, lives, at) + _fragments(plan, step) for at, step in barriers), default=0)


@dataclass(frozen=True)
class _Life:
    """When a value is made, and when it is read, other than by products in the type of their operands."""

    step: Step
    made: int
    others: tuple[int, ...]

    def size(self, at: int) -> int:
        """Bytes of an element held at a step."""
        return self.step.bytes if any(k >= at for k in self.others) else 0


def _lives(tape: Tape) -> list[_Life]:
    others: dict[Key, list[int]] = {}
    for at, step in enumerate(tape.steps):
        if step.kind != "product" or step.bytes != 2:
            for key in step.reads:
                others.setdefault(key, []).append(at)
    in_memory = {key for s in tape.steps if s.kind == "product" for key in s.reads} - {
        key for s in tape.steps if s.kind != "product" for key in s.reads
    }
    return [
        _Life(s, at, tuple(others.get(s.key, ())))
        for at, s in enumerate(tape.steps)
        if not (s.kind == "load" and s.key in in_memory)
    ]


def _alive(plan: KernelPlan, lives: list[_Life], at: int) -> float:
    """Registers for tiles made by step `at` and read from it on; what does not move lives throughout."""
    total = 0.0
    for life in lives:
        if len(life.step.axes) < 2 or life.step.bytes == 1:  # masks are computed where they are used
            continue
        size = life.size(at) if life.step.moves else life.step.bytes * bool(life.others)
        if size and life.made <= at:
            total += _held(plan, life.step.axes, size)
    return total


def _fragments(plan: KernelPlan, step: Step) -> float:
    """Registers for operands where the matrix unit reads them from there."""
    if step.kind != "product" or unit(plan, step) == "wgmma":
        return 0
    depth = elements(plan, step.over - step.axes)
    share = max(1, elements(plan, step.axes) // threads(plan))
    if unit(plan, step) == "fma":
        rows = 1 << (share.bit_length() - 1) // 2
        return depth * (rows + share // rows) * step.bytes / 4
    rows = min(elements(plan, step.axes & set(plan.rows)), 16)
    columns = elements(plan, step.axes) / rows / plan.config.num_warps
    return depth * (rows + columns) * step.bytes / 4 / WARP


# -- shared memory --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What differs in how Triton places operands; `rows` are those of one matrix instruction of a warp."""

    asynchronous: bool  # wgmma reads operands where they lie, and weights as they are
    rows: int


HOPPER, AMD = Machine(True, 16), Machine(False, 32)


def shared(plan: KernelPlan, tapes: list[Tape], machine: Machine = HOPPER) -> int:
    """Bytes of one program: tiles of its busiest sweep, or of the results on their way out."""
    loads = {s.key: s for t in tapes for s in t.steps if s.kind == "load"}
    return max(*(_Placed(plan, t, loads, machine).bytes for t in tapes), 1024)


class _Placed:
    """The tiles of a sweep in shared memory."""

    def __init__(self, plan: KernelPlan, tape: Tape, loads: dict[Key, Step], machine: Machine):
        self.plan, self.tape, self.loads, self.machine = plan, tape, loads, machine
        self.products = [s for s in tape.steps if s.kind == "product"]
        self.operands = {key: s for s in self.products for key in s.reads if key in loads}

    @property
    def bytes(self) -> int:
        if self.tape.sweep is None:
            passing = [s for s in self.tape.steps if s.kind in ("load", "store") and len(s.axes) > 1]
            return max(map(self._size, passing), default=0)
        fixed = [k for k in self.operands if not self._moves(k)]
        return sum(self._size(self.loads[k]) for k in fixed) + self._streamed() + self._weights() + self._staged()

    def _moves(self, key: Key) -> bool:
        return self.loads[key].moves or bool(self.loads[key].inner)

    def _size(self, step: Step) -> int:
        return elements(self.plan, step.axes) * step.bytes

    def _streamed(self) -> int:
        """Operands of the loop around, or of the loops inside a tile: only the innermost is pipelined."""
        together = sum if self.plan.config.num_stages > 1 else max  # one after the other where nothing is loaded ahead
        moving = [k for k in self.operands if self._moves(k)]
        groups = [[k for k in moving if bool(self.loads[k].inner) is deep] for deep in (True, False)]
        return max(together([0, *(self._copies(k) * self._size(self.loads[k]) for k in group)]) for group in groups)

    def _copies(self, key: Key) -> int:
        """Buffers of an operand: wgmma reads one while the next is written; others have it in registers by then."""
        if any(p.inner for p in self.products) and not self.loads[key].inner:
            return 1
        return max(1, self.plan.config.num_stages - (not self._in_place(self.operands[key])))

    def _in_place(self, product: Step) -> bool:
        return self.machine.asynchronous and unit(self.plan, product) == "wgmma"

    def _weights(self) -> int:
        """The largest tile of weights that changes its layout on the way to its product."""
        computed = [s for s in self.products if s.reads[0] not in self.loads and self._moved(s)]
        tiles = [elements(self.plan, s.over - (s.axes & set(self.plan.features))) * s.bytes for s in computed]
        return max(tiles, default=0)

    def _moved(self, product: Step) -> bool:
        """wgmma takes weights from where they are; on AMD warps keep them where they have rows of their own."""
        if self.machine.asynchronous:
            return not self._in_place(product)
        return product.bytes > 2 or self.plan.config.block_m < self.machine.rows * self.plan.config.num_warps

    def _staged(self) -> int:
        """Other tiles that are loaded ahead: biases."""
        if self.plan.config.num_stages < 2 or not self.machine.asynchronous:
            return 0
        others = [s for s in self.tape.steps if _streams(s) and s.key not in self.operands and s.bytes > 1]
        return sum(self._size(s) for s in others) * (self.plan.config.num_stages - 1)
