"""Functions as users write them, captured once and lifted node by node, then compared with torch at several sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from rewriter.lift.local import lift_locally
from rewriter.trace import capture
from tests.lifting import assert_lifted, sizes_of, values_of


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def heads(b: int, s: int):
    """x [B, S, 24] for 4 heads of 6"""
    return (r(b, s, 24),)


def qkv(b: int, s: int):
    return r(b, 4, s, 6), r(b, 4, s + 2, 6), r(b, 4, s + 2, 5)


def split_heads(x):
    b, s, _ = x.shape
    q, k, v = x.view(b, s, 3, 4, 2).permute(2, 0, 3, 1, 4).unbind(0)
    return q @ k.transpose(-1, -2), v.transpose(1, 2).reshape(b, s, -1)


def chunked_heads(x):
    q, k = x.chunk(2, dim=-1)
    q = q.unflatten(-1, (4, 3)).transpose(1, 2)
    k = k.reshape(*k.shape[:-1], 4, 3).movedim(2, 1)
    return torch.einsum("bhid,bhjd->bhij", q, k).flatten(0, 1)


def grouped(q, k, v):
    k = k.chunk(2, dim=1)[0].repeat_interleave(2, dim=1)
    v = v[:, ::2][:, :, None].expand(-1, -1, 2, -1, -1).reshape(v.shape[0], 4, *v.shape[2:])
    return q @ k.mT, v * 2


def grouped_by_view(q, k, v):
    b, _, m, d = q.shape
    k = k.unflatten(1, (2, 2))[:, :, 0]
    s = torch.einsum("bghmd,bgnd->bghmn", q.view(b, 2, 2, m, d), k)
    return s.reshape(b, 4, m, -1) / math.sqrt(6)


def masks(x):
    n = x.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    window = (i - j < 3) & (j <= i)
    chunks = (i // 4 == j // 4) | ((i - j) % 2 == 0)
    added = torch.full((n, n), float("-inf")).triu(1) + torch.zeros(n, n).masked_fill(~window, -1e9)
    return causal, window ^ chunks, added, torch.where(causal, 0.0, -math.inf)


def distances(x):
    n = x.shape[1]
    slopes = torch.pow(2.0, -torch.arange(1, 5, dtype=torch.float32))
    away = (torch.arange(n) - torch.arange(n)[:, None]).abs()
    near = away < 4
    far = 4 + (torch.log(away.clamp(min=1).float() / 4) / math.log(8) * 4).to(torch.int64)
    bucket = torch.where(near, away, torch.minimum(far, torch.full_like(far, 7)))
    return -slopes.view(4, 1, 1) * away, bucket, F.relu(8 - away)


def lookups(table, ids, x):
    bias = table[ids].permute(2, 0, 1)
    rows = x[:, ids[0] % 3]
    columns = ids[:1, :1].expand(x.shape[0], x.shape[1])[..., None] % 3
    return F.embedding(ids, table), bias, rows, x.gather(2, columns)


def pieces(x, y):
    both = torch.cat([x, y.expand(x.shape[0], -1, -1)], dim=1)
    padded = F.pad(x, (1, 2, 0, 1), value=-1.0)
    stacked = torch.stack([x, x.flip(1)], dim=2).flatten(1, 2)
    half = x.shape[-1] // 2
    halves = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return both, padded, stacked, halves, pairs, x[:, -1], x[:, None].squeeze(1)


def sums(x):
    mean = x.mean(-1, keepdim=True)
    var = (x - mean).square().mean(-1, keepdim=True)
    norm = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    peak = x.amax(dim=(1, 2)), x.max(dim=-1).values, x.min(), x.sum((0, 2), keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5), norm, *peak, x.logsumexp(1), x.prod(-1)


def softmaxes(x):
    late = torch.exp(x - x.max(-1, keepdim=True)[0])
    return (
        F.softmax(x, -1),
        x.softmax(1, dtype=torch.float32),
        F.log_softmax(x, 0),
        late / late.sum(-1, keepdim=True),
    )


def activations(x):
    outs = [
        F.gelu(x),
        F.gelu(x, approximate="tanh"),
        F.silu(x),
        F.softplus(x),
        F.elu(x),
        F.leaky_relu(x),
    ]
    outs += [
        F.hardtanh(x),
        torch.sigmoid(x),
        30 * torch.tanh(x / 30),
        F.relu(x) ** 2,
        1 / (1 + x.exp()),
    ]
    outs += [
        x.clamp(-1, 1),
        x.half().float(),
        (x > 0).float(),
        x.nan_to_num(),
        2**x,
        x.reciprocal(),
        3 - x,
        -x,
    ]
    return outs


def assigned(x):
    n = x.shape[1]
    mask = torch.zeros(n, n)
    mask[:, :1] = 1.0
    mask[0] = 2.0
    mask[mask == 2.0] = -1.0
    scores = x @ x.transpose(1, 2)
    scores = scores.masked_fill_(mask == 0, -1e9)
    scores += mask
    return scores, mask


def attention(q, k, v):
    keep = torch.rand(q.shape[2], k.shape[2]) < 2
    return (
        F.scaled_dot_product_attention(q, k, v),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2),
        F.scaled_dot_product_attention(q, k, v, attn_mask=keep),
        torch.baddbmm(q.new_zeros(1, 1, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3),
    )


def scaled_by_sizes(q, k, v):
    scale = q.shape[-1] ** -0.5 / k.shape[2]
    return (q * scale) @ k.mT, q @ k.mT * math.log(7), k.sum(2) / k.shape[2]


def table(b: int, s: int):
    return r(7, 4), torch.randint(0, 7, (s, s + 1)), r(b, 5, 3)


def two(b: int, s: int):
    return r(b, s, 24), r(1, s, 24)


CASES = [
    (split_heads, heads),
    (chunked_heads, heads),
    (grouped, qkv),
    (grouped_by_view, qkv),
    (masks, heads),
    (distances, heads),
    (lookups, table),
    (pieces, two),
    (sums, heads),
    (softmaxes, heads),
    (activations, heads),
    (assigned, heads),
    (attention, qkv),
    (scaled_by_sizes, qkv),
]
STATIC = {
    heads: (2,),
    qkv: (1, 3),
    table: (),
    two: (2,),
}  # features and heads, which kernels keep whole
EAGER = ("rand",)  # what may stay eager, by its reason


def fed(graph: fx.Graph, args: tuple) -> dict:
    """Placeholders by name: the inputs, and the constants that tracing has lifted."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    given = iter(args)
    return {n.name: n.meta["constant"] if "constant" in n.meta else next(given) for n in placeholders}


def captured(function, inputs):
    args = inputs(2, 5)
    return capture(function, args, {}, dict.fromkeys((k, d) for k in range(len(args)) for d in STATIC[inputs]))


@pytest.mark.parametrize("function,inputs", CASES, ids=lambda c: c.__name__)
def test_every_node_of_a_traced_function(function, inputs):
    torch.manual_seed(0)
    traced = captured(function, inputs)
    lifts = lift_locally(traced.graph)
    for sizes in ((2, 5), (3, 9), (1, 1)):
        held = values_of(traced.graph, fed(traced.graph, inputs(*sizes)))
        for node, lift in lifts.items():
            if lift.value is None and any(text in lift.reason for text in EAGER):
                continue
            assert_lifted(node, lift, held, sizes_of(traced.graph, held))


def test_a_slice_of_a_symbolic_size_up_to_a_number():
    """k[:, :2] of 4 heads has 2, not 4."""
    check_at(lambda k: k[:, :2] + 1.0, r(2, 4, 3), r(3, 5, 7))


def test_a_slice_of_a_symbolic_size_from_a_number():
    check_at(lambda k: k[:, 2:] + 1.0, r(2, 4, 3), r(3, 5, 7))


def test_a_slice_longer_than_the_tensor():
    check_at(lambda k: k[:, :5] + k[:, -5:], r(2, 7, 3), r(2, 4, 3), r(1, 1, 3))


def check_at(function, *inputs: torch.Tensor) -> None:
    traced = capture(function, inputs[:1], {})
    lifts = lift_locally(traced.graph)
    for given in inputs:
        held = values_of(traced.graph, fed(traced.graph, (given,)))
        for node, lift in lifts.items():
            assert_lifted(node, lift, held, sizes_of(traced.graph, held))
