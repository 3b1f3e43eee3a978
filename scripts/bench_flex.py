"""FlexAttention beside the zoo programs that it can express: a compiled call, and their score and mask functions."""

from __future__ import annotations

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def call(q, k, v, score, mask, batch: int | None = None):
    """A compiled call on [B, H, S, D]. The block mask is made beforehand: its time does not count."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    blocks = None
    if mask is not None:
        blocks = create_block_mask(mask, batch, None, q.shape[2], k.shape[2], device=str(q.device))
    return lambda: compiled(q, k, v, score_mod=score, block_mask=blocks)


def of_program(name: str, module, args: list):
    """A call that gives what the program gives. None for a program that FlexAttention is not, or not all of."""
    if name not in _PROGRAMS:
        return None
    heads_last, functions = name in _HEADS_LAST, _PROGRAMS[name](module, args)
    q, k, v = (a.transpose(1, 2) if heads_last else a for a in args[:3])
    run = call(q, k, v, *functions, q.shape[0] if name == "prefix_lengths" else None)
    return (lambda: run().transpose(1, 2)) if heads_last else run


def _causal(b, h, i, j):
    return i >= j


def _key_bias(slopes):
    return lambda s, b, h, i, j: s + slopes[h] * j, _causal


def _symmetric_bias(slopes):
    return lambda s, b, h, i, j: s - slopes[h] * (i - j).abs(), None


def _softcap(cap):
    return lambda s, b, h, i, j: cap * torch.tanh(s / cap), _causal


def _last(ahead):
    return None, lambda b, h, i, j: i + ahead >= j


def _window(window):
    return None, lambda b, h, i, j: (i >= j) & (i - j < window)


def _prefixes(lengths):
    return None, lambda b, h, i, j: (i >= j) | (j < lengths[b])


def _documents(ids):
    return None, lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)


_VANILLA = ("einsum", "by_hand_early", "by_hand_late", "unsafe_late", "function")
_HEADS_LAST = ("causal_last_queries", "alibi_learned_slopes")
_PROGRAMS = {  # (module, args) -> score and mask function; a program with projections is more than FlexAttention
    **{f"vanilla_{spelling}": lambda m, a: (None, None) for spelling in _VANILLA},
    **{f"causal_{s}": lambda m, a: (None, _causal) for s in ("arange_where", "sdpa_flag", "multiplied")},
    "causal_last_queries": lambda m, a: _last(a[1].shape[1] - a[0].shape[1]),
    "alibi_learned_slopes": lambda m, a: _symmetric_bias(m.log_slopes.exp().float()),
    "alibi_buffer_sdpa": lambda m, a: _key_bias(m.bias[:, -1, 1].float()),  # slope x position, at position 1
    "softcap_causal": lambda m, a: _softcap(m.softcap),
    "sliding_band": lambda m, a: _window(m.window),
    "sliding_log_mask": lambda m, a: _window(m.sliding_window),
    "prefix_lengths": lambda m, a: _prefixes(a[3]),
    "documents_one_row": lambda m, a: _documents(a[3]),
}
