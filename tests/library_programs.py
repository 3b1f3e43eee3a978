"""Small programs rewritten once for many tests, and what is said and run when they are called."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter import rewrite
from rewriter.api import import_package


class Attention(nn.Module):
    """Self-attention, masked where `keep` is given."""

    def __init__(self, dim=32, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("gain", torch.ones(heads, 1, 1))

    def forward(self, x, keep=None, *, scale=0.25):
        b, s, dim = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * scale * self.gain
        if keep is not None:
            scores = scores.masked_fill(~keep[:, None, None, :], float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, dim))


class Model(nn.Module):
    """Two layers, each of a norm and an attention."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])
        self.layers = nn.ModuleList([Attention() for _ in range(2)])

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def attend(q, k, v):
    """A plain function."""
    return torch.softmax(q @ k.mT / 4, dim=-1) @ v


class Emitted:
    """A package written once, and imported anew for each test: warnings are given once a package."""

    def __init__(self, program, folder: Path, args: tuple, kwargs: dict | None = None):
        self.program, self.folder = program, folder
        self.rewrite = rewrite(program, args, kwargs, out=folder)

    def apply(self, program):
        return import_package(self.folder).apply(program)


class Kernels(TorchDispatchMode):
    """While active, counts the calls of emitted ops."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "flashlight"
        return func(*args, **(kwargs or {}))


def tensors(*shape: int, count: int = 3, **kwargs) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, **kwargs) for _ in range(count))


def tokens(batch=2, length=9) -> torch.Tensor:
    return tensors(batch, length, 32, count=1)[0]


def attention() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


@contextmanager
def said(*causes: str, kernels: int = 0) -> Iterator[None]:
    """Each of `causes` is warned of once inside, and nothing else; emitted ops are called `kernels` times."""
    with warnings.catch_warnings(record=True) as caught, Kernels() as seen:
        warnings.simplefilter("always")
        yield
    assert seen.calls == kernels
    found = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    assert len(found) == len(causes), found
    for cause, message in zip(causes, found, strict=True):
        assert cause in message and "runs its original code" in message


def close(out, expected) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
