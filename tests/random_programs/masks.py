"""Predicates on query and key, and the ways to apply them to scores or weights."""

from __future__ import annotations

from random_programs.words import Words


class Masks(Words):
    """The part of a program that masks."""

    def mask(self) -> str:
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
        if self.one(True, True, False):  # else some rows may be masked throughout
            self.positions()
            self.say("keep = keep | (j == 0)")
        return "keep"

    def fill(self, keep: str) -> None:
        """Scores that are not kept become -inf, or very small."""
        self.say(
            self.one(
                f's = s.masked_fill(~{keep}, float("-inf"))',
                f"s = torch.where({keep}, s, -math.inf)",
                f's = s + torch.zeros_like(s).masked_fill({keep}.logical_not(), float("-inf"))',
                f"s = s.masked_fill({keep} == 0, -1e9)",
                f"s = torch.where({keep}, s, torch.finfo(s.dtype).min)",
                f"s = s + (1.0 - {keep}.to(s.dtype)) * -10000.0",
            )
        )

    def multiply(self, p: str, keep: str, is_divided: bool) -> None:
        """Weights that are masked only now; where they are divided already, they may be made to sum to one again."""
        self.say(
            self.one(
                f"{p} = {p} * {keep}",
                f"{p} = {p}.masked_fill(~{keep}, 0.0)",
                f"{p} = torch.where({keep}, {p}, 0.0)",
                f"{p} = {p} * {keep}.to({p}.dtype)",
            )
        )
        if is_divided and self.coin():
            self.say(f"{p} = {p} / ({p}.sum(-1, keepdim=True) + {self.least})")

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
        """Ids per position, of queries and keys alike."""
        self.is_square = True
        dims = self.any_of("n", "bn")
        name = self.input("ids" if dims == "n" else "batch_ids", dims, "documents")
        index = [":" if a in dims else "None" for a in self.axes[:-2]]
        return f"{name}[{', '.join([*index, ':', 'None'])}] == {name}[{', '.join([*index, 'None', ':'])}]"

    def _lengths(self) -> str:
        name = self.input("lengths", "b", "length")
        return f"j < {name}[{', '.join([':', *['None'] * (len(self.axes) - 1)])}]"

    def _loaded(self) -> str:
        dims = self.any_of("mn", "bn", "bmn", "n")
        return self.spread(self.input(f"live_{dims}", dims, "keep"), dims)
