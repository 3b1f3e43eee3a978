"""`GroupedDecode` with its reduction chains fused.

Written from golden_programs.py:105-114 (sha256 15f203602d93).

Math
    m_i[b, h, m] = max_{n | n <= m + N - M} (sum_r0_0 query[b, h, m, d] * key[b, h // (H // S14), n, d]) / 8
    l_i[b, h, m] = sum_{n | n <= m + N - M} exp((sum_r0_0 query[b, h, m, d] * key[b, h // (H // S14), n, d]) / 8 - m_i[b, h, m])
    acc[b, h, m, e] = sum_{n | n <= m + N - M} exp((sum_r0_0 query[b, h, m, d] * key[b, h // (H // S14), n, d]) / 8 - m_i[b, h, m]) * value[b, h // (H // S14), n, e]
    matmul_1[b, h, m, e] = acc[b, h, m, e] / l_i[b, h, m]

Why one sweep is enough
    shift: T(old → new) = exp(phi(old) - phi(new)), phi = m_i at least every exponent seen so far
    hoist: factors that do not depend on the stream are taken out of the sum
    proved on 3 random cases, stream in blocks and in halves
    split: few rows take parts of the stream, merged by the same T

Fixed: D = 64, E = 64. Known at the call: M (query.shape[2]), N (key.shape[2]), H (query.shape[1]), B (query.shape[0]), S14 (key.shape[1]).
Regenerate: flashlight-rewrite golden_programs.py
"""

import functools
import hashlib
import json
import math
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)

# Tiles of rows and stream positions, warps and pipeline stages: what is estimated to be the fastest, and what may be.
CONFIGS = (
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=2),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_D=64, BLOCK_E=64, num_warps=8, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=8, num_stages=3),
)
# All rows being fewer than these, the stream is cut into parts of at least so many positions: for programs that run all
# at once, or, where there are more of them anyway, in a few waves.
FEW = dict(rows=4224, least=256, programs=396, waves=1584)
# Tiles of rows and stream positions, warps and pipeline stages: what is estimated to be the fastest, and what may be.
CONFIGS_PART = (
    dict(BLOCK_R=16, BLOCK_N=128, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_R=16, BLOCK_N=128, BLOCK_D=64, BLOCK_E=64, num_warps=8, num_stages=3),
    dict(BLOCK_R=16, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_R=16, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=4),
    dict(BLOCK_R=16, BLOCK_N=32, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=4),
)
# Tiles of stream positions, warps and pipeline stages.
CONFIGS_MERGE = (dict(BLOCK_PART=64, BLOCK_E=64, num_warps=4, num_stages=1),)


@triton.jit
def grouped_decode_kernel(
    query_boxes,
    key_boxes,
    value_boxes,
    out_ptr,
    stride_out_b,
    stride_out_h,
    stride_out_m,
    stride_out_e,
    stride_query_b,
    stride_query_h,
    stride_query_m,
    stride_key_b,
    stride_key_h,
    stride_key_n,
    stride_value_b,
    stride_value_h,
    stride_value_n,
    M,
    N,
    H,
    B,
    S14,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: BLOCK_M rows, all of n."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M)
    # The last rows have most to do: they start first.
    start_m = (blocks - 1 - pid % blocks) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rest = pid // blocks
    h = rest % H
    rest = rest // H
    b = rest
    offs_e = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    if not TMA:  # boxes of tensors by plain loads
        query_boxes = tl.make_tensor_descriptor(
            query_boxes,
            [B, H, M, 64],
            [stride_query_b, stride_query_h, stride_query_m, 1],
            [1, 1, BLOCK_M, BLOCK_D],
        )
        key_boxes = tl.make_tensor_descriptor(
            key_boxes,
            [B, S14, N, 64],
            [stride_key_b, stride_key_h, stride_key_n, 1],
            [1, 1, BLOCK_N, BLOCK_D],
        )
        value_boxes = tl.make_tensor_descriptor(
            value_boxes,
            [B, S14, N, 64],
            [stride_value_b, stride_value_h, stride_value_n, 1],
            [1, 1, BLOCK_N, BLOCK_E],
        )
    # What masks leave these rows of the stream, in whole tiles where they cut none.
    last = tl.minimum(start_m + BLOCK_M + N - M, N)
    cut = tl.maximum(tl.minimum(start_m + N - M + 1, N) // BLOCK_N * BLOCK_N, 0)
    query = query_boxes.load([b, h, start_m, 0]).reshape([BLOCK_M, BLOCK_D])  # [BLOCK_M, BLOCK_D]
    i = h // (H // S14)
    # golden_programs.py:112  i = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
    i_2 = offs_m + N - M  # [BLOCK_M]

    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)  # [BLOCK_M]
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)  # [BLOCK_M]
    acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)  # [BLOCK_M, BLOCK_E]

    # Tiles that no mask cuts.
    for start in range(0, cut, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        key = key_boxes.load([b, i, start, 0]).reshape([BLOCK_N, BLOCK_D])  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:111  scores = query @ key.mT / math.sqrt(query.shape[-1])
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(qk, 1) * ((1.0 / 8.0) * LOG2E))  # [BLOCK_M]
        alpha = tl.exp2(m_i - m_new)  # [BLOCK_M]
        p = tl.exp2(qk * ((1.0 / 8.0) * LOG2E) - m_new[:, None])  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        value = value_boxes.load([b, i, start, 0]).reshape([BLOCK_N, BLOCK_E])  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_E]
        m_i = m_new

    # The others that it leaves something of, and the end of the stream: too few for a pipeline.
    for start in tl.range(cut, last, BLOCK_N, num_stages=1):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        key = key_boxes.load([b, i, start, 0]).reshape([BLOCK_N, BLOCK_D])  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:111  scores = query @ key.mT / math.sqrt(query.shape[-1])
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_M, BLOCK_N]
        mask = offs_n[None, :] <= i_2[:, None]  # [BLOCK_M, BLOCK_N]
        qk_2 = tl.where((offs_n[None, :] < N) & mask, qk, NEG_INF)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(qk_2, 1) * ((1.0 / 8.0) * LOG2E))  # [BLOCK_M]
        alpha = tl.exp2(m_i - m_new)  # [BLOCK_M]
        p = tl.exp2(qk_2 * ((1.0 / 8.0) * LOG2E) - m_new[:, None])  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        value = value_boxes.load([b, i, start, 0]).reshape([BLOCK_N, BLOCK_E])  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_E]
        m_i = m_new

    tl.store(
        out_ptr
        + b.to(tl.int64) * stride_out_b
        + h.to(tl.int64) * stride_out_h
        + offs_m.to(tl.int64)[:, None] * stride_out_m
        + offs_e[None, :] * stride_out_e,
        (acc / l_i[:, None]).to(out_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M),
    )


@triton.jit
def grouped_decode_part_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_acc_ptr,
    stride_query_b,
    stride_query_g,
    stride_query_r,
    stride_query_d,
    stride_key_b,
    stride_key_g,
    stride_key_n,
    stride_key_d,
    stride_value_b,
    stride_value_g,
    stride_value_n,
    stride_value_e,
    stride_part_max_part,
    stride_part_max_b,
    stride_part_max_g,
    stride_part_max_r,
    stride_part_sum_part,
    stride_part_sum_b,
    stride_part_sum_g,
    stride_part_sum_r,
    stride_part_acc_part,
    stride_part_acc_b,
    stride_part_acc_g,
    stride_part_acc_r,
    stride_part_acc_e,
    M,
    N,
    H,
    B,
    SPLITS,
    R,
    S14,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: BLOCK_R rows, one part of n, and what it leaves."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(R, BLOCK_R)
    # The last rows have most to do: they start first.
    start_r = (blocks - 1 - pid % blocks) * BLOCK_R
    offs_r = start_r + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    rest = pid // blocks
    part = rest % SPLITS
    rest = rest // SPLITS
    g = rest % S14
    rest = rest // S14
    b = rest
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    offs_e = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    i = H // S14
    # golden_programs.py:112  i = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
    i_2 = offs_r // i  # [BLOCK_R]
    # What masks leave these rows of the stream, in whole tiles where they cut none.
    last = tl.minimum(tl.max(i_2 + N + 1 - M, 0), N)
    # This part of the stream, in whole tiles: none where it is too short for as many parts.
    length = tl.cdiv(last, BLOCK_N * SPLITS) * BLOCK_N
    begin = part * length
    end = tl.minimum(begin + length, last)
    cut = tl.maximum(tl.minimum(tl.min(i_2 + N + 1 - M, 0), end) // BLOCK_N * BLOCK_N, begin)
    index = g * i + offs_r % i  # [BLOCK_R]
    query = tl.load(
        query_ptr
        + b.to(tl.int64) * stride_query_b
        + index.to(tl.int64)[:, None] * stride_query_g
        + i_2.to(tl.int64)[:, None] * stride_query_r
        + offs_d[None, :] * stride_query_d,
        mask=(offs_r[:, None] < R) & (index[:, None] < H) & (i_2[:, None] >= 0) & (i_2[:, None] < M),
        other=0,
    )  # [BLOCK_R, BLOCK_D]
    # golden_programs.py:112  i = torch.arange(query.shape[2], device=query.device)[:, None] + key.shape[2] - query.shape[2]
    i_3 = i_2 + N - M  # [BLOCK_R]

    m_i = tl.full([BLOCK_R], NEG_INF, tl.float32)  # [BLOCK_R]
    l_i = tl.full([BLOCK_R], 0.0, tl.float32)  # [BLOCK_R]
    acc = tl.full([BLOCK_R, BLOCK_E], 0.0, tl.float32)  # [BLOCK_R, BLOCK_E]

    # Tiles that no mask cuts.
    for start in range(begin, cut, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        key = tl.load(
            key_ptr
            + b.to(tl.int64) * stride_key_b
            + g.to(tl.int64) * stride_key_g
            + offs_n.to(tl.int64)[:, None] * stride_key_n
            + offs_d[None, :] * stride_key_d
        )  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:111  scores = query @ key.mT / math.sqrt(query.shape[-1])
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_R, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(qk, 1) * (1.0 / 8.0))  # [BLOCK_R]
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # [BLOCK_R]
        alpha = tl.exp2((m_i - shift) * LOG2E)  # [BLOCK_R]
        p = tl.exp2(qk * ((1.0 / 8.0) * LOG2E) - (shift * LOG2E)[:, None])  # [BLOCK_R, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_R]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        value = tl.load(
            value_ptr
            + b.to(tl.int64) * stride_value_b
            + g.to(tl.int64) * stride_value_g
            + offs_n.to(tl.int64)[:, None] * stride_value_n
            + offs_e[None, :] * stride_value_e
        )  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_R, BLOCK_E]
        m_i = m_new

    # The others that it leaves something of, and the end of the stream: too few for a pipeline.
    for start in tl.range(cut, end, BLOCK_N, num_stages=1):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        key = tl.load(
            key_ptr
            + b.to(tl.int64) * stride_key_b
            + g.to(tl.int64) * stride_key_g
            + offs_n.to(tl.int64)[:, None] * stride_key_n
            + offs_d[None, :] * stride_key_d,
            mask=(offs_n[:, None] < N),
            other=0,
        )  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:111  scores = query @ key.mT / math.sqrt(query.shape[-1])
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_R, BLOCK_N]
        mask = offs_n[None, :] <= i_3[:, None]  # [BLOCK_R, BLOCK_N]
        qk_2 = tl.where((offs_n[None, :] < N) & mask, qk, NEG_INF)  # [BLOCK_R, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(qk_2, 1) * (1.0 / 8.0))  # [BLOCK_R]
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # [BLOCK_R]
        alpha = tl.exp2((m_i - shift) * LOG2E)  # [BLOCK_R]
        p = tl.exp2(qk_2 * ((1.0 / 8.0) * LOG2E) - (shift * LOG2E)[:, None])  # [BLOCK_R, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_R]
        # golden_programs.py:110  key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        value = tl.load(
            value_ptr
            + b.to(tl.int64) * stride_value_b
            + g.to(tl.int64) * stride_value_g
            + offs_n.to(tl.int64)[:, None] * stride_value_n
            + offs_e[None, :] * stride_value_e,
            mask=(offs_n[:, None] < N),
            other=0,
        )  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_R, BLOCK_E]
        m_i = m_new

    tl.store(
        part_max_ptr
        + part.to(tl.int64) * stride_part_max_part
        + b.to(tl.int64) * stride_part_max_b
        + g.to(tl.int64) * stride_part_max_g
        + offs_r.to(tl.int64) * stride_part_max_r,
        m_i.to(part_max_ptr.dtype.element_ty),
        mask=(offs_r < R),
    )
    tl.store(
        part_sum_ptr
        + part.to(tl.int64) * stride_part_sum_part
        + b.to(tl.int64) * stride_part_sum_b
        + g.to(tl.int64) * stride_part_sum_g
        + offs_r.to(tl.int64) * stride_part_sum_r,
        l_i.to(part_sum_ptr.dtype.element_ty),
        mask=(offs_r < R),
    )
    tl.store(
        part_acc_ptr
        + part.to(tl.int64) * stride_part_acc_part
        + b.to(tl.int64) * stride_part_acc_b
        + g.to(tl.int64) * stride_part_acc_g
        + offs_r.to(tl.int64)[:, None] * stride_part_acc_r
        + offs_e[None, :] * stride_part_acc_e,
        acc.to(part_acc_ptr.dtype.element_ty),
        mask=(offs_r[:, None] < R),
    )


@triton.jit
def grouped_decode_merge_kernel(
    part_max_ptr,
    part_sum_ptr,
    part_acc_ptr,
    out_ptr,
    stride_part_max_part,
    stride_part_max_b,
    stride_part_max_g,
    stride_part_max_r,
    stride_part_sum_part,
    stride_part_sum_b,
    stride_part_sum_g,
    stride_part_sum_r,
    stride_part_acc_part,
    stride_part_acc_b,
    stride_part_acc_g,
    stride_part_acc_r,
    stride_part_acc_e,
    stride_out_b,
    stride_out_g,
    stride_out_r,
    stride_out_e,
    M,
    N,
    H,
    B,
    SPLITS,
    R,
    S14,
    BLOCK_PART: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: one row, what all parts have left, merged as in the loop over a part."""
    pid = tl.program_id(0)
    rest = pid
    r = rest % R
    rest = rest // R
    g = rest % S14
    rest = rest // S14
    b = rest
    offs_e = tl.arange(0, BLOCK_E)  # [BLOCK_E]

    m_i = tl.full([], LOWEST, tl.float32)
    l_i = tl.full([], 0.0, tl.float32)
    acc = tl.full([BLOCK_E], 0.0, tl.float32)  # [BLOCK_E]

    offs_part = tl.arange(0, BLOCK_PART)  # [BLOCK_PART]
    part_max = tl.load(
        part_max_ptr
        + b.to(tl.int64) * stride_part_max_b
        + g.to(tl.int64) * stride_part_max_g
        + r.to(tl.int64) * stride_part_max_r
        + offs_part.to(tl.int64) * stride_part_max_part,
        mask=(offs_part < SPLITS),
        other=0,
    )  # [BLOCK_PART]
    part_max_2 = tl.where(offs_part < SPLITS, part_max, NEG_INF)  # [BLOCK_PART]
    m_new = tl.maximum(m_i, tl.max(part_max_2, 0))
    alpha = tl.exp(m_i - m_new)
    p = tl.exp(part_max_2 - m_new)  # [BLOCK_PART]
    part_sum = tl.load(
        part_sum_ptr
        + b.to(tl.int64) * stride_part_sum_b
        + g.to(tl.int64) * stride_part_sum_g
        + r.to(tl.int64) * stride_part_sum_r
        + offs_part.to(tl.int64) * stride_part_sum_part,
        mask=(offs_part < SPLITS),
        other=0,
    )  # [BLOCK_PART]
    w = p * part_sum  # [BLOCK_PART]
    l_i = l_i * alpha + tl.sum(w, 0)
    part_acc = tl.load(
        part_acc_ptr
        + b.to(tl.int64) * stride_part_acc_b
        + g.to(tl.int64) * stride_part_acc_g
        + r.to(tl.int64) * stride_part_acc_r
        + offs_part.to(tl.int64)[:, None] * stride_part_acc_part
        + offs_e[None, :] * stride_part_acc_e,
        mask=(offs_part[:, None] < SPLITS),
        other=0,
    )  # [BLOCK_PART, BLOCK_E]
    w_2 = p[:, None] * part_acc  # [BLOCK_PART, BLOCK_E]
    acc = acc * alpha + tl.sum(w_2, 0)  # [BLOCK_E]
    m_i = m_new

    tl.store(
        out_ptr
        + b.to(tl.int64) * stride_out_b
        + (g * (H // S14) + r % (H // S14)).to(tl.int64) * stride_out_g
        + (r // (H // S14)).to(tl.int64) * stride_out_r
        + offs_e * stride_out_e,
        (acc / l_i).to(out_ptr.dtype.element_ty),
    )


def reference(query, key, value):
    """The same chain in eager PyTorch: what runs on a CPU, and what the kernel is tested against."""
    M = query.shape[2]
    N = key.shape[2]
    H = query.shape[1]
    B = query.shape[0]
    S14 = key.shape[1]
    key_2 = torch.ops.aten.repeat_interleave.self_int(key, H // S14, 1)
    value_2 = torch.ops.aten.repeat_interleave.self_int(value, H // S14, 1)
    m_t = key_2.mT
    matmul = query @ m_t
    scores = matmul / 8.0
    arange = torch.arange(M, device=query.device)
    unsqueeze = arange.unsqueeze(1)
    add = unsqueeze + N
    i = add - M
    arange_1 = torch.arange(N, device=query.device)
    ahead = arange_1 > i
    masked_fill = scores.masked_fill(ahead, float("-inf"))
    softmax = masked_fill.softmax(-1)
    matmul_1 = softmax @ value_2
    return matmul_1


@functools.cache
def has_tma(device):
    """Whether a GPU loads boxes of tensors by itself (Hopper and later)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def lies_in_rows(t):
    """Whether boxes of a tensor can be loaded: its last dimension is dense, its rows are at multiples of 16 bytes."""
    steps = [s for s, n in zip(t.stride()[:-1], t.shape) if n > 1]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not any(s % 8 for s in steps)


def dense(t):
    """A copy whose boxes can be loaded."""
    return t.clone(memory_format=torch.contiguous_format)


def laid_out(t):
    """Its shape and strides as TMA takes them: those of single positions do not matter."""
    return t.shape, [*(s if n > 1 else 8 for s, n in zip(t.stride()[:-1], t.shape)), 1]


class Boxes(TensorDescriptor):
    """Describes a tensor to a kernel that loads boxes of it: one that lies like others, which were checked."""

    def __post_init__(self):
        pass


class Piece:
    """A tensor within an allocation, of which launches take the address; the first one takes it whole."""

    def __init__(self, allocated, start, shape, dtype):
        self.allocated, self.start, self.shape, self.dtype = allocated, start, shape, dtype

    def data_ptr(self):
        return self.allocated.data_ptr() + self.start

    def whole(self):
        size = math.prod(self.shape) * self.dtype.itemsize
        return self.allocated[self.start : self.start + size].view(self.dtype).view(self.shape)


class Pieces:
    """Tensors in one allocation, given shapes and dtypes: allocating each takes as long as a launch."""

    def __init__(self, *pieces):
        self.pieces, self.size = [], 0
        for shape, dtype in pieces:
            self.pieces.append((self.size, shape, dtype))
            self.size += triton.cdiv(math.prod(shape) * dtype.itemsize, 16) * 16

    def __call__(self, beside):
        allocated = beside.new_empty(self.size, dtype=torch.uint8)
        return [Piece(allocated, *piece) for piece in self.pieces]


class Launch:
    """Launches a kernel by one config for tensors that lie alike: strides, and what Triton compiles, are settled by
    the first ones. Triton itself would look at all arguments each time.

    numbers: what follows the tensors, strides and sizes.
    boxes: sizes of the boxes that it loads, by the places of their tensors.
    """

    def __init__(self, kernel, config, programs, numbers=lambda *_: (), boxes={}):
        self.kernel, self.config, self.programs, self.numbers = kernel, config, programs, numbers
        self.boxes, self.copied, self.described = boxes, [], []
        self.compiled = None

    def __call__(self, *tensors):
        if self.programs == 0:
            return
        if self.compiled is None:
            self.first([*tensors])
            return
        if self.copied:
            tensors = [dense(t) if place in self.copied else t for place, t in enumerate(tensors)]
        arguments = [t.data_ptr() for t in tensors]  # of a tensor, Triton would ask the driver where it lies
        for place, layout in self.described:
            arguments[place] = Boxes(tensors[place], *layout)
        self.compiled(*arguments, *self.others)

    def first(self, tensors):
        """Settles what the others need, and launches it."""
        tensors = [t.whole() if isinstance(t, Piece) else t for t in tensors]
        self.copied = [place for place in self.boxes if not lies_in_rows(tensors[place])]
        for place in self.copied:
            tensors[place] = dense(tensors[place])
        numbers = self.numbers(*tensors)
        if has_tma(tensors[0].device):
            self.described = [(p, (*laid_out(tensors[p]), sizes)) for p, sizes in self.boxes.items()]
        for place, layout in self.described:
            tensors[place] = TensorDescriptor(tensors[place], *layout)
        compiled = self.kernel[(self.programs,)](*tensors, *numbers, **self.config)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self.others = (*numbers, *(v for name, v in self.config.items() if name.isupper()))
            self.compiled = compiled[(self.programs, 1, 1)]


class Fastest:
    """Launches a kernel by the fastest of its configs at lengths like these: measured at the first call, if that keeps
    all of the GPU busy, and kept beside Triton's own cache. FLASHLIGHT_TUNE=0 takes the first.
    """

    chosen = {}  # by GPU, kernel and lengths

    def __init__(self, configs, launch_by, *key):
        self.configs, self.launch_by = configs, launch_by
        self.key = tuple(n.bit_length() if isinstance(n, int) else n for n in key)
        self.launch = None

    def __call__(self, *tensors):
        if self.launch is None:
            self.launch = self.launch_by(self.configs[self.choice(tensors)])
        self.launch(*tensors)

    def choice(self, tensors):
        """Which config that is."""
        device, first = tensors[0].device, self.launch_by(self.configs[0])
        if device.type != "cuda" or first.programs == 0:
            return 0
        key = (device, *self.key)
        if key not in self.chosen:
            gpu = torch.cuda.get_device_properties(device)
            is_busy = (
                first.programs >= gpu.multi_processor_count and not torch.cuda.is_current_stream_capturing()
            )
            if not is_busy or os.environ.get("FLASHLIGHT_TUNE") == "0":
                return 0
            self.chosen[key] = self.measured(
                " ".join(map(str, (gpu.name, triton.__version__, *self.key))), tensors
            )
        return self.chosen[key]

    def measured(self, key, tensors):
        """Which config a file says is the fastest; where it does not, it is told which is."""
        file = Path(triton.knobs.cache.dir, "flashlight", f"{OP}.json")
        known = json.loads(file.read_text()) if file.exists() else {}
        if key not in known:
            launches = [self.launch_by(config) for config in self.configs]
            rounds = [[milliseconds(launch, tensors) for launch in launches] for _ in range(2)]
            times = list(map(min, *rounds))  # clocks change while they are measured
            known[key] = times.index(min(times))
            file.parent.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(f".{os.getpid()}")
            new.write_text(json.dumps(known))
            new.replace(file)  # at once: other processes may read it
        return known[key]


def milliseconds(launch, tensors):
    """How long one launch takes; forever where this GPU has too little of something."""
    try:
        return triton.testing.do_bench(lambda: launch(*tensors), warmup=5, rep=20, return_mode="median")
    except (triton.runtime.errors.OutOfResources, torch.cuda.OutOfMemoryError):
        return float("inf")


def launch(query, key, value):
    """Runs the kernel.

    query: (B, H, M, 64), torch.float16, any strides
    key: (B, S14, N, 64), torch.float16, any strides
    value: (B, S14, N, 64), torch.float16, any strides
    Returns (B, H, M, 64) torch.float16.
    Raises ValueError for other shapes or dtypes, and NotImplementedError where a gradient would be lost.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in [query, key, value]):
        raise NotImplementedError("the kernel has no backward: call it under torch.no_grad()")
    if query.is_cuda and query.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(query):
            return launch(query, key, value)
    alike = (lying(query), lying(key), lying(value))
    go = PREPARED.get(alike)
    if go is None:
        if len(PREPARED) == 256:
            PREPARED.clear()
        go = PREPARED[alike] = prepared(query, key, value)
    return go(query, key, value)


PREPARED = {}  # what launches the kernels for arguments that lie alike


def lying(t):
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16


def prepared(query, key, value):
    """Checks arguments, and settles what does not depend on where they lie: sizes, programs, tiles."""
    M = query.shape[2]
    N = key.shape[2]
    H = query.shape[1]
    B = query.shape[0]
    S14 = key.shape[1]
    if tuple(query.shape) != (B, H, M, 64) or query.dtype != torch.float16:
        raise ValueError(
            f"query: expected { (B, H, M, 64) } torch.float16, got {tuple(query.shape)} { query.dtype}"
        )
    if tuple(key.shape) != (B, S14, N, 64) or key.dtype != torch.float16:
        raise ValueError(
            f"key: expected { (B, S14, N, 64) } torch.float16, got {tuple(key.shape)} { key.dtype}"
        )
    if tuple(value.shape) != (B, S14, N, 64) or value.dtype != torch.float16:
        raise ValueError(
            f"value: expected { (B, S14, N, 64) } torch.float16, got {tuple(value.shape)} { value.dtype}"
        )
    if N == 0:  # nothing to reduce
        return reference
    grouped_decode_few = 0 < B * H * M < FEW["rows"] and N > FEW["least"]
    if grouped_decode_few:
        R = M * (H // S14)
        tiles = triton.cdiv(R, CONFIGS_PART[0]["BLOCK_R"]) * (B) * (S14)
        wanted = FEW["programs"] // tiles or FEW["waves"] // tiles
        SPLITS = max(1, min(wanted, triton.cdiv(N, FEW["least"]), CONFIGS_MERGE[0]["BLOCK_PART"]))
        grouped_decode_pieces = Pieces(
            ((SPLITS, B, S14, R), torch.float32),
            ((SPLITS, B, S14, R), torch.float32),
            ((SPLITS, B, S14, R, 64), torch.float32),
        )

        def grouped_decode_part_numbers(query, key, value, part_max, part_sum, part_acc):
            return (
                *query.stride()[:4],
                *key.stride()[:4],
                *value.stride()[:4],
                *part_max.stride()[:4],
                *part_sum.stride()[:4],
                *part_acc.stride()[:5],
                M,
                N,
                H,
                B,
                SPLITS,
                R,
                S14,
            )

        def grouped_decode_part_by(config):
            return Launch(
                grouped_decode_part_kernel,
                config,
                triton.cdiv(R, config["BLOCK_R"]) * (B) * (S14) * (SPLITS),
                grouped_decode_part_numbers,
            )

        launch_grouped_decode_part = Fastest(
            CONFIGS_PART, grouped_decode_part_by, "grouped_decode_part", R, B, S14, SPLITS, N
        )

        def grouped_decode_merge_numbers(part_max, part_sum, part_acc, out):
            return (
                *part_max.stride()[:4],
                *part_sum.stride()[:4],
                *part_acc.stride()[:5],
                *out.stride()[:4],
                M,
                N,
                H,
                B,
                SPLITS,
                R,
                S14,
            )

        def grouped_decode_merge_by(config):
            return Launch(
                grouped_decode_merge_kernel,
                config,
                (B) * (S14) * (R),
                grouped_decode_merge_numbers,
            )

        launch_grouped_decode_merge = grouped_decode_merge_by(CONFIGS_MERGE[0])
    else:

        def grouped_decode_numbers(query_boxes, key_boxes, value_boxes, out):
            return (
                *out.stride()[:4],
                *query_boxes.stride()[:3],
                *key_boxes.stride()[:3],
                *value_boxes.stride()[:3],
                M,
                N,
                H,
                B,
                S14,
                has_tma(query_boxes.device),
            )

        def grouped_decode_by(config):
            return Launch(
                grouped_decode_kernel,
                config,
                triton.cdiv(M, config["BLOCK_M"]) * (B) * (H),
                grouped_decode_numbers,
                boxes={
                    0: (1, 1, config["BLOCK_M"], config["BLOCK_D"]),
                    1: (1, 1, config["BLOCK_N"], config["BLOCK_D"]),
                    2: (1, 1, config["BLOCK_N"], config["BLOCK_E"]),
                },
            )

        launch_grouped_decode = Fastest(CONFIGS, grouped_decode_by, "grouped_decode", M, B, H, N)

    def go(query, key, value):
        out = query.new_empty((B, H, M, 64))
        if grouped_decode_few:
            part_max, part_sum, part_acc = grouped_decode_pieces(query)
            launch_grouped_decode_part(query, key, value, part_max, part_sum, part_acc)
            launch_grouped_decode_merge(part_max, part_sum, part_acc, out)
        else:
            launch_grouped_decode(query, key, value, out)
        return out

    return go


MISMULTIPLIED = (torch.bfloat16,)  # by Triton's interpreter


def _on_cpu(*args):
    runs = triton.knobs.runtime.interpret and not any(
        getattr(a, "dtype", None) in MISMULTIPLIED for a in args
    )
    return launch(*args) if runs else reference(*args)


def _fake(query, key, value):
    M = query.shape[2]
    N = key.shape[2]
    H = query.shape[1]
    B = query.shape[0]
    S14 = key.shape[1]
    return query.new_empty((B, H, M, 64))


# Another text, another op: an edited kernel is never taken for the one that was written.
OP = "grouped_decode_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
if not hasattr(torch.ops.flashlight, OP):
    LIBRARY = torch.library.Library("flashlight", "FRAGMENT")
    LIBRARY.define(OP + "(Tensor query, Tensor key, Tensor value) -> (Tensor)")
    LIBRARY.impl(OP, launch, "CUDA")
    LIBRARY.impl(OP, _on_cpu, "CPU")
    torch.library.register_fake("flashlight::" + OP, _fake, lib=LIBRARY)


def grouped_decode(query, key, value):
    """The chain as a `torch.library` op: what the patched module calls."""
    return getattr(torch.ops.flashlight, OP)(query, key, value)
