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
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)

# Tiles of rows and stream positions, warps and pipeline stages: what is estimated to be the fastest, and what may be.
CONFIGS = (
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=2),
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=128, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=2),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=128, BLOCK_E=64, BLOCK_F=128, num_warps=4, num_stages=3),
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

    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)  # [BLOCK_M]
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
        alpha = tl.exp2(m_i - m_new)  # [BLOCK_M]
        p = tl.exp2(scores * (0.07216878364870322 * LOG2E) - m_new[:, None])  # [BLOCK_M, BLOCK_N]
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
        alpha = tl.exp2(m_i - m_new)  # [BLOCK_M]
        p = tl.exp2(scores_2 * (0.07216878364870322 * LOG2E) - m_new[:, None])  # [BLOCK_M, BLOCK_N]
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
    if q_nope.is_cuda and q_nope.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(q_nope):
            return launch(q_nope, k_nope, q_rope, k_rope, value)
    alike = (lying(q_nope), lying(k_nope), lying(q_rope), lying(k_rope), lying(value))
    go = PREPARED.get(alike)
    if go is None:
        if len(PREPARED) == 256:
            PREPARED.clear()
        go = PREPARED[alike] = prepared(q_nope, k_nope, q_rope, k_rope, value)
    return go(q_nope, k_nope, q_rope, k_rope, value)


PREPARED = {}  # what launches the kernels for arguments that lie alike


def lying(t):
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16


def prepared(q_nope, k_nope, q_rope, k_rope, value):
    """Checks arguments, and settles what does not depend on where they lie: sizes, programs, tiles."""
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

    def two_products_numbers(q_nope_boxes, k_nope_boxes, q_rope_boxes, k_rope_boxes, value_boxes, out):
        return (
            *out.stride()[:4],
            *q_nope_boxes.stride()[:3],
            *k_nope_boxes.stride()[:3],
            *q_rope_boxes.stride()[:3],
            *k_rope_boxes.stride()[:2],
            *value_boxes.stride()[:3],
            M,
            N,
            H,
            B,
            has_tma(q_nope_boxes.device),
        )

    def two_products_by(config):
        return Launch(
            two_products_kernel,
            config,
            triton.cdiv(M, config["BLOCK_M"]) * (B) * (H),
            two_products_numbers,
            boxes={
                0: (1, config["BLOCK_M"], 1, config["BLOCK_D"]),
                1: (1, config["BLOCK_N"], 1, config["BLOCK_D"]),
                2: (1, config["BLOCK_M"], 1, config["BLOCK_E"]),
                3: (1, config["BLOCK_N"], config["BLOCK_E"]),
                4: (1, config["BLOCK_N"], 1, config["BLOCK_F"]),
            },
        )

    launch_two_products = Fastest(CONFIGS, two_products_by, "two_products", M, B, H, N)

    def go(q_nope, k_nope, q_rope, k_rope, value):
        out = q_nope.new_empty((B, H, M, 128)).permute(0, 2, 1, 3)
        launch_two_products(q_nope, k_nope, q_rope, k_rope, value, out)
        return out

    return go


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
    return q_nope.new_empty((B, H, M, 128)).permute(0, 2, 1, 3)


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
