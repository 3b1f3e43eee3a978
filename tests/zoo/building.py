"""How zoo programs are built and fed. No attention here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Shape(NamedTuple):
    """The dimensions something was built with; `build` leaves it on the module as `zoo_shape`."""

    dim: int
    heads: int
    head_dim: int
    kv_heads: int


def built(make: Callable, dim: int = 64, heads: int = 4) -> Callable:
    """`make(dim, heads, **options)` as a `Program.build`: seeded, randomised, in eval mode.

    `dim` and `heads` are what it is built with unless told otherwise. `make` may also be a plain
    function's maker; the function then carries the shape it was last built with.
    """
    signature = inspect.signature(make)

    def build(dim: int = dim, heads: int = heads, **options):
        if "max_len" not in signature.parameters:
            options.pop("max_len", None)
        arguments = signature.bind(dim, heads, **options)
        arguments.apply_defaults()
        torch.manual_seed(0)
        made = make(*arguments.args, **arguments.kwargs)
        chosen = arguments.arguments
        made.zoo_shape = Shape(dim, heads, chosen.get("head_dim", dim // heads), chosen.get("kv_heads", heads))
        if isinstance(made, nn.Module):
            randomise(made)
            made.eval()
        return made

    return build


def small(make: Callable, heads: int = 2) -> Callable:
    """As `built`, but 32 wide unless told otherwise."""
    return built(make, dim=32, heads=heads)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Leave no parameter constant: a zero bias or a norm weight of ones hides what is done with it."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if (parameter == parameter.flatten()[0]).all():
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif isinstance(part, (nn.Linear, nn.Conv1d)) and parameter.dim() > 1:
                # PyTorch's own init makes scores so flat that a wrong mask hardly shows.
                parameter.mul_(2)


# Inputs. Each maker takes (sizes, shape, generator) and returns a tuple of tensors.


def feed(*makers: Callable) -> Callable:
    """`Program.inputs` out of makers: what they make, one after the other."""

    def inputs(sizes, module, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        if generator is None:
            generator = torch.Generator().manual_seed(1)
        return sum((make(sizes, module.zoo_shape, generator) for make in makers), ())

    return inputs


def tokens(sizes, shape, generator):
    """x [B, S, dim]"""
    return (torch.randn(sizes.batch, sizes.q, shape.dim, generator=generator),)


def memory(sizes, shape, generator):
    """what is attended to [B, S_kv, dim]"""
    return (torch.randn(sizes.batch, sizes.keys, shape.dim, generator=generator),)


def tokens_first(sizes, shape, generator):
    """x [S, B, dim]"""
    return (torch.randn(sizes.q, sizes.batch, shape.dim, generator=generator),)


def tokens_unbatched(sizes, shape, generator):
    """x [S, dim]"""
    return (torch.randn(sizes.q, shape.dim, generator=generator),)


def channels_first(sizes, shape, generator):
    """x [B, dim, S]"""
    return (torch.randn(sizes.batch, shape.dim, sizes.q, generator=generator),)


def pixels(sizes, shape, generator):
    """x [B, dim, 1, S]"""
    return (torch.randn(sizes.batch, shape.dim, 1, sizes.q, generator=generator),)


def token_ids(sizes, shape, generator):
    """token ids [B, S] below 100, of which about one in eight is 0"""
    ids = torch.randint(1, 100, (sizes.batch, sizes.q), generator=generator)
    return (ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.125, 0),)


def heads_first(sizes, shape, generator):
    """q [B, H, Q, d], k and v [B, H_kv, K, d]"""
    q = torch.randn(sizes.batch, shape.heads, sizes.q, shape.head_dim, generator=generator)
    kv = (sizes.batch, shape.kv_heads, sizes.keys, shape.head_dim)
    return q, torch.randn(kv, generator=generator), torch.randn(kv, generator=generator)


def queries_and_keys(sizes, shape, generator):
    """q [B, H, Q, d], k [B, H_kv, K, d]"""
    return heads_first(sizes, shape, generator)[:2]


def heads_last(sizes, shape, generator):
    """q [B, Q, H, d], k and v [B, K, H_kv, d]"""
    q = torch.randn(sizes.batch, sizes.q, shape.heads, shape.head_dim, generator=generator)
    kv = (sizes.batch, sizes.keys, shape.kv_heads, shape.head_dim)
    return q, torch.randn(kv, generator=generator), torch.randn(kv, generator=generator)


def heads_merged(sizes, shape, generator):
    """q, k, v [B*H, S, d]"""
    rows = sizes.batch * shape.heads
    q = torch.randn(rows, sizes.q, shape.head_dim, generator=generator)
    kv = (rows, sizes.keys, shape.head_dim)
    return q, torch.randn(kv, generator=generator), torch.randn(kv, generator=generator)


def one_head(sizes, shape, generator):
    """q, k, v [B, S, d]"""
    q = torch.randn(sizes.batch, sizes.q, shape.head_dim, generator=generator)
    kv = (sizes.batch, sizes.keys, shape.head_dim)
    return q, torch.randn(kv, generator=generator), torch.randn(kv, generator=generator)


def one_sequence(sizes, shape, generator):
    """q, k, v [S, d]: no batch, no heads"""
    q = torch.randn(sizes.q, shape.head_dim, generator=generator)
    kv = (sizes.keys, shape.head_dim)
    return q, torch.randn(kv, generator=generator), torch.randn(kv, generator=generator)


def sequence_heads_last(sizes, shape, generator):
    """q, k, v [S, H, d]: no batch"""
    q = torch.randn(sizes.q, shape.heads, shape.head_dim, generator=generator)
    kv = (sizes.keys, shape.kv_heads, shape.head_dim)
    return q, torch.randn(kv, generator=generator), torch.randn(kv, generator=generator)


def slopes(sizes, shape, generator):
    """a positive number per head [H]"""
    return (torch.rand(shape.heads, generator=generator) * 0.2 + 0.05,)


def key_lengths(sizes, shape, generator):
    """how many keys of each batch element are real [B], from 1 to K"""
    lengths = torch.randint(1, sizes.keys + 1, (sizes.batch,), generator=generator)
    lengths[0] = (sizes.keys + 1) // 2  # so that a batch of one is masked, too
    return (lengths,)


def key_lengths_some_zero(sizes, shape, generator):
    """as `key_lengths`, but the first element of the batch has no keys at all"""
    (lengths,) = key_lengths(sizes, shape, generator)
    return (lengths.index_fill(0, torch.tensor([0]), 0),)


def padding_mask(sizes, shape, generator):
    """a tokenizer's attention mask [B, S], int64: ones, then zeros"""
    (lengths,) = key_lengths(sizes, shape, generator)
    return ((torch.arange(sizes.keys) < lengths[:, None]).long(),)


def left_padding_mask(sizes, shape, generator):
    """as `padding_mask`, padded on the left, as for generation"""
    (mask,) = padding_mask(sizes, shape, generator)
    return (mask.flip(-1),)


def document_ids(sizes, shape, generator):
    """ids [S], rising, several tokens each"""
    starts = torch.rand(sizes.q, generator=generator) < 0.15
    return (starts.cumsum(-1),)


def batch_document_ids(sizes, shape, generator):
    """ids [B, S], rising, several tokens each"""
    starts = torch.rand(sizes.batch, sizes.q, generator=generator) < 0.15
    return (starts.cumsum(-1),)


def positions(sizes, shape, generator):
    """position ids [B, S]: each batch element starts elsewhere"""
    starts = torch.randint(0, 100, (sizes.batch, 1), generator=generator)
    return (starts + torch.arange(sizes.q),)


def live_mask(sizes, shape, generator):
    """bool [B, 1, Q, K], True where attended, at least one key for each query"""
    mask = torch.rand(sizes.batch, 1, sizes.q, sizes.keys, generator=generator) < 0.6
    mask[..., 0] = True
    return (mask,)


def live_mask_2d(sizes, shape, generator):
    """bool [Q, K], True where attended, at least one key for each query"""
    mask = torch.rand(sizes.q, sizes.keys, generator=generator) < 0.6
    mask[:, 0] = True
    return (mask,)


def live_mask_some_rows_empty(sizes, shape, generator):
    """bool [B, 1, Q, K]; every third query has no key at all"""
    (mask,) = live_mask(sizes, shape, generator)
    mask[:, :, ::3] = False
    return (mask,)


def additive_mask_2d(sizes, shape, generator):
    """float [Q, K]: a random bias, -inf where not attended"""
    (live,) = live_mask_2d(sizes, shape, generator)
    bias = torch.randn(live.shape, generator=generator)
    return (bias.masked_fill(~live, float("-inf")),)


def additive_mask_some_rows_empty(sizes, shape, generator):
    """float [B, 1, Q, K] of 0 and -inf; every third query has no key at all"""
    (live,) = live_mask_some_rows_empty(sizes, shape, generator)
    return (torch.zeros(live.shape).masked_fill(~live, float("-inf")),)


def additive_mask_merged(sizes, shape, generator):
    """float [B*H, Q, K]: a random bias, -inf where not attended"""
    rows = sizes.batch * shape.heads
    bias = torch.randn(rows, sizes.q, sizes.keys, generator=generator)
    dead = torch.rand(bias.shape, generator=generator) < 0.4
    dead[..., 0] = False
    return (bias.masked_fill(dead, float("-inf")),)


def pair_bias(sizes, shape, generator):
    """float [B, H, Q, K]"""
    size = (sizes.batch, shape.heads, sizes.q, sizes.keys)
    return (torch.randn(size, generator=generator),)


def pair_tokens(sizes, shape, generator):
    """a token for each pair of positions [B, N, N, dim]"""
    return (torch.randn(sizes.batch, sizes.q, sizes.q, shape.dim, generator=generator),)


def pair_features(sizes, shape, generator):
    """features of each pair of positions, half as wide as the tokens [B, N, N, dim // 2]"""
    size = (sizes.batch, sizes.q, sizes.q, shape.dim // 2)
    return (torch.randn(size, generator=generator),)
