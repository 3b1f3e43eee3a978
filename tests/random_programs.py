"""Attention programs drawn at random, as source text: what a user might write, each line one choice of several.

Nothing here knows what the rewriter supports. Letters name dimensions: batch b, query heads h, key heads g, queries m,
keys n, width of queries and keys d, width of values e.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

HEADER = """\
import math

import torch
import torch.nn.functional as F


"""
WEIGHTS = (
    "softmax",
    "softmax_by_hand",
    "exp_without_maximum",
    "softmax_one",
    "sink",
    "sigmoid",
    "relu",
    "relu_squared",
)


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


@dataclass(frozen=True)
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


class Author:
    """Writes one program, from the arguments to the return statement."""

    def __init__(self, draw: Callable, weights: str):
        self.draw, self.weights = draw, weights
        self.lines: list[str] = []
        self.inputs: dict[str, Input] = {}
        self.q, self.k, self.v = self.one(*LAYOUTS)  # dimensions, in their order in memory
        self.axes = "".join(a for a in "bh" if a in self.q) + "mn"  # of the scores
        self.square = False  # as many keys as queries
        self.has_positions = False

    # --- helpers

    def one(self, *options):
        return self.draw(st.sampled_from(options))

    def coin(self) -> bool:
        return self.draw(st.booleans())

    def say(self, *lines: str) -> None:
        self.lines += lines

    def input(self, name: str, dims: str, kind: str = "number") -> str:
        self.inputs[name] = Input(dims, kind)
        return name

    def spread(self, name: str, dims: str) -> str:
        """`name` indexed so that it broadcasts against the scores."""
        axes = self.axes if self.coin() else self.axes[self.axes.index(dims[0]) :]
        if axes == dims:
            return name
        return f"{name}[{', '.join(':' if a in dims else 'None' for a in axes)}]"

    def positions(self) -> None:
        """`i` and `j`: the query's position and the key's, against each other."""
        if not self.has_positions:
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

    # --- the program, in order

    def write(self, group: int) -> None:
        for name, dims in zip("qkv", (self.q, self.k, self.v), strict=True):
            self.input(name, dims)
        body_starts = len(self.lines)
        if group > 1:
            self._repeat_heads(group)
        self._scores()
        self._change_scores()
        keep = self._mask() if self.one(True, True, False) else ""
        fills = keep and self.coin()
        if fills:
            self._fill(keep)
        p, divisor = getattr(self, f"_{self.weights}")()
        if keep and not fills:
            p, divisor = self._multiply(p, keep, divisor)
        self._output(p, divisor)
        self.lines[body_starts:] = [f"    {line}" for line in self.lines[body_starts:]]

    def _repeat_heads(self, group: int) -> None:
        """Keys and values get the queries' heads."""
        at = self.k.index("g")
        spelling = self.one("repeat_interleave", "expand", "stack")
        for t, dims in (("k", self.k), ("v", self.v)):
            if spelling == "repeat_interleave":
                self.say(f"{t} = {t}.repeat_interleave({group}, dim={at})")
            elif spelling == "stack":
                self.say(f"{t} = torch.stack([{t}] * {group}, dim={at + 1}).flatten({at}, {at + 1})")
            else:
                sizes = ["-1"] * len(dims)
                sizes.insert(at + 1, str(group))
                wide = f"{t}.unsqueeze({at + 1}).expand({', '.join(sizes)})"
                self.say(f"{t} = {wide}.flatten({at}, {at + 1})")

    def _heads_first(self) -> None:
        """q, k and v in the order of the scores' axes."""
        lead = self.axes[:-2]
        if self.q[: len(lead)] == lead:
            return
        first = len(lead) - 1
        for t in "qkv":
            self.say(f"{t} = {t}.transpose({first}, {first + 1})")
        self.q, self.k, self.v = lead + "md", lead + "nd", lead + "ne"

    def _scores(self) -> None:
        self.k, self.v = self.k.replace("g", "h"), self.v.replace("g", "h")
        scale = self.one("after", "divided", "before", "key", "none", "sqrt_twice")
        if scale == "before":
            self.say(self.one("q = q * q.shape[-1] ** -0.5", "q = q / math.sqrt(q.shape[-1])"))
        elif scale == "key":
            self.say("k = k * 0.25")
        elif scale == "sqrt_twice":
            self.say("root = q.shape[-1] ** -0.25", "q, k = q * root, k * root")
        text = self._product()
        text += {"after": " * q.shape[-1] ** -0.5", "divided": " / math.sqrt(q.size(-1))"}.get(scale, "")
        self.say(f"s = {text}")

    def _product(self) -> str:
        """q times k."""
        rank = len(self.axes)
        spelling = self.one("einsum", "matmul", "bmm")
        if spelling == "einsum":
            return f'torch.einsum("{self.q},{self.k}->{self.axes}", q, k)'
        self._heads_first()
        turned = self.one("k.transpose(-1, -2)", "k.mT")
        if spelling == "matmul" or rank == 2:
            return self.one(f"(q @ {turned})", f"torch.matmul(q, {turned})")
        if rank == 3:
            return self.one(f"torch.bmm(q, {turned})", f"q.bmm({turned})")
        self.say("b, h = q.shape[:2]", "qs, ks = q.flatten(0, 1), k.flatten(0, 1)")
        product = "torch.bmm(qs, ks.transpose(1, 2))"
        return self.one(f"{product}.unflatten(0, (b, h))", f"{product}.view(b, h, *{product}.shape[1:])")

    def _change_scores(self) -> None:
        """A cap and biases, in either order."""
        changes = [self._cap, self._bias, self._distance]
        for change in self.draw(st.permutations(changes)):
            if self.one(False, True, False):
                change()

    def _cap(self) -> None:
        cap = self.one("5.0", "2.5", "20")
        self.say(
            self.one(
                f"s = {cap} * torch.tanh(s / {cap})",
                f"s = (s / {cap}).tanh() * {cap}",
                f"s = torch.tanh(s * (1 / {cap})).mul({cap})",
            )
        )

    def _bias(self) -> None:
        dims = self.one(*(d for d in BIASES if set(d) <= set(self.axes)))
        bias = self.spread(self.input("bias", dims), dims)
        self.say(self.one(f"s = s + {bias}", f"s = {bias} + s", f"s = torch.add(s, {bias}, alpha=0.5)"))

    def _distance(self) -> None:
        self.positions()
        slope = self.one("0.125", "0.3")
        if "h" in self.axes and self.coin():
            slope = f"{self.input('slopes', 'h', 'slope')}[:, None, None]"
        self.say(
            self.one(
                f"s = s - {slope} * (i - j).abs()",
                f"s = s + {slope} * (j - i)",
                f"s = s - {slope} * torch.log1p((i - j).abs().float())",
                f"s = s + {slope} * -(j - i).abs().clamp(max=7).to(s.dtype)",
            )
        )

    # --- masks

    def _mask(self) -> str:
        """The name of a predicate made of one to three others."""
        text = self._predicate()
        for _ in range(self.one(0, 1, 1, 2)):
            other = self._predicate()
            text = self.one(
                f"({text}) & ({other})",
                f"({text}) | ({other})",
                f"torch.logical_and({text}, {other})",
                f"~(({text}) & ~({other}))",
            )
        self.say(f"keep = {text}")
        if self.one(True, True, False):  # no row is masked throughout
            self.positions()
            self.say("keep = keep | (j == 0)")
        return "keep"

    def _predicate(self) -> str:
        self.positions()
        makers = [self._affine, self._affine, self._documents, self._loaded]
        return self.one(*makers, *([self._lengths] if "b" in self.axes else []))()

    def _affine(self) -> str:
        w = self.one(3, 7, 10)
        return self.one(
            "j <= i",
            "~(j > i)",
            f"(i - j).abs() < {w}",
            f"(j > i - {w}) & (j <= i)",
            f"(j <= i) | (j < {w})",
            f"(i - j) % {w} == 0",
            f"j % {w} != 1",
            f"i // {w} == j // {w}",
            f"torch.div(i, {w}, rounding_mode='floor') >= torch.div(j, {w}, rounding_mode='floor')",
        )

    def _documents(self) -> str:
        self.square = True
        dims = self.one("n", "bn") if "b" in self.axes else "n"
        name = self.input("ids_of_batch" if "b" in dims else "ids", dims, "documents")
        rows, columns = (dims.replace("n", "m"), self.axes), (dims, self.axes)
        left, right = (f"{name}[{', '.join(':' if a in d else 'None' for a in axes)}]" for d, axes in (rows, columns))
        return f"{left} == {right}"

    def _lengths(self) -> str:
        name = self.input("lengths", "b", "length")
        return f"j < {name}[{', '.join([':', *['None'] * (len(self.axes) - 1)])}]"

    def _loaded(self) -> str:
        dims = self.one(*(d for d in ("mn", "bn", "bmn", "n") if set(d) <= set(self.axes)))
        return self.spread(self.input(f"live_{dims}", dims, "keep"), dims)

    def _fill(self, keep: str) -> None:
        self.say(
            *self.one(
                [f's = s.masked_fill(~{keep}, float("-inf"))'],
                [f"s = torch.where({keep}, s, -math.inf)"],
                [f's = s + torch.zeros_like(s).masked_fill({keep}.logical_not(), float("-inf"))'],
                [f"s = s.masked_fill({keep} == 0, -1e9)"],
                [f"s = torch.where({keep}, s, torch.finfo(s.dtype).min)"],
                [f"s = s + (1.0 - {keep}.to(s.dtype)) * -10000.0"],
            )
        )

    def _multiply(self, p: str, keep: str, divisor: str) -> tuple[str, str]:
        """Weights that are masked only now; `divisor`, if any, is what was summed before."""
        self.say(
            self.one(
                f"{p} = {p} * {keep}",
                f"{p} = {p}.masked_fill(~{keep}, 0.0)",
                f"{p} = torch.where({keep}, {p}, 0.0)",
                f"{p} = {p} * {keep}.to({p}.dtype)",
            )
        )
        if not divisor and self.coin():  # the rest is made to sum to one
            self.say(f"{p} = {p} / ({p}.sum(-1, keepdim=True) + 1e-6)")
        return p, divisor

    # --- weights: each gives (name of the weights, what their product with v is still to be divided by)

    def _softmax(self) -> tuple[str, str]:
        self.say(
            self.one(
                "p = torch.softmax(s, dim=-1)",
                "p = s.softmax(-1)",
                "p = F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype)",
                "p = torch.exp(F.log_softmax(s, -1))",
                "p = torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True))",
            )
        )
        return "p", ""

    def _softmax_by_hand(self) -> tuple[str, str]:
        self.say(
            self.one(
                "top = s.max(dim=-1, keepdim=True).values",
                "top = s.amax(-1, keepdim=True).detach()",
                "top = torch.max(s, -1, keepdim=True)[0]",
            ),
            self.one("p = torch.exp(s - top)", "p = (s - top).exp()"),
        )
        return self._divided("p.sum(-1, keepdim=True)")

    def _exp_without_maximum(self) -> tuple[str, str]:
        self.say(self.one("p = s.exp()", "p = torch.exp(s)", "p = 2.0 ** (s * 1.4426950408889634)"))
        return self._divided(self.one("p.sum(-1, keepdim=True)", "torch.sum(p, -1).unsqueeze(-1)"))

    def _softmax_one(self) -> tuple[str, str]:
        if self.coin():
            self.say("p = torch.exp(s)")
            return self._divided("(1 + p.sum(-1, keepdim=True))")
        self.say("top = s.amax(-1, keepdim=True).clamp(min=0)", "p = torch.exp(s - top)")
        return self._divided("(torch.exp(-top) + p.sum(-1, keepdim=True))")

    def _divided(self, total: str) -> tuple[str, str]:
        """Early, or late: after the product with v."""
        if self.coin():
            self.say(self.one(f"p = p / {total}", f"p = p * (1 / {total})"))
            return "p", ""
        self.say(f"total = {total}")
        return "p", "total"

    def _sink(self) -> tuple[str, str]:
        dims = "h" if "h" in self.axes else "m"
        sink = self.input("sink", dims)
        shape = ", ".join(":" if a in dims else "None" for a in self.axes)
        self.say(f"column = {sink}[{shape}].expand(*s.shape[:-1], 1)")
        first = self.coin()
        self.say(f"s = torch.cat({'(column, s)' if first else '(s, column)'}, dim=-1)")
        self.say(f"p = torch.softmax(s, -1)[..., {'1:' if first else ':-1'}]")
        return "p", ""

    def _sigmoid(self) -> tuple[str, str]:
        self.say(self.one("p = torch.sigmoid(s)", "p = F.sigmoid(s - 2.0)", "p = 1 / (1 + torch.exp(-s))"))
        return "p", ""

    def _relu(self) -> tuple[str, str]:
        self.say(self.one("p = torch.relu(s)", "p = F.relu(s)", "p = s.clamp(min=0)"))
        return self._by_length()

    def _relu_squared(self) -> tuple[str, str]:
        self.say(self.one("p = F.relu(s).square()", "p = torch.relu(s) ** 2"))
        return self._by_length()

    def _by_length(self) -> tuple[str, str]:
        total = self.one("", "s.shape[-1]", "(p.sum(-1, keepdim=True) + 1e-6)")
        if total:
            self.say(f"p = p / {total}")
        return "p", ""

    # --- output

    def _output(self, p: str, divisor: str) -> None:
        lead = self.axes[:-2]
        rows = lead + "me"
        if divisor or self.v[: len(lead)] == lead or self.coin():
            self._weighted(p, rows)
        else:
            rows = self.q.replace("d", "e")
            self.say(f'out = torch.einsum("{self.axes},{self.v}->{rows}", {p}, v)')
        if divisor:
            self.say(f"out = out / {divisor}")
        if self.coin():
            gate = self.input("gate", rows)
            self.say(self.one(f"out = out * torch.sigmoid({gate})", f"out = F.silu({gate}) * out"))
        if rows == "bhme" and self.coin():
            self.say("out = out.transpose(1, 2).flatten(-2)")
        self.say("return out")

    def _weighted(self, p: str, rows: str) -> None:
        """The weights times v, in the order of the scores' axes."""
        if self.v[: len(rows) - 2] != rows[:-2] or self.coin():
            self.say(f'out = torch.einsum("{self.axes},{self.v}->{rows}", {p}, v)')
        elif len(rows) == 3:
            self.say(self.one(f"out = torch.bmm({p}, v)", f"out = {p} @ v"))
        else:
            self.say(self.one(f"out = {p} @ v", f"out = torch.matmul({p}, v)"))


LAYOUTS = (
    ("bhmd", "bgnd", "bgne"),
    ("bmhd", "bngd", "bnge"),
    ("bmd", "bnd", "bne"),
    ("mhd", "ngd", "nge"),
    ("md", "nd", "ne"),
)
BIASES = ("mn", "hmn", "bmn", "bn", "n", "m", "h", "bhmn", "bm")
