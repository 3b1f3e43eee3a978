"""Calls for contractions, reductions, softmax and attention: more of `CASES` in `lift_cases.py`."""

from __future__ import annotations

import torch

from tests.lift_cases import CASES, INF, aten, b, f, i, more, odd
from tests.lifting import call

# Contractions

CASES["matmul"] = lambda: [
    call(aten.matmul.default, f(2, 3, 5), f(2, 5, 7)),
    call(aten.matmul.default, f(2, 4, 3, 5), f(1, 4, 5, 7)),
    call(aten.matmul.default, f(4, 3, 5), f(2, 4, 5, 7)),
    call(aten.matmul.default, f(3, 5), f(2, 5, 7)),
    call(aten.matmul.default, f(2, 3, 5), f(5)),
    call(aten.matmul.default, f(5), f(2, 5, 7)),
    call(aten.matmul.default, f(3, 5), f(5, 7)),
    call(aten.matmul.default, f(5), f(5)),
    call(aten.matmul.default, f(2, 3, 1), f(2, 1, 7)),
]
CASES["bmm"] = lambda: [call(aten.bmm.default, f(2, 3, 5), f(2, 5, 7))]
CASES["linalg_matmul"] = lambda: [call(aten.linalg_matmul.default, f(2, 3, 5), f(5, 7))]
CASES["mm"] = lambda: [call(aten.mm.default, f(3, 5), f(5, 7))]
CASES["mv"] = lambda: [call(aten.mv.default, f(3, 5), f(5))]
CASES["dot"] = lambda: [call(aten.dot.default, f(5), f(5))]
CASES["addmm"] = lambda: [
    call(aten.addmm.default, f(7), f(3, 5), f(5, 7)),
    call(aten.addmm.default, f(3, 1), f(3, 5), f(5, 7), beta=0.5, alpha=2),
]
CASES["baddbmm"] = lambda: [
    call(aten.baddbmm.default, f(2, 3, 7), f(2, 3, 5), f(2, 5, 7), alpha=0.3),
    call(aten.baddbmm.default, odd(2, 3, 7), f(2, 3, 5), f(2, 5, 7), beta=0),
    call(aten.baddbmm.default, f(2, 3, 7), f(2, 3, 5), f(2, 5, 7), beta=2),
]
CASES["einsum"] = lambda: [
    call(aten.einsum.default, "bhmd,bhnd->bhmn", [f(2, 4, 3, 5), f(2, 4, 7, 5)]),
    call(aten.einsum.default, "b h m d , b h n d -> b n h m", [f(2, 4, 3, 5), f(2, 4, 7, 5)]),
    call(aten.einsum.default, "...md,...nd->...mn", [f(2, 4, 3, 5), f(2, 4, 7, 5)]),
    call(aten.einsum.default, "...d,d->...", [f(2, 3, 5), f(5)]),
    call(aten.einsum.default, "...md,...dn->...nm", [f(2, 4, 3, 5), f(4, 5, 7)]),
    call(aten.einsum.default, "m...,...n->...mn", [f(3, 2), f(2, 7)]),
    call(aten.einsum.default, "ij,jk", [f(3, 5), f(5, 7)]),
    call(aten.einsum.default, "ba", [f(3, 5)]),
    call(aten.einsum.default, "...ij,...jk", [f(2, 3, 5), f(2, 5, 7)]),
    call(aten.einsum.default, "ij->", [f(3, 5)]),
    call(aten.einsum.default, "i,j,k->kij", [f(3), f(5), f(7)]),
    call(aten.einsum.default, "bij,bjk,bkl->bil", [f(2, 3, 5), f(2, 5, 4), f(2, 4, 7)]),
    call(aten.einsum.default, "ii->i", [f(5, 5)]),
    call(aten.einsum.default, "bij,ij->b", [f(2, 1, 5), f(3, 5)]),
]

# Reductions

for name, dims in (("sum", aten.sum.dim_IntList), ("mean", aten.mean.dim)):
    CASES[name] = lambda op=getattr(aten, name), dims=dims: [
        call(op.default, f(3, 5)),
        call(dims, f(2, 3, 5), [-1]),
        call(dims, f(2, 3, 5), [0, 2], True),
        call(dims, f(2, 3, 5), [1], False, dtype=torch.float32),
        call(dims, f(3, 5).half(), [1], dtype=torch.float32),
        call(dims, f(3, 5), None),
        call(dims, f(3, 5), []),
    ]
more("sum", lambda: [call(aten.sum.dim_IntList, b(3, 5), [1]), call(aten.sum.default, i(3, 5))])
for name in ("amax", "amin"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, f(2, 3, 5), [-1]),
        call(op, f(2, 3, 5), [0, 1], True),
        call(op, f(3, 5)),
        call(op, odd(3, 5), [1]),
    ]
for name in ("any", "all"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(op.default, b(3, 5)),
        call(op.dim, b(3, 5), -1),
        call(op.dim, b(3, 5), 0, True),
        call(op.dims, b(2, 3, 5), [0, 2]),
    ]
CASES["prod"] = lambda: [
    call(aten.prod.dim_int, f(3, 5), 1),
    call(aten.prod.default, f(3, 5)),
    call(aten.prod.dim_int, f(3, 5), 0, True),
]
for name in ("max", "min"):
    CASES[name] = lambda op=getattr(aten, name): [call(op.default, f(3, 5)), call(op.default, f(7))]
    CASES[f"{name}.dim"] = lambda op=getattr(aten, name): [
        call(op.dim, f(3, 5), -1),
        call(op.dim, f(2, 3, 5), 1, True),
    ]
CASES["softmax"] = lambda: [
    call(aten.softmax.int, f(2, 3, 5), -1),
    call(aten.softmax.int, f(3, 5), 0),
    call(aten.softmax.int, f(3, 5).half(), -1, torch.float32),
    call(aten.softmax.int, odd(3, 5), -1),
]
CASES["_softmax"] = lambda: [call(aten._softmax.default, f(3, 5), -1, False)]
CASES["_safe_softmax"] = lambda: [
    call(aten._safe_softmax.default, f(3, 5), -1),
    call(
        aten._safe_softmax.default,
        f(3, 5).masked_fill(torch.tensor([[True], [False], [False]]), -INF),
        -1,
    ),
]
CASES["log_softmax"] = lambda: [
    call(aten.log_softmax.int, f(2, 3, 5), -1),
    call(aten.log_softmax.int, f(3, 5), 0, torch.float32),
]
CASES["_log_softmax"] = lambda: [call(aten._log_softmax.default, f(3, 5), -1, False)]
CASES["logsumexp"] = lambda: [
    call(aten.logsumexp.default, f(2, 3, 5), [-1]),
    call(aten.logsumexp.default, f(2, 3, 5), [0, 2], True),
    call(aten.logsumexp.default, torch.full((3, 5), -INF), [1]),
    call(aten.logsumexp.default, torch.tensor([[INF, 1.0], [-INF, 2.0]]), [1]),
]


def attention(**options) -> list:
    q, k, v = f(2, 4, 3, 8), f(2, 4, 7, 8), f(2, 4, 7, 5)
    return [call(aten.scaled_dot_product_attention.default, q, k, v, **options)]


def blind() -> torch.Tensor:
    """A mask with a row that sees nothing."""
    mask = b(2, 1, 3, 7)
    mask[0, 0, 1] = False
    return mask


CASES["scaled_dot_product_attention"] = lambda: [
    *attention(),
    *attention(scale=0.3),
    *attention(is_causal=True),
    *attention(attn_mask=f(3, 7)),
    *attention(attn_mask=blind()),
    *attention(attn_mask=torch.zeros(2, 1, 3, 7).masked_fill(~blind(), -INF)),
    *attention(attn_mask=f(2, 4, 1, 7)),
    call(
        aten.scaled_dot_product_attention.default,
        f(2, 4, 3, 8),
        f(2, 2, 7, 8),
        f(2, 2, 7, 5),
        enable_gqa=True,
    ),
    call(aten.scaled_dot_product_attention.default, f(2, 3, 8), f(2, 7, 8), f(2, 7, 5)),
    call(aten.scaled_dot_product_attention.default, f(3, 8), f(7, 8), f(7, 5)),
]
