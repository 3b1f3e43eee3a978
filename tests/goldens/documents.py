"""`Documents` with its reduction chains fused.

Written from golden_programs.py:85-91 (sha256 068c6d76e66a).

Math
    m_i[b, h, m] = max_n where(ids[b, 0, m, 0] == ids_2[b, 0, 0, n], (sum_r0_0 query[b, h, m, d] * key[b, h, d, n]) / 6.32456, -65504)
    l_i[b, h, m] = sum_n exp(where(ids[b, 0, m, 0] == ids_2[b, 0, 0, n], (sum_r0_0 query[b, h, m, d] * key[b, h, d, n]) / 6.32456, -65504) - m_i[b, h, m])
    acc[b, h, m, e] = sum_n exp(where(ids[b, 0, m, 0] == ids_2[b, 0, 0, n], (sum_r0_0 query[b, h, m, d] * key[b, h, d, n]) / 6.32456, -65504) - m_i[b, h, m]) * value[b, h, n, e]
    matmul_1[b, h, m, e] = acc[b, h, m, e] / l_i[b, h, m]

Why one sweep is enough
    shift: T(old → new) = exp(phi(old) - phi(new)), phi = m_i at least every exponent seen so far
    hoist: factors that do not depend on the stream are taken out of the sum
    proved on 3 random cases, stream in blocks and in halves

Fixed: D = 40, E = 40. Known at the call: M (ids.shape[2]), H (query.shape[1]), B (ids.shape[0]).
Regenerate: flashlight-rewrite golden_programs.py
"""

import hashlib
import math
from pathlib import Path

import torch
import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))

# Tiles of 64 rows and 64 stream positions; warps and pipeline stages.
CONFIG = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=2)


@triton.jit
def documents_kernel(
    ids_ptr,
    ids_2_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    stride_ids_b,
    stride_ids_m,
    stride_ids_2_b,
    stride_ids_2_n,
    stride_query_b,
    stride_query_h,
    stride_query_m,
    stride_query_d,
    stride_key_b,
    stride_key_h,
    stride_key_d,
    stride_key_n,
    stride_value_b,
    stride_value_h,
    stride_value_n,
    stride_value_e,
    stride_out_b,
    stride_out_h,
    stride_out_m,
    stride_out_e,
    M,
    H,
    B,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: BLOCK_M rows, all of n."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M)
    offs_m = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rest = pid // blocks
    h = rest % H
    rest = rest // H
    b = rest
    offs_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    offs_e = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    ids = tl.load(
        ids_ptr + b.to(tl.int64) * stride_ids_b * ALIGN + offs_m.to(tl.int64) * stride_ids_m * ALIGN,
        mask=(offs_m < M),
        other=0,
    )  # [BLOCK_M]
    query = tl.load(
        query_ptr
        + b.to(tl.int64) * stride_query_b * ALIGN
        + h.to(tl.int64) * stride_query_h * ALIGN
        + offs_m.to(tl.int64)[:, None] * stride_query_m * ALIGN
        + offs_d[None, :] * stride_query_d,
        mask=(offs_m[:, None] < M) & (offs_d[None, :] < 40),
        other=0,
    )  # [BLOCK_M, BLOCK_D]

    m_i = tl.full([BLOCK_M], NEG_INF, tl.float32)  # [BLOCK_M]
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)  # [BLOCK_M]
    acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)  # [BLOCK_M, BLOCK_E]

    full = M // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        ids_2 = tl.load(
            ids_2_ptr + b.to(tl.int64) * stride_ids_2_b * ALIGN + offs_n.to(tl.int64) * stride_ids_2_n * ALIGN
        )  # [BLOCK_N]
        # golden_programs.py:90  same = ids[:, None, :, None] == ids[:, None, None, :]
        same = ids[:, None] == ids_2[None, :]  # [BLOCK_M, BLOCK_N]
        key = tl.load(
            key_ptr
            + b.to(tl.int64) * stride_key_b * ALIGN
            + h.to(tl.int64) * stride_key_h * ALIGN
            + offs_d[None, :] * stride_key_d
            + offs_n.to(tl.int64)[:, None] * stride_key_n * ALIGN,
            mask=(offs_d[None, :] < 40),
            other=0,
        )  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:89  scores = query @ key.mT / math.sqrt(query.shape[-1])
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_M, BLOCK_N]
        scores = qk * (1.0 / 6.324555320336759)  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:91  return scores.masked_fill(~same, torch.finfo(scores.dtype).min).softmax(-1) @ value
        x = tl.where(same, scores, -65504.0)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(x, 1))  # [BLOCK_M]
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # [BLOCK_M]
        alpha = tl.exp(m_i - shift)  # [BLOCK_M]
        p = tl.exp(x - shift[:, None])  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        value = tl.load(
            value_ptr
            + b.to(tl.int64) * stride_value_b * ALIGN
            + h.to(tl.int64) * stride_value_h * ALIGN
            + offs_n.to(tl.int64)[:, None] * stride_value_n * ALIGN
            + offs_e[None, :] * stride_value_e,
            mask=(offs_e[None, :] < 40),
            other=0,
        )  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_E]
        m_i = m_new

    # What is left of the stream: positions past its end take no part.
    if full < M:
        offs_n = full + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        ids_2 = tl.load(
            ids_2_ptr
            + b.to(tl.int64) * stride_ids_2_b * ALIGN
            + offs_n.to(tl.int64) * stride_ids_2_n * ALIGN,
            mask=(offs_n < M),
            other=0,
        )  # [BLOCK_N]
        # golden_programs.py:90  same = ids[:, None, :, None] == ids[:, None, None, :]
        same = ids[:, None] == ids_2[None, :]  # [BLOCK_M, BLOCK_N]
        key = tl.load(
            key_ptr
            + b.to(tl.int64) * stride_key_b * ALIGN
            + h.to(tl.int64) * stride_key_h * ALIGN
            + offs_d[None, :] * stride_key_d
            + offs_n.to(tl.int64)[:, None] * stride_key_n * ALIGN,
            mask=(offs_n[:, None] < M) & (offs_d[None, :] < 40),
            other=0,
        )  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:89  scores = query @ key.mT / math.sqrt(query.shape[-1])
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_M, BLOCK_N]
        scores = qk * (1.0 / 6.324555320336759)  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:91  return scores.masked_fill(~same, torch.finfo(scores.dtype).min).softmax(-1) @ value
        x = tl.where(same, scores, -65504.0)  # [BLOCK_M, BLOCK_N]
        x_2 = tl.where(offs_n[None, :] < M, x, NEG_INF)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(x_2, 1))  # [BLOCK_M]
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # [BLOCK_M]
        alpha = tl.exp(m_i - shift)  # [BLOCK_M]
        p = tl.exp(x_2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        value = tl.load(
            value_ptr
            + b.to(tl.int64) * stride_value_b * ALIGN
            + h.to(tl.int64) * stride_value_h * ALIGN
            + offs_n.to(tl.int64)[:, None] * stride_value_n * ALIGN
            + offs_e[None, :] * stride_value_e,
            mask=(offs_n[:, None] < M) & (offs_e[None, :] < 40),
            other=0,
        )  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_E]
        m_i = m_new

    tl.store(
        out_ptr
        + b.to(tl.int64) * stride_out_b * ALIGN
        + h.to(tl.int64) * stride_out_h * ALIGN
        + offs_m.to(tl.int64)[:, None] * stride_out_m * ALIGN
        + offs_e[None, :] * stride_out_e,
        (acc / l_i[:, None]).to(out_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M) & (offs_e[None, :] < 40),
    )


def reference(ids, ids_2, query, key, value):
    """The same chain in eager PyTorch: what runs on a CPU, and what the kernel is tested against."""
    M = ids.shape[2]
    H = query.shape[1]
    B = ids.shape[0]
    matmul = query @ key
    scores = matmul / 6.324555320336759
    same = ids == ids_2
    bitwise_not = same.bitwise_not()
    masked_fill = scores.masked_fill(bitwise_not, -65504.0)
    softmax = masked_fill.softmax(-1)
    matmul_1 = softmax @ value
    return matmul_1


def launch(ids, ids_2, query, key, value):
    """Runs the kernel.

    ids: (B, 1, M, 1), torch.int64, any strides
    ids_2: (B, 1, 1, M), torch.int64, any strides
    query: (B, H, M, 40), torch.float16, any strides
    key: (B, H, 40, M), torch.float16, any strides
    value: (B, H, M, 40), torch.float16, any strides
    Returns (B, H, M, 40) torch.float16.
    Raises ValueError for other shapes or dtypes, and NotImplementedError where a gradient would be lost.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in [ids, ids_2, query, key, value]):
        raise NotImplementedError("the kernel has no backward: call it under torch.no_grad()")
    M = ids.shape[2]
    H = query.shape[1]
    B = ids.shape[0]
    if tuple(ids.shape) != (B, 1, M, 1) or ids.dtype != torch.int64:
        raise ValueError(f"ids: expected { (B, 1, M, 1) } torch.int64, got {tuple(ids.shape)} { ids.dtype}")
    if tuple(ids_2.shape) != (B, 1, 1, M) or ids_2.dtype != torch.int64:
        raise ValueError(
            f"ids_2: expected { (B, 1, 1, M) } torch.int64, got {tuple(ids_2.shape)} { ids_2.dtype}"
        )
    if tuple(query.shape) != (B, H, M, 40) or query.dtype != torch.float16:
        raise ValueError(
            f"query: expected { (B, H, M, 40) } torch.float16, got {tuple(query.shape)} { query.dtype}"
        )
    if tuple(key.shape) != (B, H, 40, M) or key.dtype != torch.float16:
        raise ValueError(
            f"key: expected { (B, H, 40, M) } torch.float16, got {tuple(key.shape)} { key.dtype}"
        )
    if tuple(value.shape) != (B, H, M, 40) or value.dtype != torch.float16:
        raise ValueError(
            f"value: expected { (B, H, M, 40) } torch.float16, got {tuple(value.shape)} { value.dtype}"
        )
    if M == 0:  # nothing to reduce
        return reference(ids, ids_2, query, key, value)
    out = torch.empty((B, H, M, 40), device=ids.device, dtype=torch.float16)
    align = math.gcd(
        8,
        ids.stride(0),
        ids.stride(2),
        ids_2.stride(0),
        ids_2.stride(3),
        query.stride(0),
        query.stride(1),
        query.stride(2),
        key.stride(0),
        key.stride(1),
        key.stride(3),
        value.stride(0),
        value.stride(1),
        value.stride(2),
        out.stride(0),
        out.stride(1),
        out.stride(2),
    )  # rows that start at 16 bytes load 16 bytes at a time
    programs = triton.cdiv(M, CONFIG["BLOCK_M"]) * (B) * (H)
    if programs:
        with torch.cuda.device_of(ids):
            documents_kernel[(programs,)](
                ids,
                ids_2,
                query,
                key,
                value,
                out,
                ids.stride(0) // align,
                ids.stride(2) // align,
                ids_2.stride(0) // align,
                ids_2.stride(3) // align,
                query.stride(0) // align,
                query.stride(1) // align,
                query.stride(2) // align,
                query.stride(3),
                key.stride(0) // align,
                key.stride(1) // align,
                key.stride(2),
                key.stride(3) // align,
                value.stride(0) // align,
                value.stride(1) // align,
                value.stride(2) // align,
                value.stride(3),
                out.stride(0) // align,
                out.stride(1) // align,
                out.stride(2) // align,
                out.stride(3),
                M,
                H,
                B,
                ALIGN=align,
                **CONFIG,
            )
    return out


MISMULTIPLIED = (torch.bfloat16,)  # by Triton's interpreter


def _on_cpu(*args):
    runs = triton.knobs.runtime.interpret and not any(
        getattr(a, "dtype", None) in MISMULTIPLIED for a in args
    )
    return launch(*args) if runs else reference(*args)


def _fake(ids, ids_2, query, key, value):
    M = ids.shape[2]
    H = query.shape[1]
    B = ids.shape[0]
    return torch.empty((B, H, M, 40), device=ids.device, dtype=torch.float16)


# Another text, another op: an edited kernel is never taken for the one that was written.
OP = "documents_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
if not hasattr(torch.ops.flashlight, OP):
    LIBRARY = torch.library.Library("flashlight", "FRAGMENT")
    LIBRARY.define(OP + "(Tensor ids, Tensor ids_2, Tensor query, Tensor key, Tensor value) -> (Tensor)")
    LIBRARY.impl(OP, launch, "CUDA")
    LIBRARY.impl(OP, _on_cpu, "CPU")
    torch.library.register_fake("flashlight::" + OP, _fake, lib=LIBRARY)


def documents(ids, ids_2, query, key, value):
    """The chain as a `torch.library` op: what the patched module calls."""
    return getattr(torch.ops.flashlight, OP)(ids, ids_2, query, key, value)
