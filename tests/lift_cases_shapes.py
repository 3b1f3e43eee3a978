"""Calls for views and indexing: more of `CASES` in `lift_cases.py`."""

from __future__ import annotations

import torch

from tests.lift_cases import CASES, INF, aten, b, f, i, more
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
more(
    "reshape",
    lambda: [
        call(aten.reshape.default, f(5, 3).t(), [3, 5]),
        call(aten.reshape.default, f(3, 5, 2), [3, -1]),
    ],
)
CASES["view_as"] = lambda: [call(aten.view_as.default, f(3, 10), f(3, 5, 2))]
CASES["reshape_as"] = lambda: [call(aten.reshape_as.default, f(3, 10), f(3, 5, 2))]
CASES["flatten"] = lambda: [
    call(aten.flatten.using_ints, f(2, 3, 5)),
    call(aten.flatten.using_ints, f(2, 3, 5), 1),
    call(aten.flatten.using_ints, f(2, 3, 5), 0, 1),
]
CASES["unflatten"] = lambda: [
    call(aten.unflatten.int, f(3, 10), 1, [5, 2]),
    call(aten.unflatten.int, f(10, 3), 0, [2, -1]),
]
CASES["permute"] = lambda: [
    call(aten.permute.default, f(2, 3, 5), [2, 0, 1]),
    call(aten.permute.default, f(2, 3, 5), [0, -1, 1]),
]
for name in ("swapaxes", "swapdims"):
    CASES[name] = lambda op=getattr(aten, name).default: [call(op, f(2, 3, 5), 0, 2)]
CASES["transpose"] = lambda: [
    call(aten.transpose.int, f(2, 3, 5), 1, 2),
    call(aten.transpose.int, f(2, 3, 5), 0, -1),
]
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
CASES["expand"] = lambda: [
    call(aten.expand.default, f(3, 1), [3, 5]),
    call(aten.expand.default, f(5), [2, 3, 5]),
    call(aten.expand.default, f(1, 5), [3, -1]),
]
CASES["expand_as"] = lambda: [call(aten.expand_as.default, f(3, 1), f(2, 3, 5))]
CASES["broadcast_to"] = lambda: [call(aten.broadcast_to.default, f(5), [3, 5])]
CASES["repeat"] = lambda: [
    call(aten.repeat.default, f(3, 5), [2, 3]),
    call(aten.repeat.default, f(5), [2, 3]),
    call(aten.repeat.default, f(3, 1), [1, 4]),
]
CASES["tile"] = lambda: [
    call(aten.tile.default, f(3, 5), [2, 3]),
    call(aten.tile.default, f(3, 5), [2]),
]
CASES["repeat_interleave.self_int"] = lambda: [
    call(aten.repeat_interleave.self_int, f(3, 5), 2),
    call(aten.repeat_interleave.self_int, f(3, 5), 2, 0),
    call(aten.repeat_interleave.self_int, f(3, 5), 3, -1),
]
CASES["slice"] = lambda: [
    call(aten.slice.Tensor, f(7, 5), 0, 2, 6),
    call(aten.slice.Tensor, f(7, 5), 0, 1, 7, 2),
    call(aten.slice.Tensor, f(7, 5), 0, None, 3),
    call(aten.slice.Tensor, f(7, 5), 0, 2),
    call(aten.slice.Tensor, f(5, 7), -1, 1, -1),
    call(aten.slice.Tensor, f(5, 7), 1, 0, 1 << 62),
    call(aten.slice.Tensor, f(5, 7), 1, -3),
    call(aten.slice.Tensor, f(5, 7), 1, -9),
    call(aten.slice.Tensor, f(5, 7), 1, -9, -2, 2),
]
CASES["narrow"] = lambda: [
    call(aten.narrow.default, f(7, 5), 0, 2, 3),
    call(aten.narrow.default, f(5, 7), -1, 0, 4),
]
CASES["select"] = lambda: [
    call(aten.select.int, f(3, 5), 0, 2),
    call(aten.select.int, f(3, 5), -1, 0),
]
CASES["chunk"] = lambda: [
    call(aten.chunk.default, f(6, 5), 2),
    call(aten.chunk.default, f(5, 7), 3, -1),
]
CASES["split"] = lambda: [
    call(aten.split.Tensor, f(7, 5), 3),
    call(aten.split.Tensor, f(5, 6), 2, 1),
]
CASES["split_with_sizes"] = lambda: [call(aten.split_with_sizes.default, f(5, 7), [1, 4, 2], -1)]
CASES["tensor_split"] = lambda: [
    call(aten.tensor_split.sections, f(7, 5), 3),
    call(aten.tensor_split.indices, f(5, 7), [2, 3], 1),
]
CASES["unbind"] = lambda: [call(aten.unbind.int, f(3, 5)), call(aten.unbind.int, f(5, 2), -1)]
for name in ("cat", "concat", "concatenate"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, [f(3, 5), f(3, 1), f(3, 2)], -1),
        call(op, [f(3, 5), f(2, 5)]),
        call(op, [f(3, 5)], 1),
        call(op, [f(2, 1, 5), f(2, 3, 5)], 1),
    ]
more(
    "cat",
    lambda: [
        call(aten.cat.default, [f(3, 5), f(3, 5).half()], 1),
        call(aten.cat.default, [i(3, 2), f(3, 5)], 1),
    ],
)
CASES["stack"] = lambda: [call(aten.stack.default, [f(3, 5), f(3, 5), f(3, 5)], d) for d in (0, 1, -1)]
CASES["constant_pad_nd"] = lambda: [
    call(aten.constant_pad_nd.default, f(3, 5), [1, 2]),
    call(aten.constant_pad_nd.default, f(3, 5), [1, 0, 0, 2], -INF),
]
more("constant_pad_nd", lambda: [call(aten.constant_pad_nd.default, b(3, 5), [0, 1], True)])
CASES["pad"] = lambda: [
    call(aten.pad.default, f(3, 5), [2, 1]),
    call(aten.pad.default, f(3, 5), [0, 1], "constant", 1.5),
]
CASES["flip"] = lambda: [
    call(aten.flip.default, f(3, 5), [0]),
    call(aten.flip.default, f(3, 5), [0, -1]),
]
CASES["embedding"] = lambda: [
    call(aten.embedding.default, f(7, 5), i(2, 3, least=0)),
    call(aten.embedding.default, f(7, 5), i(3, least=0)),
]
CASES["index_select"] = lambda: [
    call(aten.index_select.default, f(5, 7), 1, i(3, least=0)),
    call(aten.index_select.default, f(7, 5), 0, i(3, least=0)),
]
CASES["gather"] = lambda: [
    call(aten.gather.default, f(3, 7), 1, i(3, 5, least=0)),
    call(aten.gather.default, f(7, 5), 0, i(2, 3, least=0)),
]
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
    call(aten.slice_scatter.default, f(5, 7), f(5, 4), 1, -9, -3),
    call(aten.slice_scatter.default, f(5, 7), f(5, 4), 1, 0, 1 << 62, 2),
    call(aten.slice_scatter.default, f(5, 7), f(5, 2), 1, 1, 6, 3),
]
CASES["select_scatter"] = lambda: [
    call(aten.select_scatter.default, f(3, 5), f(5), 0, 1),
    call(aten.select_scatter.default, f(3, 5), f(3), -1, -2),
]
CASES["index_put"] = lambda: [
    call(aten.index_put.default, f(3, 5), [b(3, 5)], torch.tensor(2.0)),
    call(aten.index_put.default, f(3, 5), [b(3)], torch.tensor(-INF)),
]
more(
    "index_put",
    lambda: [
        call(aten.index_put.default, f(3, 5, 7), [None, b(5, 7)], torch.tensor(2.0)),
        call(aten.index_put.default, f(7, 5), [i(2, 3, least=0)], torch.tensor(2.0)),
        call(aten.index_put.default, f(5, 7), [None, torch.tensor([-1, 2])], torch.tensor(0.0)),
    ],
)
CASES["index_fill"] = lambda: [
    call(aten.index_fill.int_Scalar, f(3, 7), 1, i(3, least=0), 2.0),
    call(aten.index_fill.int_Tensor, f(7, 3), 0, torch.tensor([-1]), torch.tensor(-INF)),
]
CASES["scatter.value"] = lambda: [
    call(aten.scatter.value, f(3, 7), 1, i(3, 1, least=0), 2.0),
    call(aten.scatter.value, f(7, 5), 0, i(1, 3, least=0), -INF),
]
CASES["scatter.src"] = lambda: [
    call(aten.scatter.src, f(3, 7), 1, i(3, 1, least=0), f(3, 1)),
    call(aten.scatter.src, f(7, 5), 0, i(1, 3, least=0), f(2, 5)),
]
CASES["one_hot"] = lambda: [call(aten.one_hot.default, i(3, 5, least=0), 9)]
CASES["diagonal"] = lambda: [
    call(aten.diagonal.default, f(5, 7)),
    call(aten.diagonal.default, f(5, 7), 2),
    call(aten.diagonal.default, f(5, 3, 7), -1, 2, 0),
]
CASES["unfold"] = lambda: [
    call(aten.unfold.default, f(3, 7), 1, 3, 2),
    call(aten.unfold.default, f(7, 3, 2), -3, 2, 1),
]
CASES["meshgrid"] = lambda: [
    call(aten.meshgrid.default, [f(3), f(5)]),
    call(aten.meshgrid.indexing, [f(3), f(5), f(2)], indexing="xy"),
    call(aten.meshgrid.indexing, [i(3), i(5)], indexing="ij"),
]
CASES["broadcast_tensors"] = lambda: [call(aten.broadcast_tensors.default, [f(3, 1), f(5), i(2, 1, 5)])]
CASES["roll"] = lambda: [
    call(aten.roll.default, f(3, 5), [1], [-1]),
    call(aten.roll.default, f(3, 5, 2), [-2, 7], [0, 1]),
]
CASES["diagonal_scatter"] = lambda: [
    call(aten.diagonal_scatter.default, f(5, 7), f(5)),
    call(aten.diagonal_scatter.default, f(5, 7), f(3), 4),
    call(aten.diagonal_scatter.default, f(5, 3, 7), f(3, 5), 1, 0, 2),
    call(aten.diagonal_scatter.default, f(5, 3, 7), f(3, 4), 1, -1, 0),
]
CASES["diag"] = lambda: [call(aten.diag.default, f(5)), call(aten.diag.default, f(5), -2)]
CASES["diag_embed"] = lambda: [
    call(aten.diag_embed.default, f(3, 5)),
    call(aten.diag_embed.default, f(3, 5), 1),
]
