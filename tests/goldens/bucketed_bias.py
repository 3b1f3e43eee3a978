"""`BucketedBias` with its reduction chains fused.

Written from golden_programs.py:59-82 (sha256 c3bc02493c0a).

Math
    m_i[b, h, m] = max_n float32(round16(sum_r0_0 query[b, h, m, d] * key[b, h, d, n] + weight[int64(0 < n - m) * 16 + where(abs(n - m) < 8, abs(n - m), min(int64(log(float32(abs(n - m)) / 8) / 2.77259 * 8) + 8, 15)), h]))
    l_i[b, h, m] = sum_n exp(float32(round16(sum_r0_0 query[b, h, m, d] * key[b, h, d, n] + weight[int64(0 < n - m) * 16 + where(abs(n - m) < 8, abs(n - m), min(int64(log(float32(abs(n - m)) / 8) / 2.77259 * 8) + 8, 15)), h])) - m_i[b, h, m])
    acc[b, h, m, e] = sum_n exp(float32(round16(sum_r0_0 query[b, h, m, d] * key[b, h, d, n] + weight[int64(0 < n - m) * 16 + where(abs(n - m) < 8, abs(n - m), min(int64(log(float32(abs(n - m)) / 8) / 2.77259 * 8) + 8, 15)), h])) - m_i[b, h, m]) * value[b, h, n, e]
    matmul_1[b, h, m, e] = acc[b, h, m, e] / l_i[b, h, m]

Why one sweep is enough
    shift: T(old → new) = exp(phi(old) - phi(new)), phi = m_i at least every exponent seen so far
    hoist: factors that do not depend on the stream are taken out of the sum
    proved on 5 random cases, stream in blocks and in halves

Fixed: H = 4, D = 64, E = 64. Known at the call: M (query.shape[2]), N (key.shape[3]), B (query.shape[0]).
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
H = tl.constexpr(4)

# Tiles of rows and stream positions, warps and pipeline stages: what is estimated to be the fastest, and what may be.
CONFIGS = (
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=2),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=2),
    dict(BLOCK_M=128, BLOCK_N=32, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=32, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_D=64, BLOCK_E=64, num_warps=8, num_stages=3),
    dict(BLOCK_M=128, BLOCK_N=64, BLOCK_D=64, BLOCK_E=64, num_warps=4, num_stages=3),
)


@triton.jit
def bucketed_bias_kernel(
    weight_ptr,
    query_boxes,
    key_boxes,
    value_boxes,
    out_ptr,
    stride_weight_n,
    stride_weight_h,
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
    B,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
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
    offs_e = tl.arange(0, BLOCK_E)  # [BLOCK_E]
    if not TMA:  # boxes of tensors by plain loads
        query_boxes = tl.make_tensor_descriptor(
            query_boxes,
            [B, 4, M, 64],
            [stride_query_b, stride_query_h, stride_query_m, 1],
            [1, 1, BLOCK_M, BLOCK_D],
        )
        key_boxes = tl.make_tensor_descriptor(
            key_boxes, [B, 4, N, 64], [stride_key_b, stride_key_h, stride_key_n, 1], [1, 1, BLOCK_N, BLOCK_D]
        )
        value_boxes = tl.make_tensor_descriptor(
            value_boxes,
            [B, 4, N, 64],
            [stride_value_b, stride_value_h, stride_value_n, 1],
            [1, 1, BLOCK_N, BLOCK_E],
        )
    query = query_boxes.load([b, h, start_m, 0]).reshape([BLOCK_M, BLOCK_D])  # [BLOCK_M, BLOCK_D]

    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)  # [BLOCK_M]
    l_i = tl.full([BLOCK_M], 0.0, tl.float32)  # [BLOCK_M]
    acc = tl.full([BLOCK_M, BLOCK_E], 0.0, tl.float32)  # [BLOCK_M, BLOCK_E]

    full = N // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        key = key_boxes.load([b, h, start, 0]).reshape([BLOCK_N, BLOCK_D])  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:80  scores = torch.matmul(query, key.transpose(3, 2)) + bias
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:79  bias = self.table(self._bucket(columns - rows)).permute(2, 0, 1)
        i = offs_n[None, :] - offs_m[:, None]  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:69  side = (distance > 0).long() * half
        side = (0 < i).to(tl.int64) * 16  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:70  distance = distance.abs()
        distance = tl.abs(i)  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:72  far = torch.log(distance.float() / near) / math.log(self.farthest / near) * (half - near)
        far = (
            tl.div_rn(tl.log(distance.to(tl.float32) * (1.0 / 8.0)), 2.772588722239781) * 8.0
        )  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:73  far = torch.clamp(near + far.long(), max=half - 1)
        far = tl.minimum(far.to(tl.int64) + 8, 15)  # [BLOCK_M, BLOCK_N]
        index = side + tl.where(distance < 8, distance, far)  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:79  bias = self.table(self._bucket(columns - rows)).permute(2, 0, 1)
        bias = tl.load(
            weight_ptr + h.to(tl.int64) * stride_weight_h + index.to(tl.int64) * stride_weight_n,
            mask=(offs_m[:, None] < M) & (index >= 0) & (index < 32),
            other=0,
        )  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:80  scores = torch.matmul(query, key.transpose(3, 2)) + bias
        scores = qk + bias  # [BLOCK_M, BLOCK_N]
        x = scores.to(tl.float16).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(x, 1))  # [BLOCK_M]
        alpha = tl.exp2((m_i - m_new) * LOG2E)  # [BLOCK_M]
        p = tl.exp2((x - m_new[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        value = value_boxes.load([b, h, start, 0]).reshape([BLOCK_N, BLOCK_E])  # [BLOCK_N, BLOCK_E]
        acc = tl.dot(p.to(tl.float16), value, acc * alpha[:, None])  # [BLOCK_M, BLOCK_E]
        m_i = m_new

    # What is left of the stream: positions past its end take no part.
    if full < N:
        offs_n = full + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        key = key_boxes.load([b, h, full, 0]).reshape([BLOCK_N, BLOCK_D])  # [BLOCK_N, BLOCK_D]
        # golden_programs.py:80  scores = torch.matmul(query, key.transpose(3, 2)) + bias
        qk = tl.dot(query, tl.trans(key))  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:79  bias = self.table(self._bucket(columns - rows)).permute(2, 0, 1)
        i = offs_n[None, :] - offs_m[:, None]  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:69  side = (distance > 0).long() * half
        side = (0 < i).to(tl.int64) * 16  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:70  distance = distance.abs()
        distance = tl.abs(i)  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:72  far = torch.log(distance.float() / near) / math.log(self.farthest / near) * (half - near)
        far = (
            tl.div_rn(tl.log(distance.to(tl.float32) * (1.0 / 8.0)), 2.772588722239781) * 8.0
        )  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:73  far = torch.clamp(near + far.long(), max=half - 1)
        far = tl.minimum(far.to(tl.int64) + 8, 15)  # [BLOCK_M, BLOCK_N]
        index = side + tl.where(distance < 8, distance, far)  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:79  bias = self.table(self._bucket(columns - rows)).permute(2, 0, 1)
        bias = tl.load(
            weight_ptr + h.to(tl.int64) * stride_weight_h + index.to(tl.int64) * stride_weight_n,
            mask=(offs_m[:, None] < M) & (offs_n[None, :] < N) & (index >= 0) & (index < 32),
            other=0,
        )  # [BLOCK_M, BLOCK_N]
        # golden_programs.py:80  scores = torch.matmul(query, key.transpose(3, 2)) + bias
        scores = qk + bias  # [BLOCK_M, BLOCK_N]
        x = tl.where(offs_n[None, :] < N, scores.to(tl.float16).to(tl.float32), NEG_INF)  # [BLOCK_M, BLOCK_N]
        m_new = tl.maximum(m_i, tl.max(x, 1))  # [BLOCK_M]
        alpha = tl.exp2((m_i - m_new) * LOG2E)  # [BLOCK_M]
        p = tl.exp2((x - m_new[:, None]) * LOG2E)  # [BLOCK_M, BLOCK_N]
        l_i = l_i * alpha + tl.sum(p, 1)  # [BLOCK_M]
        value = value_boxes.load([b, h, full, 0]).reshape([BLOCK_N, BLOCK_E])  # [BLOCK_N, BLOCK_E]
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


def reference(query, key, weight, value):
    """The same chain in eager PyTorch: what runs on a CPU, and what the kernel is tested against."""
    M = query.shape[2]
    N = key.shape[3]
    B = query.shape[0]
    arange = torch.arange(M, device=query.device)
    rows = arange.unsqueeze(1)
    arange_1 = torch.arange(N, device=query.device)
    columns = arange_1.unsqueeze(0)
    sub = columns - rows
    gt = sub > 0
    to = gt.to(torch.int64)
    side = to * 16
    distance = sub.abs()
    to_1 = distance.to(torch.float32)
    div = to_1 / 8
    log = div.log()
    div_1 = log / 2.772588722239781
    far = div_1 * 8
    to_2 = far.to(torch.int64)
    add = to_2 + 8
    far_2 = add.clamp(None, 15)
    lt = distance < 8
    where = torch.where(lt, distance, far_2)
    add_1 = side + where
    bias = torch.embedding(weight, add_1)
    bias_2 = bias.permute(2, 0, 1)
    matmul = query @ key
    scores = matmul + bias_2
    to_3 = scores.to(torch.float32)
    softmax = to_3.softmax(-1)
    weights = softmax.to(torch.float16)
    matmul_1 = weights @ value
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


def launch(query, key, weight, value):
    """Runs the kernel.

    query: (B, 4, M, 64), torch.float16, any strides
    key: (B, 4, 64, N), torch.float16, any strides
    weight: (32, 4), torch.float16, any strides
    value: (B, 4, N, 64), torch.float16, any strides
    Returns (B, 4, M, 64) torch.float16.
    Raises ValueError for other shapes or dtypes, and NotImplementedError where a gradient would be lost.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in [query, key, weight, value]):
        raise NotImplementedError("the kernel has no backward: call it under torch.no_grad()")
    if query.is_cuda and query.get_device() != torch.cuda.current_device():
        with torch.cuda.device_of(query):
            return launch(query, key, weight, value)
    alike = (lying(query), lying(key), lying(weight), lying(value))
    go = PREPARED.get(alike)
    if go is None:
        if len(PREPARED) == 256:
            PREPARED.clear()
        go = PREPARED[alike] = prepared(query, key, weight, value)
    return go(query, key, weight, value)


PREPARED = {}  # what launches the kernels for arguments that lie alike


def lying(t):
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 16


def prepared(query, key, weight, value):
    """Checks arguments, and settles what does not depend on where they lie: sizes, programs, tiles."""
    M = query.shape[2]
    N = key.shape[3]
    B = query.shape[0]
    if tuple(query.shape) != (B, 4, M, 64) or query.dtype != torch.float16:
        raise ValueError(
            f"query: expected { (B, 4, M, 64) } torch.float16, got {tuple(query.shape)} { query.dtype}"
        )
    if tuple(key.shape) != (B, 4, 64, N) or key.dtype != torch.float16:
        raise ValueError(
            f"key: expected { (B, 4, 64, N) } torch.float16, got {tuple(key.shape)} { key.dtype}"
        )
    if tuple(weight.shape) != (32, 4) or weight.dtype != torch.float16:
        raise ValueError(
            f"weight: expected { (32, 4) } torch.float16, got {tuple(weight.shape)} { weight.dtype}"
        )
    if tuple(value.shape) != (B, 4, N, 64) or value.dtype != torch.float16:
        raise ValueError(
            f"value: expected { (B, 4, N, 64) } torch.float16, got {tuple(value.shape)} { value.dtype}"
        )
    if N == 0:  # nothing to reduce
        return reference

    def bucketed_bias_numbers(weight, query_boxes, key_boxes, value_boxes, out):
        return (
            *weight.stride()[:2],
            *out.stride()[:4],
            *query_boxes.stride()[:3],
            *key_boxes.stride()[:3],
            *value_boxes.stride()[:3],
            M,
            N,
            B,
            has_tma(query_boxes.device),
        )

    def bucketed_bias_by(config):
        return Launch(
            bucketed_bias_kernel,
            config,
            triton.cdiv(M, config["BLOCK_M"]) * (B) * (4),
            bucketed_bias_numbers,
            boxes={
                1: (1, 1, config["BLOCK_M"], config["BLOCK_D"]),
                2: (1, 1, config["BLOCK_N"], config["BLOCK_D"]),
                3: (1, 1, config["BLOCK_N"], config["BLOCK_E"]),
            },
        )

    launch_bucketed_bias = Fastest(CONFIGS, bucketed_bias_by, "bucketed_bias", M, B, N)

    def go(query, key, weight, value):
        out = query.new_empty((B, 4, M, 64))
        launch_bucketed_bias(weight, query, key.permute(0, 1, 3, 2), value, out)
        return out

    return go


MISMULTIPLIED = (torch.bfloat16,)  # by Triton's interpreter


def _on_cpu(*args):
    runs = triton.knobs.runtime.interpret and not any(
        getattr(a, "dtype", None) in MISMULTIPLIED for a in args
    )
    return launch(*args) if runs else reference(*args)


def _fake(query, key, weight, value):
    M = query.shape[2]
    N = key.shape[3]
    B = query.shape[0]
    return query.new_empty((B, 4, M, 64))


# Another text, another op: an edited kernel is never taken for the one that was written.
OP = "bucketed_bias_" + hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
if not hasattr(torch.ops.flashlight, OP):
    LIBRARY = torch.library.Library("flashlight", "FRAGMENT")
    LIBRARY.define(OP + "(Tensor query, Tensor key, Tensor weight, Tensor value) -> (Tensor)")
    LIBRARY.impl(OP, launch, "CUDA")
    LIBRARY.impl(OP, _on_cpu, "CPU")
    torch.library.register_fake("flashlight::" + OP, _fake, lib=LIBRARY)


def bucketed_bias(query, key, weight, value):
    """The chain as a `torch.library` op: what the patched module calls."""
    return getattr(torch.ops.flashlight, OP)(query, key, weight, value)
