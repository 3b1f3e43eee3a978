"""`TwoProducts` with its reduction chains fused.

Written from golden_programs.py:94-102 (sha256 fe65b105683d).

Math
    m_i[b, m, h] = max_n float32((sum_r0_0 q_nope[b, m, h, d] * k_nope[b, n, h, d] + (sum_r0_0 q_rope[b, m, h, d] * k_rope[b, n, d])) * 0.0721688)
    l_i[b, m, h] = sum_n exp(float32((sum_r0_0 q_nope[b, m, h, d] * k_nope[b, n, h, d] + (sum_r0_0 q_rope[b, m, h, d] * k_rope[b, n, d])) * 0.0721688) - m_i[b, m, h])
    acc[b, m, h, f] = sum_n exp(float32((sum_r0_0 q_nope[b, m, h, d] * k_nope[b, n, h, d] + (sum_r0_0 q_rope[b, m, h, d] * k_rope[b, n, d])) * 0.0721688) - m_i[b, m, h]) * value[b, n, h, f]
    einsum_2[b, m, h, f] = acc[b, m, h, f] / l_i[b, m, h]

Why one sweep is enough
    shift: T(old → new) = exp(phi(old) - phi(new)), phi = m_i at least every exponent seen so far
    hoist: factors that do not depend on the stream are taken out of the sum
    proved on 3 random cases, stream in blocks and in halves

Fixed: D = 128, E = 64, F = 128. Known at the call: M (q_nope.shape[1]), N (k_nope.shape[1]), H (q_nope.shape[2]), B (q_nope.shape[0]).
Regenerate: flashlight-rewrite golden_programs.py
"""

import functools
import hashlib
import json
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

NEG_INF = tl.constexpr(float("-inf"))
LOG2E = tl.constexpr(1.4426950408889634)

# Tiles of rows and stream positions, warps and pipeline stages: what is estimated to be the fastest, and what may be.
CONFIGS = (
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=2),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=8, num_stages=3),
)


@triton.jit
def two_products_kernel(
    q_nope_boxes,
    k_nope_boxes,
    q_rope_boxes,
    k_rope_boxes,
    value_boxes,
    out_ptr,
    stride_out_b,
    stride_out_m,
    stride_out_h,
    stride_out_f,
    stride_q_nope_b,
    stride_q_nope_m,
    stride_q_nope_h,
    stride_k_nope_b,
    stride_k_nope_n,
    stride_k_nope_h,
    stride_q_rope_b,
    stride_q_rope_m,
    stride_q_rope_h,
    stride_k_rope_b,
    stride_k_rope_n,
    stride_value_b,
    stride_value_n,
    stride_value_h,
    M,
    N,
    H,
    B,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """One program: BLOCK_M rows, all of n."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(M, BLOCK_M)
    start_m = (pid % blocks) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    rest = pid // blocks
    h = rest % H
    rest = rest // H
    b = rest
    offs_f = tl.arange(0, BLOCK_F)  # [BLOCK_F]
    if not TMA:  # boxes of tensors by plain loads
        q_nope_boxes = tl.make_tensor_descriptor(
            q_nope_boxes,
            [B, M, H, 128],
            [stride_q_nope_b, stride_q_nope_m, stride_q_nope_h, 1],
            [1, BLOCK_M, 1, BLOCK_D],
        )
        k_nope_boxes = tl.make_tensor_descriptor(
            k_nope_boxes,
            [B, N, H, 128],
            [stride_k_nope_b, stride_k_nope_n, stride_k_nope_h, 1],
            [1, BLOCK_N, 1, BLOCK_D],
        )
        q_rope_boxes = tl.make_tensor_descriptor(
            q_rope_boxes,
            [B, M, H, 64],
            [stride_q_rope_b, stride_q_rope_m, stride_q_rope_h, 1],
            [1, BLOCK_M, 1, BLOCK_E],
        )
        k_rope_boxes = tl.make_tensor_descriptor(
            k_rope_boxes, [B, N, 64], [stride_k_rope_b, stride_k_rope_n, 1], [1, BLOCK_N, BLOCK_E]
        )
        value_boxes = tl.make_tensor_descriptor(
            value_boxes,
            [B, N, H, 128],
            [stride_value_b, stride_value_n, stride_value_h, 1],
            [1, BLOCK_N, 1, BLOCK_F],
        )
    q_nope = q_nope_boxes.load([b, start_m, h, 0]).reshape([BLOCK_M, BLOCK_D])  # [BLOCK_M, BLOCK_D]
    q_rope = q_rope_boxes.load([b, start_m, h, 0]).reshape([BLOCK_M, BLOCK_E])  # [BLOCK_M, BLOCK_E]

    m_i = tl.full([BLOCK_M], NEG_INF, tl.float32)  # [BLOCK_M]
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)  # [BLOCK_M]
    acc = tl.full([BLOCK_M, BLOCK_F], 0.0, tl.float32)  # [BLOCK_M, BLOCK_F]

    full = N // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k_nope = k_nope_boxes.load([b, start, h, 0]).reshape([BLOCK_N, BLOCK_D])  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:99  scores = torch.einsum("bshd,bthd->bsht", q_nope, k_nope)
        scores = tl.dot(q_nope, tl.trans(k_nope))  # [BLOCK_M, BLOCK_N]
        k_rope = k_rope_boxes.load([b, start, 0]).reshape([BLOCK_N, BLOCK_E])  # [BLOCK_N, BLOCK_E]
        # golden_programs.py:100  scores = scores + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        qk = tl.dot(q_rope, tl.trans(k_rope))  # [BLOCK_M, BLOCK_N]
        scores = scores + qk  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(scores, 1) * (0.07216878364870322 * LOG2E))  # [BLOCK_M]
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # [BLOCK_M]
        alpha = tl.exp2(m_i - shift)  # [BLOCK_M]
        p = tl.exp2(scores * (0.07216878364870322 * LOG2E) - shift[:, None])  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        value = value_boxes.load([b, start, h, 0]).reshape([BLOCK_N, BLOCK_F])  # [BLOCK_N, BLOCK_F]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_F]
        m_i = m_new

    # What is left of the stream: positions past its end take no part.
    if full < N:
        offs_n = full + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        k_nope = k_nope_boxes.load([b, full, h, 0]).reshape([BLOCK_N, BLOCK_D])  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:99  scores = torch.einsum("bshd,bthd->bsht", q_nope, k_nope)
        scores = tl.dot(q_nope, tl.trans(k_nope))  # [BLOCK_M, BLOCK_N]
        k_rope = k_rope_boxes.load([b, full, 0]).reshape([BLOCK_N, BLOCK_E])  # [BLOCK_N, BLOCK_E]
        # golden_programs.py:100  scores = scores + torch.einsum("bshr,btr->bsht", q_rope, k_rope)
        qk = tl.dot(q_rope, tl.trans(k_rope))  # [BLOCK_M, BLOCK_N]
        scores = scores + qk  # [BLOCK_M, BLOCK_N]
        scores_2 = tl.where(offs_n[None, :] < N, scores, NEG_INF)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(scores_2, 1) * (0.07216878364870322 * LOG2E))  # [BLOCK_M]
        shift = tl.where(m_new == NEG_INF, 0.0, m_new)  # [BLOCK_M]
        alpha = tl.exp2(m_i - shift)  # [BLOCK_M]
        p = tl.exp2(scores_2 * (0.07216878364870322 * LOG2E) - shift[:, None])  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        value = value_boxes.load([b, full, h, 0]).reshape([BLOCK_N, BLOCK_F])  # [BLOCK_N, BLOCK_F]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_F]
        m_i = m_new

    tl.store(
        out_ptr
        + b.to(tl.int64) * stride_out_b
        + h.to(tl.int64) * stride_out_h
        + offs_m.to(tl.int64)[:, None] * stride_out_m
        + offs_f[None, :] * stride_out_f,
        (acc / l_i[:, None]).to(out_ptr.dtype.element_ty),
        mask=(offs_m[:, None] < M),
    )


def reference(q_nope, k_nope, q_rope, k_rope, value):
    """The same chain in eager PyTorch: what runs on a CPU, and what the kernel is tested against."""
    M = q_nope.shape[1]
    N = k_nope.shape[1]
    H = q_nope.shape[2]
    B = q_nope.shape[0]
    scores = torch.einsum("bshd,bthd->bsht", [q_nope, k_nope])
    einsum_1 = torch.einsum("bshr,btr->bsht", [q_rope, k_rope])
    scores_2 = scores + einsum_1
    mul = scores_2 * 0.07216878364870322
    softmax = mul.softmax(-1, torch.float32)
    weights = softmax.to(torch.float16)
    einsum_2 = torch.einsum("bsht,bthd->bshd", [weights, value])
    return einsum_2


CHOSEN = {}  # the fastest config by GPU, kernel and sizes


def fastest(configs, run, programs, device, *key):
    """The config that is fastest at sizes like these: measured at the first call that keeps all of the GPU busy, and kept
    beside Triton's own cache. FLASHLIGHT_TUNE=0 takes the first.
    """
    if device.type != "cuda":
        return configs[0]
    key = (device, *(n.bit_length() if isinstance(n, int) else n for n in key))
    if key not in CHOSEN:
        gpu = torch.cuda.get_device_properties(device)
        is_busy = (
            programs(configs[0]) >= gpu.multi_processor_count and not torch.cuda.is_current_stream_capturing()
        )
        if not is_busy or os.environ.get("FLASHLIGHT_TUNE") == "0":
            return configs[0]
        CHOSEN[key] = configs[
            measured(configs, run, " ".join(map(str, (gpu.name, triton.__version__, *key[1:]))))
        ]
    return CHOSEN[key]


def measured(configs, run, key):
    """Which config a file says is the fastest; where it does not, it is told which is."""
    file = Path(triton.knobs.cache.dir, "flashlight", f"{OP}.json")
    known = json.loads(file.read_text()) if file.exists() else {}
    if key not in known:
        times = [milliseconds(run, config) for config in configs]
        known[key] = times.index(min(times))
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(known))
        new.replace(file)  # at once: other processes may read it
    return known[key]


def milliseconds(run, config):
    """How long one launch takes; forever where this GPU has too little of something."""
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=5, rep=20, return_mode="median")
    except (triton.runtime.errors.OutOfResources, torch.cuda.OutOfMemoryError):
        return float("inf")


@functools.cache
def has_tma(device):
    """Whether a GPU loads boxes of tensors by itself (Hopper and later)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


def in_rows(t):
    """The tensor as boxes of it are loaded: its last dimension dense, its rows at multiples of 16 bytes. A copy where
    it lies otherwise.
    """
    steps = [s for s, n in zip(t.stride()[:-1], t.shape) if n > 1]
    lies_so = t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not any(s % 8 for s in steps)
    return t if lies_so else t.clone(memory_format=torch.contiguous_format)


def described(t, box):
    """What a kernel loads boxes of a tensor by."""
    if not has_tma(t.device):
        return t
    steps = [s if n > 1 else 8 for s, n in zip(t.stride()[:-1], t.shape)]
    return TensorDescriptor(t, t.shape, [*steps, 1], box)


def launch(q_nope, k_nope, q_rope, k_rope, value):
    """Runs the kernel.

    q_nope: (B, M, H, 128), torch.float16, any strides
    k_nope: (B, N, H, 128), torch.float16, any strides
    q_rope: (B, M, H, 64), torch.float16, any strides
    k_rope: (B, N, 64), torch.float16, any strides
    value: (B, N, H, 128), torch.float16, any strides
    Returns (B, M, H, 128) torch.float16.
    Raises ValueError for other shapes or dtypes, and NotImplementedError where a gradient would be lost.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in [q_nope, k_nope, q_rope, k_rope, value]):
        raise NotImplementedError("the kernel has no backward: call it under torch.no_grad()")
    alike = (
        q_nope.shape,
        q_nope.stride(),
        q_nope.dtype,
        q_nope.device,
        q_nope.data_ptr() % 16,
        k_nope.shape,
        k_nope.stride(),
        k_nope.dtype,
        k_nope.device,
        k_nope.data_ptr() % 16,
        q_rope.shape,
        q_rope.stride(),
        q_rope.dtype,
        q_rope.device,
        q_rope.data_ptr() % 16,
        k_rope.shape,
        k_rope.stride(),
        k_rope.dtype,
        k_rope.device,
        k_rope.data_ptr() % 16,
        value.shape,
        value.stride(),
        value.dtype,
        value.device,
        value.data_ptr() % 16,
    )
    with torch.cuda.device_of(q_nope):
        go = PREPARED.get(alike)
        if go is None:
            if len(PREPARED) == 256:
                PREPARED.clear()
            go = PREPARED[alike] = prepared(q_nope, k_nope, q_rope, k_rope, value)
        return go(q_nope, k_nope, q_rope, k_rope, value)


PREPARED = {}  # what launches the kernels for arguments that lie in memory alike


def prepared(q_nope, k_nope, q_rope, k_rope, value):
    """Checks arguments, and settles everything but the tensors: sizes, strides, tiles."""
    M = q_nope.shape[1]
    N = k_nope.shape[1]
    H = q_nope.shape[2]
    B = q_nope.shape[0]
    if tuple(q_nope.shape) != (B, M, H, 128) or q_nope.dtype != torch.float16:
        raise ValueError(
            f"q_nope: expected { (B, M, H, 128) } torch.float16, got {tuple(q_nope.shape)} { q_nope.dtype}"
        )
    if tuple(k_nope.shape) != (B, N, H, 128) or k_nope.dtype != torch.float16:
        raise ValueError(
            f"k_nope: expected { (B, N, H, 128) } torch.float16, got {tuple(k_nope.shape)} { k_nope.dtype}"
        )
    if tuple(q_rope.shape) != (B, M, H, 64) or q_rope.dtype != torch.float16:
        raise ValueError(
            f"q_rope: expected { (B, M, H, 64) } torch.float16, got {tuple(q_rope.shape)} { q_rope.dtype}"
        )
    if tuple(k_rope.shape) != (B, N, 64) or k_rope.dtype != torch.float16:
        raise ValueError(
            f"k_rope: expected { (B, N, 64) } torch.float16, got {tuple(k_rope.shape)} { k_rope.dtype}"
        )
    if tuple(value.shape) != (B, N, H, 128) or value.dtype != torch.float16:
        raise ValueError(
            f"value: expected { (B, N, H, 128) } torch.float16, got {tuple(value.shape)} { value.dtype}"
        )
    if N == 0:  # nothing to reduce
        return reference
    ready = {}
    out = torch.zeros((B, H, M, 128), device=q_nope.device, dtype=torch.float16).permute(0, 2, 1, 3)
    q_nope_boxes = in_rows(q_nope)
    k_nope_boxes = in_rows(k_nope)
    q_rope_boxes = in_rows(q_rope)
    k_rope_boxes = in_rows(k_rope)
    value_boxes = in_rows(value)
    stride_out_b, stride_out_m, stride_out_h, stride_out_f = (
        out.stride(0),
        out.stride(1),
        out.stride(2),
        out.stride(3),
    )
    stride_q_nope_b, stride_q_nope_m, stride_q_nope_h = (
        q_nope_boxes.stride(0),
        q_nope_boxes.stride(1),
        q_nope_boxes.stride(2),
    )
    stride_k_nope_b, stride_k_nope_n, stride_k_nope_h = (
        k_nope_boxes.stride(0),
        k_nope_boxes.stride(1),
        k_nope_boxes.stride(2),
    )
    stride_q_rope_b, stride_q_rope_m, stride_q_rope_h = (
        q_rope_boxes.stride(0),
        q_rope_boxes.stride(1),
        q_rope_boxes.stride(2),
    )
    stride_k_rope_b, stride_k_rope_n = k_rope_boxes.stride(0), k_rope_boxes.stride(1)
    stride_value_b, stride_value_n, stride_value_h = (
        value_boxes.stride(0),
        value_boxes.stride(1),
        value_boxes.stride(2),
    )

    def two_products_programs(config):
        return triton.cdiv(M, config["BLOCK_M"]) * (B) * (H)

    two_products_numbers = (
        stride_out_b,
        stride_out_m,
        stride_out_h,
        stride_out_f,
        stride_q_nope_b,
        stride_q_nope_m,
        stride_q_nope_h,
        stride_k_nope_b,
        stride_k_nope_n,
        stride_k_nope_h,
        stride_q_rope_b,
        stride_q_rope_m,
        stride_q_rope_h,
        stride_k_rope_b,
        stride_k_rope_n,
        stride_value_b,
        stride_value_n,
        stride_value_h,
        M,
        N,
        H,
        B,
        has_tma(q_nope_boxes.device),
    )

    def two_products_run(config, q_nope_boxes, k_nope_boxes, q_rope_boxes, k_rope_boxes, value_boxes, out):
        args = (
            described(q_nope_boxes, (1, config["BLOCK_M"], 1, config["BLOCK_D"])),
            described(k_nope_boxes, (1, config["BLOCK_N"], 1, config["BLOCK_D"])),
            described(q_rope_boxes, (1, config["BLOCK_M"], 1, config["BLOCK_E"])),
            described(k_rope_boxes, (1, config["BLOCK_N"], config["BLOCK_E"])),
            described(value_boxes, (1, config["BLOCK_N"], 1, config["BLOCK_F"])),
            out,
            *two_products_numbers,
        )
        launched(ready, two_products_kernel, two_products_programs(config), args, config, config)

    two_products_config = CONFIGS[0]
    if two_products_programs(two_products_config):
        two_products_config = fastest(
            CONFIGS,
            lambda config: two_products_run(
                config, q_nope_boxes, k_nope_boxes, q_rope_boxes, k_rope_boxes, value_boxes, out
            ),
            two_products_programs,
            q_nope_boxes.device,
            "two_products",
            M,
            B,
            H,
            N,
        )

    def go(q_nope, k_nope, q_rope, k_rope, value):
        out = torch.empty((B, H, M, 128), device=q_nope.device, dtype=torch.float16).permute(0, 2, 1, 3)
        q_nope_boxes = in_rows(q_nope)
        k_nope_boxes = in_rows(k_nope)
        q_rope_boxes = in_rows(q_rope)
        k_rope_boxes = in_rows(k_rope)
        value_boxes = in_rows(value)
        if two_products_programs(two_products_config):
            two_products_run(
                two_products_config, q_nope_boxes, k_nope_boxes, q_rope_boxes, k_rope_boxes, value_boxes, out
            )
        return out

    return go


def launched(ready, kernel, programs, args, blocks, config):
    """Launches a kernel. Triton looks at arguments anew each time: what it compiled for alike ones is launched as it is."""
    key = id(kernel), id(config)
    if ready.get(key) is None:
        ready[key] = kernel[(programs,)](*args, **blocks)
    else:
        ready[key][(programs, 1, 1)](*args, *(v for n, v in blocks.items() if n.isupper()))


MISMULTIPLIED = (torch.bfloat16,)  # by Triton's interpreter


def _on_cpu(*args):
    runs = triton.knobs.runtime.interpret and not any(
        getattr(a, "dtype", None) in MISMULTIPLIED for a in args
    )
    return launch(*args) if runs else reference(*args)


def _fake(q_nope, k_nope, q_rope, k_rope, value):
    M = q_nope.shape[1]
    N = k_nope.shape[1]
    H = q_nope.shape[2]
    B = q_nope.shape[0]
    return torch.empty((B, H, M, 128), device=q_nope.device, dtype=torch.float16).permute(0, 2, 1, 3)


# Another text, another op: an edited kernel is never taken for the one that was written.
OP = "two_products_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
if not hasattr(torch.ops.flashlight, OP):
    LIBRARY = torch.library.Library("flashlight", "FRAGMENT")
    LIBRARY.define(
        OP + "(Tensor q_nope, Tensor k_nope, Tensor q_rope, Tensor k_rope, Tensor value) -> (Tensor)"
    )
    LIBRARY.impl(OP, launch, "CUDA")
    LIBRARY.impl(OP, _on_cpu, "CPU")
    torch.library.register_fake("flashlight::" + OP, _fake, lib=LIBRARY)


def two_products(q_nope, k_nope, q_rope, k_rope, value):
    """The chain as a `torch.library` op: what the patched module calls."""
    return getattr(torch.ops.flashlight, OP)(q_nope, k_nope, q_rope, k_rope, value)
