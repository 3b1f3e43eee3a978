"""A chain computed as its kernel computes it: the stream in blocks, a running state, T where a maximum moves.

This is the reference of what `emit/writer.py` writes, guards included; `prove.py` compares it with the program.
"""

from __future__ import annotations

import math

import torch

from rewriter.derive.chain import Chain, Definition
from rewriter.derive.sampled import Sampled
from rewriter.ir import Output
from rewriter.ir.ops import MONOIDS, OPS

State = dict[str, torch.Tensor]


class Online:
    """Runs a chain over parts of its stream. A state holds one tensor per definition, over the axes `rows`."""

    def __init__(self, chain: Chain, evaluator: Sampled):
        self.chain, self.evaluator = chain, evaluator
        self.rows = evaluator.rows

    def empty(self) -> State:
        ones = (1,) * len(self.rows)
        return {
            d.name: torch.tensor(MONOIDS[d.op].neutral, dtype=self._held(d)).reshape(ones)
            for d in self.chain.definitions
        }

    def _held(self, definition: Definition) -> torch.dtype:
        return torch.float64 if definition.body.dtype.is_floating_point else definition.body.dtype

    def advanced(self, old: State, positions: torch.Tensor) -> State:
        """The state after one more block."""
        self.evaluator.at[self.chain.stream] = positions
        new = dict(old)
        for definition in self.chain.definitions:
            block = self._block(definition, new)
            moved = self._moved(definition, old, new)
            new[definition.name] = OPS[MONOIDS[definition.op].combine].torch(moved, block)
        return new

    def merged(self, a: State, b: State) -> State:
        """The state of two parts of the stream together."""
        new = dict(a)
        for definition in self.chain.definitions:
            sides = [self._moved(definition, side, new) for side in (a, b)]
            new[definition.name] = OPS[MONOIDS[definition.op].combine].torch(*sides)
        return new

    def output(self, output: Output, state: State) -> torch.Tensor:
        self.evaluator.refs = state
        value = self.evaluator.value(output.body, self.rows)
        lengths = [self.evaluator.length(a) if a in output.axes else 1 for a in self.rows]
        return value.expand(lengths).reshape([self.evaluator.length(a) for a in output.axes])

    def _block(self, definition: Definition, new: State) -> torch.Tensor:
        """⊕ over the block alone, the exponent shifted by the newest Φ."""
        if definition.shift is None:
            return self._reduced(
                definition.op,
                self._masked(definition, definition.body, MONOIDS[definition.op].neutral),
            )
        exponent = self._masked(definition, definition.shift.exponent, -math.inf)
        weight = torch.exp(exponent - self._settled(definition, new)[..., None])
        for factor in definition.rest:
            weight = weight * self._over_block(factor)
        return self._reduced(definition.op, weight)

    def _reduced(self, op: str, value: torch.Tensor) -> torch.Tensor:
        length = self.evaluator.length(self.chain.stream)
        return MONOIDS[op].torch(value.expand(*value.shape[:-1], length), -1)

    def _masked(self, definition: Definition, node, neutral) -> torch.Tensor:
        value = self._over_block(node)
        return torch.where(
            self._over_block(definition.predicate), value, torch.tensor(neutral, dtype=value.dtype)
        )

    def _over_block(self, node) -> torch.Tensor:
        return self.evaluator.value(node, (*self.rows, self.chain.stream))

    def _moved(self, definition: Definition, old: State, new: State) -> torch.Tensor:
        """acc · T(old → new), T = exp(Φ(old) − Φ(new))"""
        value = old[definition.name]
        if definition.shift is None:
            return value
        return value * torch.exp(self._phi(definition, old) - self._settled(definition, new))

    def _phi(self, definition: Definition, state: State) -> torch.Tensor:
        self.evaluator.refs = state
        return self.evaluator.value(definition.shift.phi, self.rows)

    def _settled(self, definition: Definition, state: State) -> torch.Tensor:
        """Φ, with 0 while nothing but −inf has been seen: exp(−inf − 0) is 0, exp(−inf + inf) would be NaN."""
        phi = self._phi(definition, state)
        return torch.where(phi == -math.inf, 0.0, phi)
