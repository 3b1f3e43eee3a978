"""Types of a kernel's parameters as Triton spells them."""

from __future__ import annotations

import torch

from rewriter.emit.names import Names
from rewriter.ir import Output

POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
POINTER |= {
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def kernel_signature(names: Names, strides: dict[str, str], outputs: tuple[Output, ...]) -> dict[str, str]:
    out = {f"{name}_ptr": POINTER[tensor.dtype] for tensor, name in names.tensors.items()}
    out |= {f"{name}_ptr": POINTER[o.dtype] for o, name in zip(outputs, names.outputs)}
    out |= {stride: "i32" for stride in strides}
    return out | {size: "i32" for size in names.sizes.values()}
