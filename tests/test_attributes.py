"""What forward assigns to its module is assigned again, or the module is refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from library_programs import close, said, tensors
from torch import nn

from rewriter import rewrite
from rewriter.errors import RewriteError


@dataclass
class Config:
    """As models keep their numbers."""

    window: int = 3


def run(module: nn.Module, args: tuple) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return module(*args)


class Leaving(nn.Module):
    """Forward leaves its weights, a size and its input behind."""

    def __init__(self):
        super().__init__()
        self.weights = None

    def forward(self, q, k, v):
        self.weights = (q @ k.mT).softmax(-1)
        self.seen = {"length": q.shape[2], "last": q, "mode": "causal"}
        return self.weights @ v


def test_what_forward_assigns_is_assigned():
    original = Leaving().eval()
    module = rewrite(original, tensors(2, 2, 9, 16)).module
    assert original.weights is None and not hasattr(original, "seen")
    for length in (9, 20):
        args = tensors(2, 2, length, 16)
        with said(kernels=1):
            close(run(module, args), run(original, args))
        close(module.weights, original.weights)
        assert module.seen["last"] is args[0] and module.seen["length"] == length and module.seen["mode"] == "causal"


class Counting(Leaving):
    def __init__(self):
        super().__init__()
        self.calls, self.log, self.config = 0, [], Config()


class Reading(Counting):
    def forward(self, q, k, v):
        self.calls += 1
        return super().forward(q, k, v)


class Appending(Counting):
    def forward(self, q, k, v):
        self.log.append(q)
        return super().forward(q, k, v)


class Keeping(Counting):
    def forward(self, q, k, v):
        self.kept = object()
        return super().forward(q, k, v)


REFUSED = {
    Reading: "reads self.calls and changes it",
    Appending: "changes self.log in place",
    Keeping: "assigns self.kept, which no graph holds",
}


@pytest.mark.parametrize("kind, reason", REFUSED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_what_cannot_be_assigned_again_is_refused(kind, reason):
    module = kind().eval()
    with pytest.raises(RewriteError, match=reason) as caught:
        rewrite(module, tensors(2, 2, 9, 16))
    assert caught.value.reason.site.file == __file__
    assert (module.calls, module.log, module.config, module.weights) == (0, [], Config(), None)


class Asking(nn.Module):
    """Forward looks for an attribute that only some instances have."""

    def forward(self, q, k, v):
        s = q @ k.mT
        if hasattr(self, "cap"):
            s = self.cap * torch.tanh(s / self.cap)
        return s.softmax(-1) @ v


def test_an_attribute_that_was_not_there():
    module, args = rewrite(Asking().eval(), tensors(2, 2, 9, 16)).module, tensors(2, 2, 9, 16)
    with said(kernels=1):
        run(module, args)
    capped = Asking().eval()
    module.cap = capped.cap = 2.0
    with said("self has 'cap'"):
        close(run(module, args), run(capped, args))


def test_sizes_of_one_are_tried_without_a_trace():
    original = Leaving().eval()
    rewrite(original, tensors(1, 2, 9, 16))
    assert original.weights is None and not hasattr(original, "seen")
