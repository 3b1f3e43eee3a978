"""Calls for norms, moments, distances, dense layers and losses: more of `CASES` in `lift_cases.py`."""

from __future__ import annotations

import torch

from tests.lift_cases import CASES, INF, NAN, aten, b, f, i, more, p
from tests.lifting import call

# Contractions

CASES["linear"] = lambda: [
    call(aten.linear.default, f(2, 3, 5), f(7, 5)),
    call(aten.linear.default, f(3, 5), f(7, 5), f(7)),
    call(aten.linear.default, f(5), f(7, 5), f(7)),
    call(aten.linear.default, f(3, 5), f(5)),
]
CASES["conv1d"] = lambda: [
    call(aten.conv1d.default, f(2, 6, 5), f(4, 6, 1)),
    call(aten.conv1d.default, f(6, 5), f(4, 6, 1), f(4)),
    call(aten.conv1d.default, f(2, 6, 5), f(4, 3, 1), f(4), [1], [0], [1], 2),
    call(aten.conv1d.padding, f(2, 6, 5), f(4, 6, 1), f(4), [1], "same"),
]
CASES["conv2d"] = lambda: [
    call(aten.conv2d.default, f(2, 4, 3, 5), f(6, 4, 1, 1), f(6)),
    call(aten.conv2d.default, f(2, 4, 3, 5), f(8, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 4),
    call(aten.conv2d.default, f(4, 3, 5), f(6, 4, 1, 1)),
]
CASES["conv3d"] = lambda: [call(aten.conv3d.default, f(2, 4, 3, 5, 2), f(6, 4, 1, 1, 1), f(6))]
CASES["convolution"] = lambda: [
    call(aten.convolution.default, f(2, 4, 3, 5), f(6, 2, 1, 1), f(6), [1, 1], [0, 0], [1, 1], False, [0, 0], 2),
]
CASES["inner"] = lambda: [call(aten.inner.default, f(2, 3, 5), f(7, 5)), call(aten.inner.default, f(5), f(5))]
CASES["vdot"] = lambda: [call(aten.vdot.default, f(5), f(5))]
CASES["linalg_vecdot"] = lambda: [call(aten.linalg_vecdot.default, f(2, 3, 5), f(3, 5))]
for name in ("outer", "ger"):
    CASES[name] = lambda op=getattr(aten, name).default: [call(op, f(3), f(5))]
CASES["tensordot"] = lambda: [
    call(aten.tensordot.default, f(2, 3, 5), f(5, 7), [2], [0]),
    call(aten.tensordot.default, f(2, 3, 5), f(7, 5, 3), [-1, 1], [1, 2]),
    call(aten.tensordot.default, f(2), f(3), [], []),
]

# Moments and norms

for name in ("var", "std", "var_mean", "std_mean"):
    CASES[name] = lambda op=getattr(aten, name): [
        call(op.default, f(3, 5)),
        call(op.default, f(3, 5), False),
        call(op.dim, 1 + f(2, 3, 5), [-1]),
        call(op.dim, f(2, 3, 5), [0, 2], False, True),
        call(op.correction, 30 + f(2, 3, 5), [1], correction=0),
        call(op.correction, f(2, 3, 5), [1], correction=2, keepdim=True),
        call(op.correction, f(3, 5)),
        call(op.dim, f(3, 1), [1], False),
    ]
ORDERS = (2, 1, INF, -INF, 0, 3, 0.5)
CASES["linalg_vector_norm"] = lambda: [
    *(call(aten.linalg_vector_norm.default, f(2, 3, 5), order, [-1]) for order in ORDERS),
    call(aten.linalg_vector_norm.default, f(2, 3, 5), 2, [0, 2], True),
    call(aten.linalg_vector_norm.default, f(3, 5)),
    call(aten.linalg_vector_norm.default, f(3, 5).half(), 2, [1], dtype=torch.float32),
]
CASES["norm"] = lambda: [
    call(aten.norm.ScalarOpt_dim, f(2, 3, 5), 2, [1], True),
    call(aten.norm.ScalarOpt_dim, f(2, 3, 5), None, [1]),
    call(aten.norm.ScalarOpt_dim_dtype, f(3, 5).half(), 2, [1], False, dtype=torch.float32),
    call(aten.norm.Scalar, f(3, 5)),
    call(aten.norm.Scalar, f(3, 5), 1),
]
CASES["frobenius_norm"] = lambda: [
    call(aten.frobenius_norm.dim, f(2, 3, 5), [1, 2]),
    call(aten.frobenius_norm.dim, f(2, 3, 5), [1, 2], True),
]
CASES["linalg_norm"] = lambda: [
    *(call(aten.linalg_norm.default, f(2, 3, 5), order, [-1]) for order in (None, 1, INF, 3)),
    call(aten.linalg_norm.default, f(2, 3, 5)),
    call(aten.linalg_norm.default, f(2, 3, 5), None, [0, 2], True),
    call(aten.linalg_norm.default, f(5), 1),
    call(aten.linalg_norm.ord_str, f(2, 3, 5), "fro", [1, 2]),
    call(aten.linalg_norm.default, f(3, 5).half(), 2, [1], dtype=torch.float32),
]
CASES["linalg_matrix_norm"] = lambda: [call(aten.linalg_matrix_norm.str_ord, f(2, 3, 5))]
CASES["cross"] = lambda: [call(aten.cross.default, f(2, 5, 3), f(2, 5, 3), -1)]
CASES["linalg_cross"] = lambda: [
    call(aten.linalg_cross.default, f(2, 5, 3), f(1, 5, 3)),
    call(aten.linalg_cross.default, f(2, 3, 5), f(2, 3, 5), dim=1),
]
CASES["dist"] = lambda: [call(aten.dist.default, f(3, 5), f(5)), call(aten.dist.default, f(3, 5), f(3, 5), 1)]
CASES["cdist"] = lambda: [
    *(call(aten.cdist.default, f(2, 3, 5), f(2, 7, 5), order) for order in (2.0, 1.0, INF, 3.0, 0.0)),
    call(aten.cdist.default, f(3, 5), f(7, 5)),
    call(aten.cdist.default, f(2, 1, 3, 5), f(4, 7, 5), 2.0, 2),
]
CASES["_cdist_forward"] = lambda: [call(aten._cdist_forward.default, f(2, 3, 5), f(2, 7, 5), 1.0, None)]
CASES["pairwise_distance"] = lambda: [
    call(aten.pairwise_distance.default, f(3, 5), f(3, 5)),
    call(aten.pairwise_distance.default, f(3, 1, 5), f(7, 5), 1.0, 1e-3, True),
]
CASES["cosine_similarity"] = lambda: [
    call(aten.cosine_similarity.default, f(3, 5), f(3, 5)),
    call(aten.cosine_similarity.default, f(3, 1, 5), f(1, 7, 5), -1),
    call(aten.cosine_similarity.default, torch.zeros(3, 5), f(3, 5), 1, 1e-3),
]

# Layers

CASES["layer_norm"] = lambda: [
    call(aten.layer_norm.default, 3 + f(2, 3, 5), [5], p(5), f(5)),
    call(aten.layer_norm.default, f(2, 3, 5), [3, 5], p(3, 5)),
    call(aten.layer_norm.default, f(2, 3, 5).half(), [5], None, None, 1e-3),
]
CASES["native_layer_norm"] = lambda: [call(aten.native_layer_norm.default, f(2, 3, 5), [5], p(5), f(5), 1e-5)]
CASES["rms_norm"] = lambda: [
    call(aten.rms_norm.default, f(2, 3, 5), [5], p(5), 1e-6),
    call(aten.rms_norm.default, 1e-4 * f(2, 3, 5), [5]),
    call(aten.rms_norm.default, f(2, 3, 5), [3, 5]),
    call(aten.rms_norm.default, 1e-2 * f(2, 3, 5).half(), [5], p(5).half()),
]
CASES["group_norm"] = lambda: [
    call(aten.group_norm.default, f(2, 6, 3, 5), 3, p(6), f(6)),
    call(aten.group_norm.default, f(2, 6, 5), 1),
    call(aten.group_norm.default, f(2, 6), 2, p(6), f(6), 1e-3),
]
CASES["instance_norm"] = lambda: [
    call(aten.instance_norm.default, f(2, 4, 3, 5), p(4), f(4), None, None, True, 0.1, 1e-5, False),
]
CASES["batch_norm"] = lambda: [
    call(aten.batch_norm.default, f(2, 4, 3), p(4), f(4), f(4), p(4), False, 0.1, 1e-5, False),
    call(aten.batch_norm.default, f(2, 4), None, None, f(4), p(4), False, 0.1, 1e-3, False),
]

# Losses; reductions by number: none, mean, sum


def labels(*shape: int) -> torch.Tensor:
    """Classes from 0 to 4, some ignored."""
    return i(*shape, least=0, most=5).masked_fill(b(*shape), -100)


CASES["cross_entropy_loss"] = lambda: [
    *(call(aten.cross_entropy_loss.default, f(6, 5), labels(6), None, how) for how in (0, 1, 2)),
    call(aten.cross_entropy_loss.default, f(6, 5), torch.tensor([0, 3, 3, 1, 4, 2]), None, 1, 3),
    call(aten.cross_entropy_loss.default, f(6, 5), torch.tensor([0, -100, 3, 1, 4, 2]), p(5), 1, -100, 0.2),
    call(aten.cross_entropy_loss.default, f(6, 5), torch.tensor([0, -100, 3, 1, 4, 2]), None, 0, -100, 0.2),
    call(aten.cross_entropy_loss.default, f(6, 5), torch.tensor([0, -100, 3, 1, 4, 2]), p(5), 2),
    call(aten.cross_entropy_loss.default, f(2, 5, 3), torch.tensor([[0, -100, 3], [1, 4, 2]]), None, 1),
    call(aten.cross_entropy_loss.default, f(2, 5, 3, 2), i(2, 3, 2, least=0, most=5), None, 1, -100, 0.1),
    call(aten.cross_entropy_loss.default, f(5), torch.tensor(2)),
    call(aten.cross_entropy_loss.default, f(5), torch.tensor(-100)),
    call(aten.cross_entropy_loss.default, f(6, 5), torch.full((6,), -100)),
    call(aten.cross_entropy_loss.default, f(6, 5).half(), torch.tensor([0, -100, 3, 1, 4, 2])),
    call(aten.cross_entropy_loss.default, f(6, 5), f(6, 5).softmax(-1)),
    call(aten.cross_entropy_loss.default, f(6, 5), f(6, 5).softmax(-1), p(5), 0, -100, 0.1),
    call(aten.cross_entropy_loss.default, f(2, 5, 3), f(2, 5, 3).softmax(1)),
]
for name in ("nll_loss", "nll_loss_nd"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        *(call(op, f(6, 5), torch.tensor([0, -100, 3, 1, 4, 2]), None, how) for how in (0, 1, 2)),
        call(op, f(6, 5), torch.tensor([0, 1, 3, 1, 4, 2]), p(5), 1, 3),
    ]
more("nll_loss_nd", lambda: [call(aten.nll_loss_nd.default, f(2, 5, 3), i(2, 3, least=0, most=5))])
CASES["nll_loss2d"] = lambda: [call(aten.nll_loss2d.default, f(2, 5, 3, 2), i(2, 3, 2, least=0, most=5))]
CASES["kl_div"] = lambda: [
    *(call(aten.kl_div.default, f(3, 5), f(3, 5).softmax(-1), how) for how in (0, 1, 2)),
    call(aten.kl_div.default, f(3, 5), torch.eye(3, 5), 2),
    call(aten.kl_div.default, f(3, 5), f(3, 5), 2, log_target=True),
]
for name in ("mse_loss", "l1_loss"):
    CASES[name] = lambda op=getattr(aten, name).default: [call(op, f(3, 5), f(3, 5), how) for how in (0, 1, 2)]
CASES["huber_loss"] = lambda: [call(aten.huber_loss.default, 3 * f(3, 5), f(3, 5), how, 0.7) for how in (0, 1, 2)]
CASES["smooth_l1_loss"] = lambda: [
    call(aten.smooth_l1_loss.default, 3 * f(3, 5), f(3, 5), how, width) for how in (0, 1) for width in (0.7, 1.0, 0.0)
]
CASES["binary_cross_entropy_with_logits"] = lambda: [
    call(aten.binary_cross_entropy_with_logits.default, 30 * f(3, 5), b(3, 5).float(), None, None, how)
    for how in (0, 1, 2)
]

# Positions, counts and truth


def ties(*shape: int) -> torch.Tensor:
    """Whole numbers of which many are equal."""
    return i(*shape, least=0, most=3).float()


for name in ("argmax", "argmin"):
    CASES[name] = lambda op=getattr(aten, name).default: [
        call(op, f(3, 5), -1),
        call(op, ties(3, 5), 0, True),
        call(op, ties(2, 3, 5), 1),
        call(op, ties(3, 5)),
        call(op, i(3, 5), 1),
        call(op, torch.full((3, 5), -INF), 1),
        call(op, torch.full((3, 5), NAN), 1),
    ]
for name in ("max", "min"):
    more(
        f"{name}.dim",
        lambda op=getattr(aten, name).dim: [call(op, ties(3, 5), 1), call(op, i(3, 5), 0), call(op, b(3, 5), 0)],
    )
    more(name, lambda op=getattr(aten, name).default: [call(op, i(3, 5))])
more("amax", lambda: [call(aten.amax.default, i(3, 5), [1]), call(aten.amax.default, b(3, 5), [1])])
CASES["aminmax"] = lambda: [call(aten.aminmax.default, f(3, 5), dim=1), call(aten.aminmax.default, f(3, 5))]
CASES["count_nonzero"] = lambda: [
    call(aten.count_nonzero.default, ties(3, 5)),
    call(aten.count_nonzero.dim_IntList, b(3, 5), [1]),
]
CASES["nansum"] = lambda: [call(aten.nansum.default, torch.tensor([[1.0, NAN], [NAN, NAN]]), [1])]
for name in ("any", "all"):
    more(name, lambda op=getattr(aten, name).dim: [call(op, ties(3, 5), 1), call(op, i(3, 5), 0)])
for name in ("softmax", "log_softmax"):
    CASES[f"special_{name}"] = lambda op=getattr(aten, f"special_{name}"): [
        call(getattr(op, op.overloads()[0]), f(3, 5), -1)
    ]
CASES["special_logsumexp"] = lambda: [call(aten.special_logsumexp.default, f(2, 3, 5), [0, 2])]
more("logsumexp", lambda: [call(aten.logsumexp.default, 40 * f(2, 3, 5), [1, 2])])
more("prod", lambda: [call(aten.prod.dim_int, i(3, 5), 1)])
