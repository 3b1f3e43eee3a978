"""From scores `s` to weights `p`.

Each method writes one kind and returns what the product of `p` with the values is still to be divided by, or "".
"""

from __future__ import annotations

from random_programs.words import Words


class Weights(Words):
    """The part of a program that turns scores into weights."""

    def softmax(self) -> str:
        self.say(
            self.one(
                "p = torch.softmax(s, dim=-1)",
                "p = s.softmax(-1)",
                "p = F.softmax(s, dim=-1, dtype=torch.float32).to(v.dtype)",
                "p = torch.exp(F.log_softmax(s, -1))",
                "p = torch.exp(s - torch.logsumexp(s, dim=-1, keepdim=True))",
            )
        )
        return ""

    def softmax_by_hand(self) -> str:
        self.say(
            self.one(
                "top = s.max(dim=-1, keepdim=True).values",
                "top = s.amax(-1, keepdim=True).detach()",
                "top = torch.max(s, -1, keepdim=True)[0]",
            ),
            self.one("p = torch.exp(s - top)", "p = (s - top).exp()"),
        )
        return self._divided("p.sum(-1, keepdim=True)")

    def exp_without_maximum(self) -> str:
        self.say(self.one("p = s.exp()", "p = torch.exp(s)", "p = torch.exp2(s * 1.4426950408889634)"))
        return self._divided(self.one("p.sum(-1, keepdim=True)", "torch.sum(p, -1).unsqueeze(-1)"))

    def softmax_one(self) -> str:
        """The weights sum to less than one."""
        if self.coin():
            self.say("p = torch.exp(s)")
            return self._divided("(1 + p.sum(-1, keepdim=True))")
        self.say("top = s.amax(-1, keepdim=True).clamp(min=0)", "p = torch.exp(s - top)")
        return self._divided("(torch.exp(-top) + p.sum(-1, keepdim=True))")

    def sink(self) -> str:
        """A learned score is appended, and its weight dropped."""
        if "h" in self.axes:
            column = f"{self.input('logit', 'h')}[{', '.join(':' if a == 'h' else 'None' for a in self.axes)}]"
        else:
            column = self.input("logit", "")
        is_first = self.coin()
        self.say(
            f"column = {column}.expand(*s.shape[:-1], 1)",
            f"s = torch.cat({'(column, s)' if is_first else '[s, column]'}, dim=-1)",
            f"p = torch.softmax(s, -1)[..., {'1:' if is_first else ':-1'}]",
        )
        return ""

    def sigmoid(self) -> str:
        self.say(self.one("p = torch.sigmoid(s)", "p = F.sigmoid(s - 2.0)", "p = 1 / (1 + torch.exp(-s))"))
        return ""

    def relu(self) -> str:
        self.say(self.one("p = torch.relu(s)", "p = F.relu(s)", "p = s.clamp(min=0)"))
        return self._by_length()

    def relu_squared(self) -> str:
        self.say(self.one("p = F.relu(s).square()", "p = torch.relu(s) ** 2"))
        return self._by_length()

    def _by_length(self) -> str:
        self.least = "0.5"
        total = self.one("", "s.shape[-1]", f"(p.sum(-1, keepdim=True) + {self.least})")
        if total:
            self.say(f"p = p / {total}")
        return ""

    def _divided(self, total: str) -> str:
        """Early, or late: after the product with the values."""
        if self.coin():
            self.say(self.one(f"p = p / {total}", f"p = p * (1 / {total})"))
            return ""
        self.say(f"total = {total}")
        return "total"
