"""Layers and models whose hosts the tests look at, and what is asked of each."""

from __future__ import annotations

import torch
from library_programs import close, said
from torch import nn

from rewriter import rewrite
from rewriter.api import Rewrite


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def fused(program: nn.Module, args: tuple) -> Rewrite:
    result = rewrite(program, args)
    assert result.report["chains"], result.report["unfused"]
    return result


class Attn(nn.Module):
    """As published: an index that only a cache would need, flags, and weights next to the output."""

    def __init__(self, index: int = 0, causal: bool = False, weights: bool = True):
        super().__init__()
        self.index, self.causal, self.weights = index, causal, weights
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, mask=None, cache=None, *, scale=1.0, memory=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if memory is not None:
            _, k, v = self.qkv(memory).chunk(3, -1)
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        scores = q @ k.mT * scale
        if self.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        if mask is not None:
            scores = scores + mask
        p = scores.softmax(-1)
        return (self.out(p @ v), p) if self.weights else self.out(p @ v)


class Block(nn.Module):
    def __init__(self, index: int, **how):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(8), Attn(index, **how), nn.Linear(8, 8)

    def forward(self, x, mask=None, shows=False):
        y = self.attn(self.norm(x), mask=mask, scale=0.5)
        y, p = y if isinstance(y, tuple) else (y, None)
        x = x + y
        x = x + self.mlp(x)
        return (x, p) if shows else x


class Model(nn.Module):
    """A mask made once, layers that read it, and a branch on values if asked for."""

    def __init__(self, *blocks: nn.Module, branches: bool = False):
        super().__init__()
        self.blocks, self.branches = nn.ModuleList(blocks), branches

    def forward(self, x):
        mask = torch.zeros(x.shape[1], x.shape[1]).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, -1e9)
        if self.branches and x.sum() > 1e6:
            return x
        for block in self.blocks:
            x = block(x, mask)
        return x


def model(**how) -> Model:
    torch.manual_seed(0)
    branches = how.pop("branches", False)
    return Model(*(Block(k, **how) for k in range(3)), branches=branches).eval()


def hosts(result) -> dict[str, list[str]]:
    return {c["host"]: c["modules"] for c in result.report["chains"]}


def kernels(result) -> list[str]:
    return sorted(n for n in result.sources if n.startswith("kernels/") and "__init__" not in n)


def right(result, program: nn.Module, *shape: int, calls: int = 3) -> None:
    """Its kernels run, and as it should be."""
    with torch.no_grad(), said(kernels=calls):
        close(result.module(r(*shape)), program(r(*shape)))


SIZES = ((2, 7, 8), (1, 37, 8), (3, 1, 8))
