"""A module whose forward depends on all that a module can hold, and what may be changed of it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import nn


class Scores(nn.Module):
    """Takes two tensors, so a chain goes through it: its own forward no longer runs."""

    def __init__(self, gain=2.0):
        super().__init__()
        self.gain, self.drop = gain, nn.Dropout(0.5)

    def forward(self, q, k):
        return self.drop(q @ k.mT * self.gain)


class Doubled(Scores):
    """Another class of the same parts."""

    def forward(self, q, k):
        return 2 * super().forward(q, k)


class Configured(nn.Module):
    """Attention by its attributes; `proj` is called, `scores` is taken apart."""

    def __init__(self):
        super().__init__()
        self.scale, self.mode, self.fill = 0.25, "all", float("-inf")
        self.options, self.config = {"shift": 1.0}, SimpleNamespace(cap=30.0, unread=0)
        self.act, self.table = torch.tanh, torch.tensor(0.5)
        self.tables = [self.table]
        self.register_parameter("bias", None)
        self.unread, self.unused = 0, 0
        self.scores, self.proj = Scores(), nn.Linear(16, 16)

    def forward(self, x):
        s = self.scores(self.proj(x), x) * self.scale * self.table * self.tables[0] + self.options["shift"]
        s = self.capped(s) if self.fill < 0 else s + self.unused
        if self.bias is not None:
            s = s + self.bias
        if self.mode == "causal":
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), self.fill)
        return torch.softmax(s, -1) @ x

    def capped(self, s):
        return self.config.cap * self.act(s / self.config.cap)


def configured() -> Configured:
    torch.manual_seed(0)
    return Configured().eval().requires_grad_(False)


def _set(path: str, value: object) -> Callable[[nn.Module], None]:
    *parents, name = path.split(".")

    def change(module: nn.Module) -> None:
        for parent in parents:
            module = getattr(module, parent)
        setattr(module, name, value)

    return change


def _tables(value: object) -> Callable[[nn.Module], None]:
    return lambda module: (_set("table", value)(module), _set("tables", [value])(module))


def _eval(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


# What is changed, and why the original runs then.
ANOTHER_PROGRAM = {
    "number": (_set("scale", 0.5), "self.scale is not 0.25"),
    "type of number": (_set("scale", 1), "self.scale is not 0.25"),
    "text": (_set("mode", "causal"), "self.mode is not 'all'"),
    "infinite number": (_set("fill", -1e4), "self.fill is not -inf"),
    "dict": (_set("options", {"shift": 0.0}), "self.options is not"),
    "configuration": (_set("config", SimpleNamespace(cap=2.0)), "self.config.cap is not 30.0"),
    "function": (_set("act", torch.sin), "self.act.__qualname__ is not"),
    "optional parameter": (_set("bias", nn.Parameter(torch.rand(9), False)), "self.bias is not None"),
    "number of a part": (_set("scores.gain", 0.5), "self.scores.gain is not 2.0"),
    "class of a part": (_set("scores", _eval(Doubled())), "self.scores is no Scores"),
    "mode of a part": (lambda m: m.scores.drop.train(), "self.scores.drop.training is not False"),
    "hook on a part": (
        lambda m: m.scores.register_forward_hook(lambda module, args, out: out / 2),
        "self.scores has other hooks",
    ),
    "called part of other tensors": (
        _set("proj", _eval(nn.Sequential(nn.Linear(16, 16)))),
        "'Sequential' object has no attribute 'weight'",
    ),
    "new part": (_set("extra", nn.Identity()), "self has other submodules"),
    "shape of a tensor": (_tables(torch.rand(9)), "self.table is not torch.float32 of shape"),
    "one of two names of a tensor": (_set("tables", [torch.tensor(2.0)]), "self.tables[0] is not self.table"),
    "dtype of a tensor": (_tables(torch.tensor(0.5, dtype=torch.float64)), "self.table is not"),
    "what is no tensor": (_tables(0.5), "'float' object has no attribute 'dtype'"),
}
# What is changed that the kernels do not mind.
THE_SAME_PROGRAM = {
    "nothing": lambda m: None,
    "weights": lambda m: m.proj.weight.mul_(2),
    "a tensor": lambda m: m.table.fill_(-1.5),
    "a part that is called": _set("proj", _eval(nn.Linear(16, 16))),
    "a hook on a part that is called": lambda m: m.proj.register_forward_hook(lambda m, args, out: out * 2),
    "a hook on the whole": lambda m: m.register_forward_hook(lambda m, args, out: out * 2),
    "what forward does not read": lambda m: (_set("unread", 1)(m), _set("config.unread", 1)(m)),
    "what another branch would read": _set("unused", 1),
}
