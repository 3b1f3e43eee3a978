"""A chain computed as its kernels compute it: each stream in blocks, a running state, T where a maximum moves.

This is the reference of what `emit/writer.py` writes, guards included; `prove.py` compares it with the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby

import torch

from rewriter.derive.chain import Chain, Definition
from rewriter.derive.sampled import Sampled
from rewriter.ir import Axis, Node, Output
from rewriter.ir.ops import MONOIDS, OPS, neutral_of

State = dict[str, torch.Tensor]
Blocks = Callable[[Axis], list[torch.Tensor]]


class Online:
    """Runs a chain over parts of its streams. A state holds one tensor per definition, over that definition's axes."""

    def __init__(self, chain: Chain, evaluator: Sampled):
        self.chain, self.evaluator = chain, evaluator

    def in_blocks(self, blocks: Blocks) -> State:
        """Every definition's final value, its stream block after block."""
        state: State = {}
        for group in self.groups():
            state |= self._advanced_over(group, blocks(group[0].stream), state)
        return state

    def in_halves(self, blocks: Blocks, cut: Callable[[int], int]) -> State:
        """The same from two parts of each stream, merged; a part may be empty."""
        state: State = {}
        for group in self.groups():
            parts = blocks(group[0].stream)
            at = cut(len(parts))
            halves = [self._advanced_over(group, part, state) for part in (parts[:at], parts[at:])]
            state |= self._merged(group, *halves, state)
        return state

    def groups(self) -> list[list[Definition]]:
        """The definitions that run together: those of one sweep over one stream."""
        ordered = sorted(self.chain.definitions, key=lambda d: (d.sweep, self.chain.axes.index(d.stream)))
        return [list(g) for _, g in groupby(ordered, key=lambda d: (d.sweep, d.stream))]

    def output(self, output: Output, state: State) -> torch.Tensor:
        self.evaluator.state = state
        value = self.evaluator.value(output.body, output.axes)
        return value.expand([self.evaluator.length(a) for a in output.axes])

    def _advanced_over(self, group: list[Definition], blocks: list[torch.Tensor], ended: State) -> State:
        running = {d.name: self._neutral(d) for d in group}
        stream = group[0].stream
        whole = self.evaluator.at[stream]
        for block in blocks:
            self.evaluator.at[stream] = block
            running = self._advanced(group, running, ended)
        self.evaluator.at[stream] = whole
        return running

    def _neutral(self, definition: Definition) -> torch.Tensor:
        dtype = definition.body.dtype
        held = torch.float64 if dtype.is_floating_point else dtype
        shape = [self.evaluator.length(a) for a in definition.axes]
        return torch.full(shape, neutral_of(definition.op, dtype), dtype=held)

    def _advanced(self, group: list[Definition], old: State, ended: State) -> State:
        """The state after one more block."""
        new = dict(old)
        for definition in group:
            block = self._block(definition, ended | new)
            moved = self._moved(definition, ended | old, ended | new)
            new[definition.name] = OPS[MONOIDS[definition.op].combine].torch(moved, block)
        return new

    def _merged(self, group: list[Definition], a: State, b: State, ended: State) -> State:
        """The state of two parts of the stream together."""
        new = dict(a)
        for definition in group:
            sides = [self._moved(definition, ended | side, ended | new) for side in (a, b)]
            new[definition.name] = OPS[MONOIDS[definition.op].combine].torch(*sides)
        return new

    def _block(self, definition: Definition, state: State) -> torch.Tensor:
        """⊕ over the block alone, the exponent shifted by the newest Φ."""
        self.evaluator.state = state
        shift, neutral = definition.shift, neutral_of(definition.op, definition.body.dtype)
        if shift is None:
            return self._reduced(definition, self._masked(definition, definition.body, neutral))
        exponent = self._masked(definition, shift.exponent, -math.inf)
        inner = exponent - self._settled(definition, state)[..., None]
        weight = torch.exp(inner)
        if shift.mass:
            weight = torch.where(self._over_block(definition, definition.predicate), weight * inner, 0.0)
        for factor in definition.rest:
            weight = weight * self._over_block(definition, factor)
        return self._reduced(definition, weight)

    def _reduced(self, definition: Definition, value: torch.Tensor) -> torch.Tensor:
        lengths = [self.evaluator.length(a) for a in (*definition.axes, definition.stream)]
        return MONOIDS[definition.op].torch(value.expand(lengths), -1)

    def _masked(self, definition: Definition, node: Node, neutral: float) -> torch.Tensor:
        value = self._over_block(definition, node)
        keep = self._over_block(definition, definition.predicate)
        return torch.where(keep, value, torch.tensor(neutral, dtype=value.dtype))

    def _over_block(self, definition: Definition, node: Node) -> torch.Tensor:
        return self.evaluator.value(node, (*definition.axes, definition.stream))

    def _moved(self, definition: Definition, old: State, new: State) -> torch.Tensor:
        """acc · T(old → new), T = exp(Φ(old) − Φ(new)); a moment moves with its mass, a variance with its mean, a
        selection with its extremum"""
        value, shift = old[definition.name], definition.shift
        if definition.extremum:
            before, now = (self._at(definition.extremum, definition, state) for state in (old, new))
            return torch.where(before == now, value, self._neutral(definition))
        if definition.centre:
            value = value + self._gained(definition, old, new)
        if shift is None:
            return value
        gone = torch.exp(self._phi(definition, old) - self._settled(definition, new))
        if shift.mass:
            delta = self._settled(definition, old) - self._settled(definition, new)
            value = value + delta * self._at(shift.mass, definition, old)
        return value * gone

    def _gained(self, definition: Definition, old: State, new: State) -> torch.Tensor:
        """What a moment about a mean gains where that falls by δ: δ · mass, δ · (2 · first + δ · mass)"""
        centre = definition.centre
        before, now = (self._at(centre.mean, definition, state) for state in (old, new))
        delta, mass = before - now, self._at(centre.mass, definition, old)
        if centre.first is None:
            return delta * mass
        return delta * (2 * self._at(centre.first, definition, old) + delta * mass)

    def _at(self, node: Node, definition: Definition, state: State) -> torch.Tensor:
        self.evaluator.state = state
        return self.evaluator.value(node, definition.axes)

    def _phi(self, definition: Definition, state: State) -> torch.Tensor:
        return self._at(definition.shift.phi, definition, state)

    def _settled(self, definition: Definition, state: State) -> torch.Tensor:
        """Φ, with 0 while nothing but −inf has been seen: exp(−inf − 0) is 0, exp(−inf + inf) would be NaN."""
        phi = self._phi(definition, state)
        return torch.where(phi == -math.inf, 0.0, phi)
