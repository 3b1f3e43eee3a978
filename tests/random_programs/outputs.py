"""What is made of scores `s` and weights `p` beyond their product with the values.

Each method writes one output and returns its name. `t` is another score, of other queries and keys.
"""

from __future__ import annotations

from random_programs.words import Words

OUTPUTS = (
    "differential",
    "gated",
    "talking",
    "averaged",
    "returned",
    "over_rows",
    "entropy",
    "log_sum",
    "moment",
    "centred",
    "squared",
    "normalised",
    "standardised",
    "extremum",
    "position",
    "found",
    "counted",
    "twice",
)
OVER_HEADS = ("talking", "averaged")


class Outputs(Words):
    """The part of a program that sums weights, or reduces scores."""

    def plain(self) -> str:
        return self._summed("plain", "p")

    def differential(self) -> str:
        """Another softmax is taken away."""
        self._other_scores()
        share = f"{self.input('lam', 'h')}[:, None, None]" if "h" in self.axes else self.input("lam", "")
        self.say(
            self.one(
                f"w = p - {share} * torch.softmax(t, -1)",
                f"w = p - F.softmax(t, dim=-1) * {share}",
                f"w = torch.sub(p, t.softmax(-1).mul({share}))",
            )
        )
        return self._summed("difference", "w")

    def gated(self) -> str:
        self._other_scores()
        self.say(self.one("g = p * torch.sigmoid(t)", "g = t.sigmoid() * p", "g = p * F.silu(t)"))
        return self._summed("gated_out", "g")

    def talking(self) -> str:
        """Weights of all heads mixed."""
        mix = self.input("mix", "hh")
        lead = self.axes[:-3]
        self.say(
            self.one(
                f'mixed = torch.einsum("{lead}hmn,hr->{lead}rmn", p, {mix})',
                f"mixed = ({mix} @ p.flatten(-2)).view(p.shape)",
                f"mixed = torch.tensordot(p, {mix}, dims=([{len(lead)}], [0])).movedim(-1, {len(lead)})",
            )
        )
        return self._summed("talked", "mixed")

    def averaged(self) -> str:
        at = self.axes.index("h")
        self.say(self.one(f"mean_p = p.mean({at})", f"mean_p = p.sum(dim={at}) / p.shape[{at}]"))
        return "mean_p"

    def returned(self) -> str:
        return "p"

    def over_rows(self) -> str:
        """Rows compete for each position of the stream; then renormalised."""
        self.say(
            "slots = torch.softmax(s, dim=-2)",
            self.one(
                "slots = slots / (slots.sum(-1, keepdim=True) + 1e-3)",
                "slots = (slots + 1e-3) / (slots + 1e-3).sum(dim=-1, keepdim=True)",
            ),
        )
        return self._summed("slotted", "slots")

    def entropy(self) -> str:
        self.say(
            self.one(
                "entropy = -(p * torch.log(p + 1e-6)).sum(-1)",
                "entropy = -torch.sum(p * p.clamp(min=1e-6).log(), dim=-1)",
            )
        )
        return "entropy"

    def log_sum(self) -> str:
        self.say(self.one("lse = torch.logsumexp(s, dim=-1)", "lse = s.logsumexp(-1, keepdim=True).squeeze(-1)"))
        return "lse"

    def moment(self) -> str:
        self.say(self.one("squares = v**2", "squares = v * v", "squares = v.square()"))
        return self._summed("second", "p", "squares")

    def centred(self) -> str:
        """The values' spread around their mean under the weights; values are one per position."""
        values = self.spread(self.input("x", "n"), "n")
        self.say(
            f"mean = (p * {values}).sum(-1, keepdim=True)",
            self.one(
                f"spread = (p * ({values} - mean) ** 2).sum(-1)",
                f"gap = {values} - mean\nspread = torch.sum(p * gap * gap, -1)",
            ).replace("\n", "\n    "),
        )
        return "spread"

    def squared(self) -> str:
        """Weights squared and divided by their sum once more."""
        self.say("sharp = p * p", "sharp = sharp / sharp.sum(-1, keepdim=True)")
        return self._summed("sharpened", "sharp")

    def normalised(self) -> str:
        self._other_scores()
        self.say(
            self.one(
                "u = F.normalize(t, p=1, dim=-1)",
                "u = F.normalize(t, dim=-1)",
                "u = t / t.abs().sum(-1, keepdim=True).clamp(min=1.0)",
                "u = t / (t.norm(dim=-1, keepdim=True) + 1e-3)",
            )
        )
        return self._summed("normed", "u")

    def standardised(self) -> str:
        self._other_scores()
        self.say(
            self.one(
                "t = t - t.mean(-1, keepdim=True)",
                "t = (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, keepdim=True, unbiased=False) + 1e-3)",
            ),
            "z = torch.softmax(t, -1)",
        )
        return self._summed("standard", "z")

    def extremum(self) -> str:
        self._other_scores()
        self.say(f"best = {self.one('t.amax(-1)', 't.min(dim=-1).values', 'torch.max(t, -1)[0]', 't.amin(dim=-1)')}")
        return "best"

    def position(self) -> str:
        self._other_scores()
        self.say(f"at = {self.one('t.argmax(-1)', 'torch.argmin(t, dim=-1)', 't.max(-1).indices')}")
        return "at"

    def found(self) -> str:
        self._other_scores()
        self.say(f"found = {self.one('(t > 0.5).any(-1)', 'torch.all(t > -2, dim=-1)', '(t.abs() < 1).any(dim=-1)')}")
        return "found"

    def counted(self) -> str:
        self._other_scores()
        self.say(f"count = {self.one('(t > 0).sum(-1)', '(t > 0).float().mean(-1)', 'torch.sum(t < 0.5, dim=-1)')}")
        return "count"

    def twice(self) -> str:
        """A softmax of a softmax."""
        return self._summed("again", "torch.softmax(p, -1)")

    def _other_scores(self) -> None:
        """`t`, once."""
        if "t_q" in self.inputs:
            return
        lead = self.axes[:-2]
        queries, keys = self.input("t_q", lead + "md"), self.input("t_k", lead + "nd")
        self.say(
            self.one(
                f"t = {queries} @ {keys}.mT",
                f't = torch.einsum("{lead}md,{lead}nd->{self.axes}", {queries}, {keys})',
            )
        )

    def _summed(self, name: str, weights: str, values: str = "v") -> str:
        rows = self.axes[:-2] + "me"
        spellings = [f'torch.einsum("{self.axes},{self.v}->{rows}", {weights}, {values})']
        if self.v.startswith(rows[:-2]):
            spellings += [f"{weights} @ {values}", f"torch.matmul({weights}, {values})"]
        self.say(f"{name} = {self.one(*spellings)}")
        return name
