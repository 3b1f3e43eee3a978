"""Calls for views, contractions and reductions: more of `CASES` in `lift_cases.py`."""

from __future__ import annotations

import torch

from tests.lift_cases import CASES, INF, aten, b, f, i, more, odd
from tests.lifting import call

# Views

for name in ("view", "reshape", "_unsafe_view"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, f(3, 5, 2), [3, 10]),
        call(op, f(3, 10), [3, 5, 2]),
        call(op, f(3, 10), [3, 2, 5]),
        call(op, f(3, 4, 5), [12, 5]),
        call(op, f(6, 5), [2, 3, 5]),
        call(op, f(3, 5), [3, 1, 5]),
        call(op, f(3, 1, 5), [3, 5]),
        call(op, f(4, 6), [3, 8]),
        call(op, f(4, 6), [24]),
        call(op, f(24), [2, 3, 4]),
    ]
more("reshape", lambda: [call(aten.reshape.default, f(5, 3).t(), [3, 5]), call(aten.reshape.default, f(3, 5, 2), [3, -1])])
CASES["view_as"] = lambda: [call(aten.view_as.default, f(3, 10), f(3, 5, 2))]
CASES["reshape_as"] = lambda: [call(aten.reshape_as.default, f(3, 10), f(3, 5, 2))]
CASES["flatten"] = lambda: [call(aten.flatten.using_ints, f(2, 3, 5)), call(aten.flatten.using_ints, f(2, 3, 5), 1), call(aten.flatten.using_ints, f(2, 3, 5), 0, 1)]
CASES["unflatten"] = lambda: [call(aten.unflatten.int, f(3, 10), 1, [5, 2]), call(aten.unflatten.int, f(10, 3), 0, [2, -1])]
CASES["permute"] = lambda: [call(aten.permute.default, f(2, 3, 5), [2, 0, 1]), call(aten.permute.default, f(2, 3, 5), [0, -1, 1])]
for name in ("swapaxes", "swapdims"):
    CASES[name] = lambda op=getattr(aten, name).default: [call(op, f(2, 3, 5), 0, 2)]
CASES["transpose"] = lambda: [call(aten.transpose.int, f(2, 3, 5), 1, 2), call(aten.transpose.int, f(2, 3, 5), 0, -1)]
CASES["t"] = lambda: [call(aten.t.default, f(3, 5)), call(aten.t.default, f(3))]
for name in ("mT", "mH", "adjoint"):
    more(name, lambda op=getattr(aten, name).default: [call(op, f(2, 3, 5))])
more("numpy_T", lambda: [call(aten.numpy_T.default, f(2, 3, 5))])
for name in ("movedim", "moveaxis"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(op.int, f(2, 3, 5), 0, -1),
        call(op.intlist, f(2, 3, 5, 7), [0, 1], [2, 0]),
        call(op.intlist, f(2, 3, 5, 7), [3, -3], [0, 3]),
    ]
CASES["unsqueeze"] = lambda: [call(aten.unsqueeze.default, f(3, 5), k) for k in (0, 1, 2, -1, -2)]
CASES["squeeze"] = lambda: [
    call(aten.squeeze.default, f(1, 3, 1, 5)),
    call(aten.squeeze.dim, f(1, 3, 1, 5), 2),
    call(aten.squeeze.dim, f(3, 1, 5), -2),
    call(aten.squeeze.dim, f(3, 5), 0),
    call(aten.squeeze.dims, f(1, 3, 1, 5), [0, 2]),
]
CASES["expand"] = lambda: [call(aten.expand.default, f(3, 1), [3, 5]), call(aten.expand.default, f(5), [2, 3, 5]), call(aten.expand.default, f(1, 5), [3, -1])]
CASES["expand_as"] = lambda: [call(aten.expand_as.default, f(3, 1), f(2, 3, 5))]
CASES["broadcast_to"] = lambda: [call(aten.broadcast_to.default, f(5), [3, 5])]
CASES["repeat"] = lambda: [call(aten.repeat.default, f(3, 5), [2, 3]), call(aten.repeat.default, f(5), [2, 3]), call(aten.repeat.default, f(3, 1), [1, 4])]
CASES["tile"] = lambda: [call(aten.tile.default, f(3, 5), [2, 3]), call(aten.tile.default, f(3, 5), [2])]
CASES["repeat_interleave.self_int"] = lambda: [call(aten.repeat_interleave.self_int, f(3, 5), 2, 0), call(aten.repeat_interleave.self_int, f(3, 5), 3, -1)]
CASES["slice"] = lambda: [
    call(aten.slice.Tensor, f(7, 5), 0, 2, 6),
    call(aten.slice.Tensor, f(7, 5), 0, 1, 7, 2),
    call(aten.slice.Tensor, f(7, 5), 0, None, 3),
    call(aten.slice.Tensor, f(7, 5), 0, 2),
    call(aten.slice.Tensor, f(5, 7), -1, 1, -1),
    call(aten.slice.Tensor, f(5, 7), 1, 0, 1 << 62),
]
CASES["narrow"] = lambda: [call(aten.narrow.default, f(7, 5), 0, 2, 3), call(aten.narrow.default, f(5, 7), -1, 0, 4)]
CASES["select"] = lambda: [call(aten.select.int, f(3, 5), 0, 2), call(aten.select.int, f(3, 5), -1, 0)]
CASES["chunk"] = lambda: [call(aten.chunk.default, f(6, 5), 2), call(aten.chunk.default, f(5, 7), 3, -1)]
CASES["split"] = lambda: [call(aten.split.Tensor, f(7, 5), 3), call(aten.split.Tensor, f(5, 6), 2, 1)]
CASES["split_with_sizes"] = lambda: [call(aten.split_with_sizes.default, f(5, 7), [1, 4, 2], -1)]
CASES["tensor_split"] = lambda: [call(aten.tensor_split.sections, f(7, 5), 3), call(aten.tensor_split.indices, f(5, 7), [2, 3], 1)]
CASES["unbind"] = lambda: [call(aten.unbind.int, f(3, 5)), call(aten.unbind.int, f(5, 2), -1)]
for name in ("cat", "concat", "concatenate"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, [f(3, 5), f(3, 1), f(3, 2)], -1),
        call(op, [f(3, 5), f(2, 5)]),
        call(op, [f(3, 5)], 1),
        call(op, [f(2, 1, 5), f(2, 3, 5)], 1),
    ]
more("cat", lambda: [call(aten.cat.default, [f(3, 5), f(3, 5).half()], 1), call(aten.cat.default, [i(3, 2), f(3, 5)], 1)])
CASES["stack"] = lambda: [call(aten.stack.default, [f(3, 5), f(3, 5), f(3, 5)], d) for d in (0, 1, -1)]
CASES["constant_pad_nd"] = lambda: [call(aten.constant_pad_nd.default, f(3, 5), [1, 2]), call(aten.constant_pad_nd.default, f(3, 5), [1, 0, 0, 2], -INF)]
more("constant_pad_nd", lambda: [call(aten.constant_pad_nd.default, f(3, 7), [-1, -2]), call(aten.constant_pad_nd.default, b(3, 5), [0, 1], True)])
CASES["pad"] = lambda: [call(aten.pad.default, f(3, 5), [2, 1]), call(aten.pad.default, f(3, 5), [0, 1], "constant", 1.5)]
CASES["flip"] = lambda: [call(aten.flip.default, f(3, 5), [0]), call(aten.flip.default, f(3, 5), [0, -1])]
CASES["embedding"] = lambda: [call(aten.embedding.default, f(7, 5), i(2, 3, least=0)), call(aten.embedding.default, f(7, 5), i(3, least=0))]
CASES["index_select"] = lambda: [call(aten.index_select.default, f(5, 7), 1, i(3, least=0)), call(aten.index_select.default, f(7, 5), 0, i(3, least=0))]
CASES["gather"] = lambda: [call(aten.gather.default, f(3, 7), 1, i(3, 5, least=0)), call(aten.gather.default, f(7, 5), 0, i(2, 3, least=0))]
CASES["index.Tensor"] = lambda: [
    call(aten.index.Tensor, f(7, 5), [i(3)]),
    call(aten.index.Tensor, f(7, 7, 5), [i(3, 1), i(2)]),
    call(aten.index.Tensor, f(5, 7), [None, i(2, 3)]),
    call(aten.index.Tensor, f(2, 7, 7, 5), [None, i(3), i(3)]),
    call(aten.index.Tensor, f(7, 5, 7), [i(3), None, i(3)]),
]
CASES["slice_scatter"] = lambda: [
    call(aten.slice_scatter.default, f(7, 5), f(3, 5), 0, 2, 5),
    call(aten.slice_scatter.default, f(5, 7), f(5, 7), 1),
    call(aten.slice_scatter.default, f(5, 7), f(5, 2), -1, 5),
    call(aten.slice_scatter.default, f(5, 7), f(5, 3), 1, -3),
]
CASES["select_scatter"] = lambda: [call(aten.select_scatter.default, f(3, 5), f(5), 0, 1), call(aten.select_scatter.default, f(3, 5), f(3), -1, -2)]
CASES["index_put"] = lambda: [call(aten.index_put.default, f(3, 5), [b(3, 5)], torch.tensor(2.0)), call(aten.index_put.default, f(3, 5), [b(3)], torch.tensor(-INF))]

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
CASES["mm"] = lambda: [call(aten.mm.default, f(3, 5), f(5, 7))]
CASES["mv"] = lambda: [call(aten.mv.default, f(3, 5), f(5))]
CASES["dot"] = lambda: [call(aten.dot.default, f(5), f(5))]
CASES["addmm"] = lambda: [call(aten.addmm.default, f(7), f(3, 5), f(5, 7)), call(aten.addmm.default, f(3, 1), f(3, 5), f(5, 7), beta=0.5, alpha=2)]
CASES["baddbmm"] = lambda: [
    call(aten.baddbmm.default, f(2, 3, 7), f(2, 3, 5), f(2, 5, 7), alpha=0.3),
    call(aten.baddbmm.default, odd(2, 3, 7), f(2, 3, 5), f(2, 5, 7), beta=0),
    call(aten.baddbmm.default, f(3, 7), f(2, 3, 5), f(2, 5, 7), beta=2),
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
    CASES[name] = lambda op=getattr(aten, name).default: [call(op, f(2, 3, 5), [-1]), call(op, f(2, 3, 5), [0, 1], True), call(op, f(3, 5)), call(op, odd(3, 5), [1])]
for name in ("any", "all"):
    CASES[name] = lambda op=getattr(aten, name): [call(op.default, b(3, 5)), call(op.dim, b(3, 5), -1), call(op.dim, b(3, 5), 0, True), call(op.dims, b(2, 3, 5), [0, 2])]
CASES["prod"] = lambda: [call(aten.prod.dim_int, f(3, 5), 1), call(aten.prod.default, f(3, 5)), call(aten.prod.dim_int, f(3, 5), 0, True)]
for name in ("max", "min"):
    CASES[name] = lambda op=getattr(aten, name): [call(op.default, f(3, 5)), call(op.default, f(7))]
    CASES[f"{name}.dim"] = lambda op=getattr(aten, name): [call(op.dim, f(3, 5), -1), call(op.dim, f(2, 3, 5), 1, True)]
CASES["softmax"] = lambda: [call(aten.softmax.int, f(2, 3, 5), -1), call(aten.softmax.int, f(3, 5), 0), call(aten.softmax.int, f(3, 5).half(), -1, torch.float32), call(aten.softmax.int, odd(3, 5), -1)]
CASES["_softmax"] = lambda: [call(aten._softmax.default, f(3, 5), -1, False)]
CASES["_safe_softmax"] = lambda: [call(aten._safe_softmax.default, f(3, 5), -1), call(aten._safe_softmax.default, f(3, 5).masked_fill(torch.tensor([[True], [False], [False]]), -INF), -1)]
CASES["log_softmax"] = lambda: [call(aten.log_softmax.int, f(2, 3, 5), -1), call(aten.log_softmax.int, f(3, 5), 0, torch.float32)]
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
    call(aten.scaled_dot_product_attention.default, f(2, 4, 3, 8), f(2, 2, 7, 8), f(2, 2, 7, 5), enable_gqa=True),
    call(aten.scaled_dot_product_attention.default, f(2, 3, 8), f(2, 7, 8), f(2, 7, 5)),
    call(aten.scaled_dot_product_attention.default, f(3, 8), f(7, 8), f(7, 5)),
]
