"""A program while it is written: its lines, its arguments, and what all parts of it need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Input:
    """A tensor argument: its dimensions by letter, and what its values mean."""

    dims: str
    kind: str = "number"  # number, slope, documents, length or keep

    def make(self, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
        shape = [sizes[d] for d in self.dims]
        if self.kind == "documents":  # rising, several tokens each
            return (torch.rand(shape, generator=generator) < 0.2).cumsum(-1)
        if self.kind == "length":
            return torch.randint(1, sizes["n"] + 1, shape, generator=generator)
        if self.kind == "keep":
            return torch.rand(shape, generator=generator) < 0.6
        values = torch.randn(shape, generator=generator)
        return values.abs() * 0.2 if self.kind == "slope" else values


@dataclass(frozen=True, repr=False)
class RandomProgram:
    """A function `attend` as text, its arguments, and the two sets of sizes it is run at."""

    source: str
    inputs: dict[str, Input]
    traced: dict[str, int]
    other: dict[str, int]

    def arguments(self, sizes: dict[str, int]) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        return tuple(made.make(sizes, generator) for made in self.inputs.values())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}[{','.join(i.dims)}] ({i.kind})" for n, i in self.inputs.items())
        return f"\n{self.source}\n# {shapes}\n# traced at {self.traced}, then run at {self.other}\n"


class Words:
    """`lines` of the body and `inputs`; `q`, `k` and `v` are dimensions in their order in memory."""

    def __init__(self, draw: Callable, layout: tuple[str, str, str]):
        self.draw = draw
        self.lines: list[str] = []
        self.inputs: dict[str, Input] = {}
        self.q, self.k, self.v = layout
        self.axes = "".join(a for a in "bh" if a in self.q) + "mn"  # of the scores
        self.is_square = False  # as many keys as queries
        self.has_positions = False
        self.least = "1e-6"  # added to sums that are divided by: scores near zero are not exact enough for little

    def one(self, *options):
        return self.draw(st.sampled_from(options))

    def coin(self) -> bool:
        return self.draw(st.booleans())

    def say(self, *lines: str) -> None:
        self.lines += lines

    def input(self, name: str, dims: str, kind: str = "number") -> str:
        self.inputs[name] = Input(dims, kind)
        return name

    def any_of(self, *candidates: str) -> str:
        """One of those dimensions that the scores have."""
        return self.one(*(dims for dims in candidates if set(dims) <= set(self.axes)))

    def spread(self, name: str, dims: str) -> str:
        """`name` indexed so that it broadcasts against the scores; leading ones are written or not."""
        axes = self.axes if self.coin() else self.axes[self.axes.index(dims[0]) :]
        if axes == dims:
            return name
        return f"{name}[{', '.join(':' if a in dims else 'None' for a in axes)}]"

    def positions(self) -> None:
        """Defines `i` and `j`, the positions of query and key, once."""
        if self.has_positions:
            return
        self.has_positions = True
        rows, columns = self.q.index("m"), self.k.index("n")
        self.say(
            self.one(
                f"i = torch.arange(q.shape[{rows}], device=q.device)[:, None]",
                f"i = torch.arange(q.size({rows}), device=q.device).unsqueeze(-1)",
                f"i = torch.arange(q.shape[{rows}]).view(-1, 1)",
            ),
            self.one(
                f"j = torch.arange(k.shape[{columns}], device=k.device)[None, :]",
                f"j = torch.arange(0, k.size({columns}))[None]",
                f"j = torch.arange(k.shape[{columns}], device=k.device)",
            ),
        )
