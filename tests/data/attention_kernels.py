"""Kernels to compile, right and wrong: what `tests/test_compile.py` gives to the compilers."""

import triton
import triton.language as tl


@triton.jit
def attention(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_qm,
    stride_kn,
    stride_vn,
    stride_om,
    M,
    N,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One head of softmax(q k^T) v, online, through pointers; rows past M are not stored."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    in_m = offs_m[:, None] < M
    q = tl.load(q_ptr + offs_m[:, None] * stride_qm + offs_d[None, :], mask=in_m, other=0.0)
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start_n in tl.range(0, N, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        in_n = offs_n < N
        k_ptrs = k_ptr + offs_n[None, :] * stride_kn + offs_d[:, None]
        k = tl.load(k_ptrs, mask=in_n[None, :], other=0.0)
        s = tl.where(in_n[None, :], tl.dot(q, k) * qk_scale, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v_ptrs = v_ptr + offs_n[:, None] * stride_vn + offs_d[None, :]
        v = tl.load(v_ptrs, mask=in_n[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    out = (acc / l_i[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_d[None, :], out, mask=in_m)


@triton.jit
def attention_tma(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    N,
    qk_scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The same through host tensor descriptors, for lengths that the blocks divide."""
    start_m = tl.program_id(0) * BLOCK_M
    q = q_desc.load([start_m, 0])
    m_i = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start_n in tl.range(0, N, BLOCK_N):
        s = tl.dot(q, k_desc.load([start_n, 0]).T) * qk_scale
        m_new = tl.maximum(m_i, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = v_desc.load([start_n, 0])
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
        m_i = m_new
    out_desc.store([start_m, 0], (acc / l_i[:, None]).to(out_desc.dtype))


@triton.jit
def fill(out_ptr, value, N, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A constexpr that is a dtype, and an argument that may be None."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    filler = 0.0 if value is None else value
    tl.store(out_ptr + offs, tl.full([BLOCK], filler, DTYPE), mask=offs < N)


@triton.jit
def dot_of_vectors(out_ptr, BLOCK: tl.constexpr):
    """Wrong: `tl.dot` wants matrices. The test looks for the line below."""
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.dot(offs, offs))


@triton.jit
def calls_what_fails(out_ptr, BLOCK: tl.constexpr):
    """Wrong, one call deeper."""
    dot_of_vectors(out_ptr, BLOCK)


@triton.jit
def bad_assembly(out_ptr):
    """Wrong where only the assembler sees it."""
    x = tl.inline_asm_elementwise("nosuchopcode $0;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr, x)
