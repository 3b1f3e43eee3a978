"""Modules that keep something from call to call: what may be made again is, what may not is left as it was."""

from __future__ import annotations

import functools

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


LOST = {
    Counts: "forward reads self.calls and changes it",
    Lists: "forward changes self.seen in place",
    Collects: "forward changes self.kept in place",
}


@pytest.mark.parametrize("kind, says", LOST.items())
def test_what_would_be_lost_is_not_rewritten(kind, says):
    module = kind().eval()
    before = {n: repr(v) for n, v in vars(module).items()}
    with pytest.raises(RewriteError, match=f"{says}.*: it stays as it is"):
        rewrite(module, tensors(*SHAPE))
    assert {n: repr(v) for n, v in vars(module).items()} == before


@pytest.mark.parametrize("kind, name", [(Shows, "last"), (New, "made")])
def test_what_is_made_of_inputs_is_assigned_again(kind, name):
    module = kind().eval()
    before = {n: repr(v) for n, v in vars(module).items()}
    rewritten = rewrite(module, tensors(*SHAPE)).module
    assert {n: repr(v) for n, v in vars(module).items()} == before
    for args in (tensors(*SHAPE), tensors(2, 33, 16)):
        close(rewritten(*args), module(*args))
        close(getattr(rewritten, name), getattr(module, name))


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


class ByLength(Keeping):
    """One of each length, which so becomes a number."""

    def keep(self, q, k):
        if q.shape[1] not in self.kept:
            self.kept[q.shape[1]] = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu()
        return (q @ k.mT).masked_fill(self.kept[q.shape[1]], -1e4)


@pytest.mark.parametrize("kind, lengths", [(Masks, (9, 33)), (Tables, (9, 33)), (ByLength, (9,))])
def test_what_is_made_again_is_rewritten_and_forgotten(kind, lengths):
    module = kind().eval()
    rewritten = rewrite(module, tensors(*SHAPE)).module
    for program in (module, rewritten):
        assert program.mask is None and program.found is None and program.length == 0 and not program.kept
    with said(kernels=len(lengths)):
        for length in lengths:
            args = tensors(2, length, 16)
            close(rewritten(*args), kind().eval()(*args))


def test_a_table_that_is_there_already_is_not_assumed_to_be_the_same():
    module = Masks().eval()
    rewritten = rewrite(module, tensors(*SHAPE)).module
    rewritten.mask, rewritten.length = torch.ones(9, 9, dtype=torch.bool).triu(), 9
    expected = Masks().eval()
    expected.mask, expected.length = rewritten.mask, 9
    with said("self.length is not 0"):
        close(rewritten(*tensors(*SHAPE)), expected(*tensors(*SHAPE)))


@functools.lru_cache
def distances(length):
    i = torch.arange(length)
    return (i[:, None] - i).abs().float()


def remembering(function):
    kept = functools.lru_cache(function)
    return functools.wraps(function)(lambda *args: kept(*args))


class Remembers(nn.Module):
    @functools.lru_cache
    def slope(self, length):
        return torch.full((), 0.1)

    @staticmethod
    @remembering
    def shift(length):
        return torch.arange(length) * 0.01

    def forward(self, q, k, v):
        length = int(q.shape[1])
        return (q @ k.mT - self.slope(length) * distances(length) + self.shift(length)).softmax(-1) @ v


def test_what_functions_remember_is_neither_traced_nor_left_without_data():
    module, args = Remembers().eval(), tensors(*SHAPE)
    expected = module(*args)
    rewritten = rewrite(module, args).module
    for program in (module, rewritten):
        out = program(*args)
        assert type(out) is torch.Tensor
        close(out, expected)
    others = tensors(2, 2 * SHAPE[1], SHAPE[2])
    close(rewritten(*others), module(*others))
