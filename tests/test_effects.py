"""Modules that keep something from call to call: what may be made again is, what may not is left as it was."""

from __future__ import annotations

import pytest
import torch
from library_programs import close, said, tensors
from torch import nn

from rewriter import rewrite
from rewriter.errors import RewriteError

SHAPE = (1, 9, 16)  # a batch of 1, so that forward is tried at other sizes too


class Keeping(nn.Module):
    """`keep` may leave something in the module, and gives the scores."""

    def __init__(self):
        super().__init__()
        self.calls, self.seen, self.kept, self.last, self.found = 0, [], {}, None, None
        self.mask, self.length = None, 0
        self.register_buffer("rates", torch.arange(1.0, 17.0) / 16)

    def forward(self, q, k, v):
        return torch.softmax(self.keep(q, k), -1) @ v


class Counts(Keeping):
    def keep(self, q, k):
        self.calls += 1
        return q @ k.mT


class Lists(Keeping):
    def keep(self, q, k):
        self.seen.append(len(self.seen))
        return q @ k.mT


class Shows(Keeping):
    def keep(self, q, k):
        self.last = (q @ k.mT).softmax(-1)
        return q @ k.mT


class Collects(Keeping):
    def keep(self, q, k):
        self.kept["keys"] = k * 2
        return q @ k.mT


class New(Keeping):
    def keep(self, q, k):
        self.made = q.mean()
        return q @ k.mT


LOST = {Counts: "self.calls", Lists: "self.seen", Shows: "self.last", Collects: "self.kept", New: "self.made"}


@pytest.mark.parametrize("kind, name", LOST.items())
def test_what_would_be_lost_is_not_rewritten(kind, name):
    module = kind().eval()
    before = {n: repr(v) for n, v in vars(module).items()}
    with pytest.raises(RewriteError, match=f"forward sets {name}: it stays as it is"):
        rewrite(module, tensors(*SHAPE))
    assert {n: repr(v) for n, v in vars(module).items()} == before


class Masks(Keeping):
    """Made once for a length, and a number with it."""

    def keep(self, q, k):
        if self.length != q.shape[1]:
            self.length = q.shape[1]
            self.mask = torch.ones(self.length, self.length, dtype=torch.bool, device=q.device).tril()
        return (q @ k.mT).masked_fill(~self.mask, float("-inf"))


class Tables(Keeping):
    """Computed from a buffer."""

    def keep(self, q, k):
        if self.found is None or self.found.shape[0] < q.shape[1]:
            self.found = torch.outer(torch.arange(q.shape[1], device=q.device), self.rates).cos()
        return (q * self.found[: q.shape[1]]) @ k.mT


@pytest.mark.parametrize("kind", [Masks, Tables])
def test_what_is_made_again_is_rewritten(kind):
    module = kind().eval()
    rewritten = rewrite(module, tensors(*SHAPE)).module
    assert module.mask is None and module.found is None and module.length == 0
    with said(kernels=2):
        for args in (tensors(*SHAPE), tensors(2, 33, 16)):
            close(rewritten(*args), kind().eval()(*args))


def test_a_table_that_is_there_already_is_not_assumed_to_be_the_same():
    module = Masks().eval()
    rewritten = rewrite(module, tensors(*SHAPE)).module
    rewritten.mask, rewritten.length = torch.ones(9, 9, dtype=torch.bool).triu(), 9
    expected = Masks().eval()
    expected.mask, expected.length = rewritten.mask, 9
    with said("self.mask is not None"):
        close(rewritten(*tensors(*SHAPE)), expected(*tensors(*SHAPE)))
