"""One program after the other, from its arguments to its return statement."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from random_programs.masks import Masks
from random_programs.outputs import OUTPUTS, OVER_HEADS, Outputs
from random_programs.weights import Weights
from random_programs.words import RandomProgram

HEADER = """\
import math

import torch
import torch.nn.functional as F


def attend({arguments}):
{body}
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
LAYOUTS = (
    ("bhmd", "bgnd", "bgne"),
    ("bmhd", "bngd", "bnge"),
    ("bmd", "bnd", "bne"),
    ("mhd", "ngd", "nge"),
    ("md", "nd", "ne"),
)


HEADS = [(2, 1), (3, 1), (2, 2), (1, 4)]  # of keys, and queries' heads for each


@st.composite
def attention_programs(draw: Callable, weights: str) -> RandomProgram:
    """Programs whose weights are of one kind, a name in WEIGHTS."""
    author = Author(draw, draw(st.sampled_from(LAYOUTS)))
    key_heads, group = draw(st.sampled_from(HEADS))
    author.write(weights, group)
    return _finished(author, key_heads, group)


@st.composite
def wider_programs(draw: Callable, output: str) -> RandomProgram:
    """Programs of one to three outputs, one of them of the given kind, a name in OUTPUTS."""
    layouts = [layout for layout in LAYOUTS if "h" in layout[0] or output not in OVER_HEADS]
    author = Author(draw, draw(st.sampled_from(layouts)))
    key_heads, group = draw(st.sampled_from(HEADS))
    author.write_wider(output, group)
    return _finished(author, key_heads, group)


def _finished(author: Author, key_heads: int, group: int) -> RandomProgram:
    """What was written, with sizes to trace it at and others to run it at."""
    draw = author.draw
    body = "\n".join(f"    {line}" for line in author.lines)
    source = HEADER.format(arguments=", ".join(author.inputs), body=body)
    width = draw(st.sampled_from([8, 16]))
    fixed = {
        "h": key_heads * group,
        "g": key_heads,
        "d": width,
        "e": draw(st.sampled_from([width, 12])),
    }
    lengths = [draw(st.integers(5, 40)) for _ in range(2)]
    traced, other = ({"b": draw(st.integers(1, 2)), "m": m, "n": m} for m in lengths)
    if not author.is_square:
        traced["n"], other["n"] = (draw(st.integers(5, 40)) for _ in range(2))
    return RandomProgram(source, author.inputs, fixed | traced, fixed | other)


class Author(Masks, Weights, Outputs):
    """Writes a program in the order in which it is read. `group`: query heads for a key head that is not repeated."""

    group = 0

    def write(self, weights: str, group: int) -> None:
        self._arguments(group, may_share=True)
        self._scores()
        self._change_scores()
        keep = self.mask() if self.one(True, True, False) else ""
        fills, multiplies = self.one((True, False), (False, True), (True, True))
        if keep and fills:
            self.fill(keep)
        divisor = getattr(self, weights)()
        if keep and multiplies:
            self.multiply("p", keep, is_divided=not divisor)
        self._output(divisor)

    def write_wider(self, output: str, group: int) -> None:
        self._arguments(group, may_share=False)
        self.one(self._scores, self._scores, self._distances)()
        self._change_scores()
        if self.coin():
            self.fill(self.mask())
        self.softmax()
        fitting = [kind for kind in ("plain", *OUTPUTS) if "h" in self.axes or kind not in OVER_HEADS]
        others = self.draw(st.lists(st.sampled_from(fitting), max_size=2, unique=True))
        made = [getattr(self, kind)() for kind in dict.fromkeys([output, *others])]
        self.say(f"return {', '.join(made)}")

    def _arguments(self, group: int, may_share: bool) -> None:
        for name, dims in zip("qkv", (self.q, self.k, self.v), strict=True):
            self.input(name, dims)
        is_grouped = group > 1 and "h" in self.axes
        self.group = group if is_grouped and may_share and self.coin() else 0
        if is_grouped and not self.group:
            self._repeat_heads(group)
        if not self.group:
            self.k, self.v = self.k.replace("g", "h"), self.v.replace("g", "h")

    def _repeat_heads(self, group: int) -> None:
        """Keys and values get as many heads as the queries have."""
        at = self.k.index("g")
        sizes = ["-1"] * len(self.k)
        sizes.insert(at + 1, str(group))
        spelling = self.one(
            f"{{t}}.repeat_interleave({group}, dim={at})",
            f"torch.stack([{{t}}] * {group}, dim={at + 1}).flatten({at}, {at + 1})",
            f"{{t}}.unsqueeze({at + 1}).expand({', '.join(sizes)}).flatten({at}, {at + 1})",
        )
        self.say(*(f"{t} = {spelling.format(t=t)}" for t in "kv"))

    def _heads_first(self) -> None:
        """q, k and v in the order of the scores' axes."""
        lead = self.axes[:-2]
        if not self.q.startswith(lead):
            at = len(lead) - 1
            self.say(*(f"{t} = {t}.transpose({at}, {at + 1})" for t in "qkv"))
            self.q, self.k, self.v = lead + "md", lead + "nd", lead + "ne"

    def _scores(self) -> None:
        before, after = self.one(
            ("", " * q.shape[-1] ** -0.5"),
            ("", " / math.sqrt(q.size(-1))"),
            ("q = q * q.shape[-1] ** -0.5", ""),
            ("q = q / math.sqrt(q.shape[-1])", ""),
            ("k = k * 0.25", ""),
            ("q, k = q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25", ""),
            ("", ""),
        )
        if before:
            self.say(before)
        product = self._product()
        self.say(f"s = {product}{after}")

    def _distances(self) -> None:
        """Scores are squared distances, by broadcasting."""
        self._heads_first()
        self.say(
            self.one(
                "s = -((q.unsqueeze(-2) - k.unsqueeze(-3)) ** 2).sum(-1) / 4",
                "s = -0.5 * (q[..., :, None, :] - k[..., None, :, :]).square().mean(-1)",
                "s = -torch.cdist(q, k)",
            )
        )

    def _product(self) -> str:
        """q times k."""
        if self.group:
            at, heads = self.q.index("h"), self.axes.index("h")
            equation = f"{self.q},{self.k}->{self.axes}".replace("h", "gr")
            folded = f"q.unflatten({at}, (-1, {self.group}))"
            return f'torch.einsum("{equation}", {folded}, k).flatten({heads}, {heads + 1})'
        spelling = self.one("einsum", "matmul", "bmm")
        if spelling == "einsum":
            return f'torch.einsum("{self.q},{self.k}->{self.axes}", q, k)'
        self._heads_first()
        turned = self.one("k.transpose(-1, -2)", "k.mT")
        if spelling == "matmul" or len(self.axes) == 2:
            return self.one(f"(q @ {turned})", f"torch.matmul(q, {turned})")
        if len(self.axes) == 3:
            return self.one(f"torch.bmm(q, {turned})", f"q.bmm({turned})")
        self.say("b, h, m, n = *q.shape[:3], k.shape[2]")
        product = "torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))"
        return self.one(f"{product}.unflatten(0, (b, h))", f"{product}.view(b, h, m, n)")

    def _change_scores(self) -> None:
        """A cap and biases, in any order."""
        for change in self.draw(st.permutations([self._cap, self._bias, self._distance])):
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
        dims = self.any_of("mn", "hmn", "bmn", "bn", "n", "m", "h", "bhmn", "bm")
        bias = self.spread(self.input("bias", dims), dims)
        self.say(self.one(f"s = s + {bias}", f"s = {bias} + s", f"s = torch.add(s, {bias}, alpha=0.5)"))

    def _distance(self) -> None:
        """A penalty that grows with the distance of query and key."""
        self.positions()
        slope = self.one("0.125", "0.3")
        if "h" in self.axes and self.coin():
            slope = f"{self.input('slopes', 'h', 'slope')}[:, None, None]"
        self.say(
            self.one(
                f"s = s - {slope} * (i - j).abs()",
                f"s = s + {slope} * (j - i)",
                f"s = s - {slope} * torch.log1p((i - j).abs().float())",
                f"s = s - {slope} * (j - i).abs().clamp(max=7).to(s.dtype)",
            )
        )

    def _output(self, divisor: str) -> None:
        lead = self.axes[:-2]
        rows = lead + "me"
        if self.group:
            self._weighted_groups(rows)
        elif divisor or self.v.startswith(lead) or self.coin():
            self._weighted(rows)
        else:
            rows = self.q.replace("d", "e")
            self.say(f'out = torch.einsum("{self.axes},{self.v}->{rows}", p, v)')
        if divisor:
            self.say(f"out = out / {divisor}")
        if self.coin():
            gate = self.input("gate", rows)
            self.say(self.one(f"out = out * torch.sigmoid({gate})", f"out = F.silu({gate}) * out"))
        if rows == "bhme" and self.coin():
            self.say("out = out.transpose(1, 2).flatten(-2)")
        self.say("return out")

    def _weighted_groups(self, rows: str) -> None:
        """As `_weighted`, where the values have fewer heads."""
        at = rows.index("h")
        equation = f"{self.axes},{self.v}->{rows}".replace("h", "gr")
        folded = f"p.unflatten({at}, (-1, {self.group}))"
        self.say(f'out = torch.einsum("{equation}", {folded}, v).flatten({at}, {at + 1})')

    def _weighted(self, rows: str) -> None:
        """The weights times v, in the order of the scores' axes."""
        spellings = [f'torch.einsum("{self.axes},{self.v}->{rows}", p, v)']
        if self.v.startswith(rows[:-2]):
            spellings += [
                "p @ v",
                "torch.matmul(p, v)",
                *(["torch.bmm(p, v)"] if len(rows) == 3 else []),
            ]
        self.say(f"out = {self.one(*spellings)}")
