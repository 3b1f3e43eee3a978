"""Types of a kernel's parameters as Triton spells them."""

from __future__ import annotations

import torch

from rewriter.emit.values import Descriptor
from rewriter.ir import Node, Output, Tensor

POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64"}
POINTER |= {
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


def kernel_signature(
    tensors: dict[Tensor, str],
    boxes: list[Descriptor],
    strides: dict[str, str],
    outputs: tuple[Output, ...],
    names: dict[str, str],
    sizes: dict[Node, str],
) -> dict[str, str]:
    """Tensors read, by pointers or boxes (`*bf16[1,BLOCK_N,BLOCK_D]`), outputs by their `names`, strides and sizes, as the kernel's parameters stand."""
    out = {f"{name}_ptr": POINTER[tensor.dtype] for tensor, name in tensors.items()}
    out |= {b.name: f"{POINTER[b.dtype]}[{','.join(b.sizes)}]" for b in boxes}
    out |= {f"{names[o.name]}_ptr": POINTER[o.dtype] for o in outputs}
    out |= dict.fromkeys(strides, "i32")
    return out | dict.fromkeys(sizes.values(), "i32")
